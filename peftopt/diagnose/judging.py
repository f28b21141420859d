"""From the times of blocks to what a row says: a ratio with its interval, and whether it is a cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peftopt import stats
from peftopt.decision.evidence import exp
from peftopt.diagnose.records import FREE, Finding
from peftopt.records import Interval

LEVEL = 0.95
"""Of the intervals that are shown."""

FAMILY = 33
"""Comparisons that a diagnosis may make: they share its error, so that a clean engine is called costly by none."""

ALPHA = 0.01
"""The chance that any of the family is called a cost at most, however noisy the machine, were all of them at the limit.
Twenty diagnoses of a clean engine shall all be clean."""

LOOKS, SHARES = (12, 18, 27, 40, 60), (0.82, 0.06, 0.05, 0.04, 0.03)
"""Numbers of blocks at which a comparison is judged, and the share of ALPHA of each. The first that decides is final,
so blocks may be added. Twelve blocks all say the same by chance once in 2^12 times, which all of FAMILY may do."""

LAUNCHES = 1.05
"""How far two launches of one and the same server may differ: what lies within is not a cost of what they differ in.
Two launches are one pair, and no number of blocks shows what they brought."""


@dataclass(frozen=True)
class Judged:
    """What blocks say: the `ratio` of times at LEVEL, the number of blocks, and the finding."""

    finding: Finding
    ratio: Interval
    blocks: int


def judged(logs: Sequence[float], one_server: bool = True, most: float = FREE) -> Judged:
    """A cost, none, or undecided: whether the ratio is above `most`. `logs`: log(costly / plain) by block, in order.

    Raises ValueError for a log that is not finite.
    """
    ratio = exp(stats.hodges_lehmann(logs, LEVEL))
    limit = math.log(most)
    margin = 0.0 if one_server else math.log(LAUNCHES)
    for look, share in zip(LOOKS, SHARES, strict=True):
        if look > len(logs):
            break
        interval = stats.hodges_lehmann(logs[:look], 1 - 2 * ALPHA * share / FAMILY)
        if interval.low > limit + margin:
            return Judged("costs", ratio, len(logs))
        if interval.high < limit:
            return Judged("no cost", ratio, len(logs))
    return Judged("undecided", ratio, len(logs))


def next_look(blocks: int) -> int:
    """How many blocks to have next: the first look after so many; as many again past the last."""
    return next((look for look in LOOKS if look > blocks), blocks + LOOKS[-1])


def difference(costly: Sequence[float], plain: Sequence[float]) -> Interval:
    """What it costs in the unit of the times, paired by block."""
    return stats.hodges_lehmann([a - b for a, b in zip(costly, plain, strict=True)], LEVEL)


def logs_of(costly: Sequence[float], plain: Sequence[float]) -> list[float]:
    """log(costly / plain) by block."""
    return [math.log(a / b) for a, b in zip(costly, plain, strict=True)]
