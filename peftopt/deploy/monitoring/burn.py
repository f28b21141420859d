"""When a share of misses pages: several windows, each with a threshold and the fewest requests that it is judged by.

Source: Google, "The Site Reliability Workbook", chapter 5, "Multiwindow, multi-burn-rate alerts": page at 14.4 times
the allowed misses over an hour and at 6 times over six hours, and only while a window of a twelfth is above it too.

That was written for 99.9 %. A limit on the P95 allows 5 % of misses, so all requests together miss 20 times as many as
allowed, and never more. Two changes follow:
- No threshold is more than halfway from the allowed share to all requests, or a service where every request is too slow
  would page late (P95: 31 minutes in place of 43) or never (P90: 14.4 times 10 % is more than there is).
- Twice the misses is 10 % of requests, which neither window sees. A third, of a day, pages at 1.5 times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CHANCE = 1e-6
"""At the allowed share, and if requests were independent, a window is above its threshold by chance no more often."""
FEWEST = 20
"""Requests; a share of fewer says nothing."""


@dataclass(frozen=True)
class Pace:
    """A `long` window (hours) pages at so many `times` the allowed misses, while the `short` one agrees. Both are named
    as Prometheus writes them."""

    name: str
    long: str
    short: str
    times: float
    hours: float


PACES = (
    Pace("fast", "1h", "5m", 14.4, 1.0),
    Pace("middle", "6h", "30m", 6.0, 6.0),
    Pace("slow", "1d", "2h", 1.5, 24.0),
)
WINDOWS = tuple(window for pace in PACES for window in (pace.short, pace.long))


@dataclass(frozen=True)
class Burn:
    """Page where more than `threshold` of the requests in both windows miss, of at least `requests` in the long one."""

    pace: Pace
    allowed: float
    threshold: float
    requests: int

    def hours(self, share: float, before: float = 0.0) -> float:
        """How long after a change the long window is above the threshold: from a share `before` to `share` of misses,
        at a steady rate of requests; inf for never."""
        if share <= self.threshold:
            return math.inf
        return self.pace.hours * max(0.0, self.threshold - before) / (share - before)


def burns(allowed: float) -> tuple[Burn, ...]:
    """The windows for an allowed share of misses, the quickest first; a window that another one always precedes is left
    out. None for a share that cannot be missed, 1 or more."""
    found: list[Burn] = []
    for pace in PACES:
        threshold = min(pace.times * allowed, (1.0 + allowed) / 2) if allowed > 0 else 0.0
        if allowed < 1.0 and (not found or threshold < found[-1].threshold):
            found.append(Burn(pace, allowed, threshold, fewest(allowed, threshold)))
    return tuple(found)


def fewest(allowed: float, threshold: float, chance: float = CHANCE) -> int:
    """So many independent requests, of which each misses with the chance `allowed`, have a share of misses of at least
    `threshold` with a chance of at most `chance`. Source: Hoeffding 1963, theorem 1 (the Chernoff bound)."""
    if allowed <= 0.0:
        return FEWEST
    above = threshold * math.log(threshold / allowed)
    below = (1.0 - threshold) * math.log((1.0 - threshold) / (1.0 - allowed)) if threshold < 1.0 else 0.0
    return max(FEWEST, math.ceil(-math.log(chance) / (above + below)))
