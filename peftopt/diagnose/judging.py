"""Judges the times of blocks: a ratio with its interval, and whether it is a cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peftopt import stats
from peftopt.decision.evidence import exp
from peftopt.diagnose.records import FREE, Finding
from peftopt.metrics import counted
from peftopt.records import Interval

LEVEL = 0.95
"""Of intervals by which nothing is judged: what advice gained, slopes, differences in milliseconds."""

FAMILY = 33
"""Comparisons that a diagnosis may make: they share its error, so that a clean engine is called costly by none."""

ALPHA = 0.01
"""The chance that any of the family is called a cost at most, however noisy the machine, were all of them at the limit.
Twenty diagnoses of a clean engine shall all be clean."""

LOOKS, SHARES = (12, 18, 27, 40, 60), (0.82, 0.06, 0.05, 0.04, 0.03)
"""Numbers of blocks at which a comparison is judged, and the share of ALPHA of each. The first that decides is final,
so blocks may be added. Twelve blocks all say the same by chance once in 2^12 times, which all of FAMILY may do."""

LEVELS = tuple(1 - 2 * ALPHA * share / FAMILY for share in SHARES)
"""Of the two-sided interval that is judged at each look."""

LAUNCHES = 1.05
"""How far two launches of one and the same server may differ: what lies within is not a cost of what they differ in.
Two launches are one pair, and no number of blocks shows what they brought."""


@dataclass(frozen=True)
class Judged:
    """The result of blocks. `ratio` of times, with the judged interval: from the blocks and at the level of the
    deciding look, or of the last one. An interval above `costly` is a cost, one below `free` is none. `blocks`: their
    number."""

    finding: Finding
    ratio: Interval
    blocks: int
    free: float
    costly: float

    @property
    def why(self) -> str:
        """Why it is undecided; "" if it is decided."""
        if self.finding != "undecided":
            return ""
        if self.blocks < LOOKS[0]:
            return f"{counted(self.blocks, 'block')} of the {LOOKS[0]} after which it is judged first"
        interval = f"{self.ratio.low:.2f}x to {self.ratio.high:.2f}x"
        limits = f"{self.costly:.2f}x" if self.costly == self.free else f"{self.costly:.2f}x (two servers)"
        return (
            f"the {level_text(self.ratio.level)} interval that is judged is {interval}: a cost is all above {limits}, "
            f"no cost all below {self.free:.2f}x"
        )


def judged(logs: Sequence[float], one_server: bool = True, most: float = FREE) -> Judged:
    """A cost, none, or undecided: whether the ratio is above `most`. `logs`: log(costly / plain) by block, in order.

    Raises ValueError for a log that is not finite.
    """
    costly = most if one_server else most * LAUNCHES
    ratio = exp(stats.hodges_lehmann(logs[: LOOKS[0]], LEVELS[0]))
    for look, level in zip(LOOKS, LEVELS, strict=True):
        if look > len(logs):
            break
        ratio = exp(stats.hodges_lehmann(logs[:look], level))
        if ratio.low > costly:
            return Judged("costs", ratio, len(logs), most, costly)
        if ratio.high < most:
            return Judged("no cost", ratio, len(logs), most, costly)
    return Judged("undecided", ratio, len(logs), most, costly)


def next_look(blocks: int) -> int:
    """The next number of blocks: the first look after so many; past the last look, as many again."""
    return next((look for look in LOOKS if look > blocks), blocks + LOOKS[-1])


def level_text(level: float) -> str:
    """A level with enough digits to differ from 100 %: "99.95 %"."""
    missing = 100 * (1 - level)
    places = max(0, math.ceil(-math.log10(missing))) if missing > 0 else 0
    return f"{100 * level:.{places}f} %"


def ratio(costly: Sequence[float], plain: Sequence[float]) -> Interval | None:
    """The ratio of times, paired by block, at LEVEL; None without blocks."""
    logs = logs_of(costly, plain)
    return exp(stats.hodges_lehmann(logs, LEVEL)) if logs else None


def difference(costly: Sequence[float], plain: Sequence[float]) -> Interval:
    """The cost in the unit of the times, paired by block."""
    return stats.hodges_lehmann([a - b for a, b in zip(costly, plain, strict=True)], LEVEL)


def logs_of(costly: Sequence[float], plain: Sequence[float]) -> list[float]:
    """log(costly / plain) by block."""
    return [math.log(a / b) for a, b in zip(costly, plain, strict=True)]
