"""Is the share of errors in one version higher than in another's by more than a limit? Valid at any time. Pure.

A pair has one request of each version: +1 if only the new one's went wrong, -1 if only the live one's did, else 0. The
pairs' mean is the difference of the two shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peftopt.records import Interval, Outcome

STAKES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of the wealth that are staked; all wealths are averaged."""

STEPS = 30
"""Halvings of [-1, 1] in search of a bound: to one in 10^9."""


@dataclass
class Tally:
    """Of `n` pairs: those in which only the new version's went wrong (`worse`), and only the live one's (`better`)."""

    worse: int = 0
    better: int = 0
    n: int = 0

    def add(self, new: bool, live: bool) -> None:
        """One more pair, and which of the two went wrong."""
        self.n += 1
        self.worse += new and not live
        self.better += live and not new

    @property
    def mean(self) -> float:
        """The difference of the new version's share from the live one's; nan without pairs."""
        return (self.worse - self.better) / self.n if self.n else math.nan


def judge(tally: Tally, limit: float, alpha: float) -> Outcome:
    """Whether the mean lies below a limit: accepted, rejected above it, or inconclusive.

    One bet wins if the pairs are below the limit on average whatever came before, another if they are above. If a bet's
    claim is false, the chance that its wealth ever exceeds 1 / alpha is at most alpha (Ville). Source: Waudby-Smith and
    Ramdas 2023, "Estimating means of bounded random variables by betting", 4.
    """
    if _wins(tally, limit, -1, alpha):
        return "accepted"
    return "rejected" if _wins(tally, limit, 1, alpha) else "inconclusive"


def interval(tally: Tally, alpha: float) -> Interval:
    """The mean with every limit that neither bet refutes: it holds at any time, at 1 - 2 alpha."""
    high, low = _edge(tally, -1, alpha), _edge(tally, 1, alpha)
    return Interval(tally.mean, low, high, tally.n, 1 - 2 * alpha)


def _edge(tally: Tally, side: int, alpha: float) -> float:
    """The limit nearest to the mean that the gambler on this side refutes: its wealth is monotone in the limit."""
    far, near = float(-side), tally.mean
    if not tally.n or not _wins(tally, far * (1 - 1e-9), side, alpha):
        return far
    for _ in range(STEPS):
        middle = (far + near) / 2
        if _wins(tally, middle, side, alpha):
            far = middle
        else:
            near = middle
    return far


def _wins(tally: Tally, limit: float, side: int, alpha: float) -> bool:
    """Whether the gambler on a side of the limit (-1 below it, 1 above) holds 1 / alpha, from a stake of 1."""
    worst = 1 + side * limit
    alike = tally.n - tally.worse - tally.better
    counts = ((1, tally.worse), (0, alike), (-1, tally.better))
    wealth = [sum(n * math.log1p(stake / worst * side * (d - limit)) for d, n in counts) for stake in STAKES]
    most = max(wealth)
    averaged = most + math.log(sum(math.exp(w - most) for w in wealth) / len(wealth))
    return averaged >= -math.log(alpha)
