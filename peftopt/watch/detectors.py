"""Detectors of a change, without the assumption that requests are independent. Pure.

A detector hears one number of a window, in 0..1. As long as nothing has changed its mean is `mean` at most, whatever
came before. Then it seldom alarms: see `Detector`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peftopt.records import JsonValue

STAKES: tuple[float, ...] = (0.15, 0.5, 0.9)
"""Shares of the most that may be staked, 1 / mean; all wealths are averaged. The small one is for small changes and
for windows whose requests share their fate, the large one for large changes."""


@dataclass
class Bet:
    """What one stake has won. All logarithms are natural.

    `wealth`: log(1 + M), where M sums the bets that began at each window so far. `run`: the logarithm of the best of
    these bets; 0 where none has won. That one began at `since`, and heard `hits` of `n` since then.
    """

    stake: float
    wealth: float = 0.0
    run: float = 0.0
    since: float = 0.0
    hits: float = 0.0
    n: int = 0

    def hear(self, excess: float, hits: float, n: int, began: float) -> None:
        """A window's number over the promised mean, less 1: -1 or more. Where it is 0 nothing is won or lost."""
        gain = math.log1p(self.stake * excess)
        moved = self.wealth + gain
        self.wealth = max(moved, 0.0) + math.log1p(math.exp(-abs(moved)))  # log(1 + (1 + M) x factor)
        if self.run <= 0:
            self.since, self.hits, self.n = began, 0.0, 0
        self.run = max(0.0, self.run + gain)
        self.hits += hits
        self.n += n


@dataclass
class Detector:
    """An e-detector: the sum of bets that began at each window so far, averaged over stakes.

    As long as the mean of what it hears, given the past, is `mean` at most, the mean of its wealth after n windows is n
    at most. So it reaches a wealth of w no sooner than after w windows on average.
    Source: Shin, Ramdas and Rinaldo 2023, "E-detectors" (arXiv 2203.03532), Shiryaev-Roberts form.
    """

    mean: float
    bets: list[Bet] = field(default_factory=lambda: [Bet(stake) for stake in STAKES])
    hits: float = 0.0
    n: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.mean < 1:
            raise ValueError(f"a promised mean must lie between 0 and 1, found {self.mean}")

    def hear(self, value: float, n: int = 1, began: float = 0.0) -> None:
        """A window's number, in 0..1: a share of its `n` requests, say. `began`: seconds since 1970. Raises ValueError
        for another number."""
        if not 0 <= value <= 1:
            raise ValueError(f"a window's number must lie in 0..1, found {value}")
        excess, hits = value / self.mean - 1, value * n
        for bet in self.bets:
            bet.hear(excess, hits, n, began)
        self.hits += hits
        self.n += n

    @property
    def level(self) -> float:
        """The logarithm of 1 + the averaged wealth: 0 or more."""
        most = max(bet.wealth for bet in self.bets)
        total = math.fsum(math.exp(bet.wealth - most) for bet in self.bets)
        return max(0.0, most + math.log(total / len(self.bets)))

    @property
    def leader(self) -> Bet:
        """The stake that has won most: its best bet began where the change seems to have begun."""
        return max(self.bets, key=lambda bet: bet.wealth)

    def as_json(self) -> list[JsonValue]:
        """Its state, as `restored` reads it."""
        bets: list[JsonValue] = [[bet.wealth, bet.run, bet.since, bet.hits, bet.n] for bet in self.bets]
        return [self.hits, self.n, *bets]

    @classmethod
    def restored(cls, mean: float, state: JsonValue) -> Detector:
        """As it was. Raises TypeError or ValueError for what is not such a state."""
        if not isinstance(state, list):
            raise TypeError("a detector's state is a list")
        hits, n, *states = state
        bets = []
        for stake, bet in zip(STAKES, states, strict=True):
            if not isinstance(bet, list):
                raise TypeError("a bet's state is a list")
            wealth, run, since, won, heard = map(number, bet)
            bets.append(Bet(stake, wealth, run, since, won, int(heard)))
        return cls(mean, bets, number(hits), int(number(n)))


def number(value: JsonValue) -> float:
    """A number of a state. Raises TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"expected a number, found {value!r}")
    return value


def threshold(windows: float, weight: float = 1.0) -> float:
    """The level at which a detector alarms that has so much of the budget, where all together shall alarm falsely once
    in so many windows at most. Weights sum to 1 at most, and a detector's own never grows: then the sum of all wealths
    times their weights is n at most, on average, after n windows."""
    return math.log1p(windows / weight)
