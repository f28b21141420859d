"""Does memory at rest grow with each load-use-unload cycle? Pure.

levels at rest, one before the first cycle and one after each -> differences once caches are full -> one of OUTCOMES

A least-squares slope over such a series is wrong: allocators grow by steps, caches fill and stop, a garbage collector
gives back in waves, and neighbours in time are alike. So:

- The first cycles are left out: at least a third, and as many as it takes to fill the caches that are known of.
- The rest is cut into blocks, and the least level of each is its floor: what waves leave. A leak makes every floor
  higher than the one before, a step only one of them. The differences between floors get the exact Hodges-Lehmann
  interval, which one step cannot move. So do the differences between each cycle and the one half of them later, which
  noise moves least, and a step most.
- A leak goes on all the time. Besides an interval above what is tolerated it takes that the lowest level that is still
  to come rises too, early and late, and levels at the end; or that each of PARTS is higher than the one before. A cache
  that fills, or a collector's wave, looks like a leak until it is over: no leak is called before LEAK_FROM cycles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from peftopt import stats
from peftopt.records import Interval

Outcome = Literal["leaks", "caches", "frees", "undecided", "never returned"]

OUTCOMES: dict[Outcome, str] = {
    "leaks": "each cycle keeps memory for good",
    "caches": "memory grew at first and then no more",
    "frees": "what a cycle takes it gives back",
    "undecided": "too few cycles for so much noise",
    "never returned": "an unload had no answer within its limit",
}
"""What cycles can show, in words."""

TOLERATED = 65_536.0
"""Bytes a cycle that are nobody's worry: with a reload a minute they are 94 MB a day."""

CACHED = 2.0**20
"""Bytes kept for good from which "caches" is said instead of "frees"."""

LEVEL = 0.99
"""Of each interval. Three of them at four looks err 6 % at most on either side; how often they do is simulated
(benchmarks/leaks.py)."""

LOOKS = (25, 50, 100, 200)
"""Cycles after which a series is judged; the first look that decides is final."""

LEAK_FROM = 50
"""Cycles from which a leak is called one."""

SETTLING = 1 / 3
"""The share of cycles that is left out in front."""

BLOCKS = (17, 10)
"""Blocks that the rest is cut into: many, whose interval a step does not move, and few, which waves do not either."""

PARTS = 6
"""Parts of the rest, each of which a leak makes higher than the one before."""

TO_COME = 1 / 4
"""The share of the rest that is looked at for what is given back late, and for no growth."""


@dataclass(frozen=True)
class Kept:
    """The result of a series. `per_cycle`: bytes a cycle once caches are full. `bound`: the most bytes above the first
    level that were held at rest then. `settled`: the number of cycles that were left out in front; `cycles`: the number
    of all."""

    outcome: Outcome
    per_cycle: Interval
    bound: float
    settled: int
    cycles: int


def judge(
    levels: Sequence[float],
    full: int = 0,
    tolerated: float = TOLERATED,
    returned: bool = True,
    leak_from: int | None = None,
) -> Kept:
    """The outcome of a series of bytes at rest, `levels[0]` before the first cycle. `full`: the number of cycles that
    fill the caches that are known of; `returned`: whether each unload had an answer; `leak_from`: LEAK_FROM, or fewer
    where a level stands for many cycles. Anything else that is counted at rest is judged alike, such as open files.

    Raises ValueError for levels that are not finite.
    """
    cycles = max(len(levels) - 1, 0)
    settled = max(full, math.ceil(cycles * SETTLING))
    late = levels[settled:]
    by_floors = [stats.hodges_lehmann(_differences(late, blocks), LEVEL) for blocks in BLOCKS]
    by_halves = stats.hodges_lehmann(_between_halves(late), LEVEL)
    intervals = [*by_floors, by_halves]
    no_leak = [interval for interval in intervals if stats.judge(interval, tolerated) == "accepted"]
    narrowest = min(intervals, key=lambda interval: interval.high - interval.low)
    kept = Kept("undecided", [*no_leak, narrowest][0], 0.0, settled, cycles)
    if late:
        kept = replace(kept, bound=max(0.0, max(late) - levels[0]))
    if not returned:
        return replace(kept, outcome="never returned")
    if no_leak:
        return replace(kept, outcome="caches" if min(late) - levels[0] > CACHED else "frees")
    if cycles < (leak_from or LEAK_FROM):
        return kept
    for per_cycle, growth in ((by_floors[0], _growth(late)), (by_halves, _rises(late))):
        if stats.judge(per_cycle, tolerated) == "rejected" and min(growth) > tolerated:
            return replace(kept, outcome="leaks", per_cycle=per_cycle)
    return kept


def decided(levels: Sequence[float], full: int = 0, tolerated: float = TOLERATED) -> Kept | None:
    """The result of the cycles so far, at a planned look that decides; None if the next one is needed. The last look is
    final."""
    cycles = len(levels) - 1
    if cycles not in LOOKS:
        return None
    kept = judge(levels, full, tolerated)
    return None if kept.outcome == "undecided" and cycles < LOOKS[-1] else kept


def _differences(late: Sequence[float], blocks: int) -> list[float]:
    """Bytes a cycle between the floors of neighbouring blocks. What is left over is left out in front."""
    width = max(1, len(late) // blocks)
    whole = late[len(late) % width :]
    floors = [min(whole[start : start + width]) for start in range(0, len(whole), width)]
    return [(after - before) / width for before, after in pairwise(floors)]


def _between_halves(late: Sequence[float]) -> list[float]:
    """Bytes a cycle between each cycle of the first half and the one as far into the second."""
    half = len(late) // 2
    return [(after - before) / half for before, after in zip(late[:half], late[-half:], strict=True)] if half else []


def _rises(late: Sequence[float]) -> list[float]:
    """Bytes a cycle from the middle of each of PARTS to that of the next; no growth where there are too few cycles."""
    width = len(late) // PARTS
    if not width:
        return [0.0]
    whole = late[len(late) % PARTS :]
    middles = [stats.median(whole[start : start + width]) for start in range(0, len(whole), width)]
    return [(after - before) / width for before, after in pairwise(middles)]


def _growth(late: Sequence[float]) -> tuple[float, float, float]:
    """Bytes a cycle that were never given back, early and late, and by which levels rose at the end, of which nobody
    knows whether they are given back."""
    lowest_to_come = list(late)
    for at in range(len(late) - 2, -1, -1):
        lowest_to_come[at] = min(lowest_to_come[at], lowest_to_come[at + 1])
    last = len(late) - 1 - int(len(late) * TO_COME)
    middle, end = last // 2, late[last:]
    if not 0 < middle < last or len(end) < 2:
        return 0.0, 0.0, 0.0
    early = (lowest_to_come[middle] - lowest_to_come[0]) / middle
    later = (lowest_to_come[last] - lowest_to_come[middle]) / (last - middle)
    half = len(end) // 2
    rise = (stats.median(end[-half:]) - stats.median(end[:half])) / (len(end) - half)
    return early, later, rise
