"""An interval against its limit, and how much more of the same would clear it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from peftopt import stats
from peftopt.records import Interval, Outcome

MOST_TIMES = 10
"""More than so many times the prompts that were asked are not proposed."""


def against_limit(value: Interval, op: str, limit: float) -> Outcome:
    """Accept when the whole interval meets the limit, reject when the whole interval misses it."""
    passes = {
        "<=": lambda x: x <= limit,
        "<": lambda x: x < limit,
        ">=": lambda x: x >= limit,
        ">": lambda x: x > limit,
    }[op]
    low, high = passes(value.low), passes(value.high)
    return "accepted" if low and high else "inconclusive" if low or high else "rejected"


def right_answers_needed(worse: int, better: int, right: int, level: float, limit: float) -> str:
    """How many right answers would tell, were those to come lost at the same rate."""
    for n in range(right + 1, MOST_TIMES * right + 1):
        lost, lost_again = math.ceil(worse * n / right), better * n // right
        if stats.excess(lost, lost_again, n, level).high <= limit:
            return f"at this rate {n} right answers would tell"
    return f"at this rate not even {MOST_TIMES} times as many would tell"


def prompts_needed(turned_down: Iterable[bool], asked: int) -> str:
    """How many prompts would turn a model down, were others to differ as these do: of two times as many as were asked,
    three times, …, whether they would."""
    times = next((k for k, enough in enumerate(turned_down, 2) if enough), None)
    if times is None:
        return f"not even {MOST_TIMES} times as many prompts that differ as these do would turn it down"
    return f"too few prompts to turn it down: {times * asked} that differ as these do would"


def blocks_for(value: Interval, limit: float, blocks: int) -> int:
    """About how many blocks would clear the limit, as intervals shrink with the root of their number."""
    side = value.high - value.estimate if value.estimate < limit else value.estimate - value.low
    gap = abs(value.estimate - limit)
    if not math.isfinite(side) or gap <= 0:
        return 2 * blocks
    return math.ceil(min(blocks * (side / gap) ** 2, stats.MOST_BLOCKS))
