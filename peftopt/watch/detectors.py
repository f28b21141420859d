"""Detectors of a change, without the assumption that requests are independent. Pure.

A detector hears one number of a window, in 0..1. As long as nothing has changed its mean is `mean` at most, whatever
came before. Then it seldom alarms: see `Detector`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

STAKES: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 0.9)
"""Shares of the most that may be staked; all wealths are averaged."""


@dataclass
class Detector:
    """An e-detector: the sum of bets that began at each window so far, averaged over stakes.

    As long as the mean of what it hears, given the past, is `mean` at most, the mean of its wealth after n windows is n
    at most. So it reaches a wealth of w no sooner than after w windows on average.
    Source: Shin, Ramdas and Rinaldo 2023, "E-detectors" (arXiv 2203.03532), Shiryaev-Roberts form.
    """

    mean: float
    logs: list[float] = field(default_factory=list)
    """The logarithm of each stake's wealth; empty before the first window."""
    windows: int = 0

    def hear(self, value: float) -> None:
        """A window's number, in 0..1."""
        raise NotImplementedError

    @property
    def level(self) -> float:
        """The logarithm of the averaged wealth."""
        raise NotImplementedError
