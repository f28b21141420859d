"""Log ratios of paired blocks: their centre, and an interval that holds where launches differ. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from peftopt.records import Interval
from peftopt.stats.means import exceeds, mean
from peftopt.stats.samples import as_row, unknown

if TYPE_CHECKING:
    from peftopt.stats.samples import Array

MOST_WALSH = 1_000
"""Blocks of which all Walsh averages are held at once: half a million."""

LAUNCHES_TO_COMPARE = 5
"""Launches from which it can be seen that they do not differ."""

LAUNCHES_SHOWN = 0.2
"""The chance that launches which do not differ seem to: high, since missing that they do makes verdicts wrong."""

COARSE = 0.1
"""The share of repeated times from which a clock counts as coarse."""

Launches = Sequence[int] | None
"""For each block the number of the launch it belongs to, in order; None where each block is a launch of its own."""


def hodges_lehmann(d: Iterable[float], level: float) -> Interval:
    """The centre of symmetric differences (any unit), with the exact Wilcoxon signed-rank interval.

    The bounds are Walsh averages (x_i + x_j) / 2, infinite when n is too small for `level`. Work: n^3.
    Source: Hodges and Lehmann 1963; Hollander, Wolfe and Chicken 2014, section 3.3.
    """
    import numpy as np

    x = as_row(d)
    if not len(x):
        return unknown(0, level)
    averages = np.sort(_walsh(x))
    cut = _signed_rank_cut(len(x), (1 - level) / 2)
    low, high = (averages[cut - 1], averages[-cut]) if cut else (-math.inf, math.inf)
    return Interval(float(np.median(averages)), float(low), float(high), len(x), level)


def paired(d: Iterable[float], level: float, launches: Launches = None) -> Interval:
    """The centre of log ratios of blocks, with an interval that holds where launches vary too.

    That is the exact Wilcoxon interval over blocks. Where launches seem to differ, or are too few to show that they do
    not, it also spans one over the centres of launches: the exact one where there are enough of them for `level`, else
    Student's t. One launch has no interval: what differs between launches was not seen.
    Source: Kalibera and Jones 2013 (repeat at the level at which the variance arises).
    """
    x = as_row(d)
    groups = launch_of_each(launches, len(x))
    over_blocks = hodges_lehmann(x, level)
    if len(set(groups)) == len(x) or not launches_matter(x, groups):
        return over_blocks
    centres = launch_centres(x, groups)
    over_launches = hodges_lehmann(centres, level)
    if not math.isfinite(over_launches.low):
        over_launches = mean(centres, level)
    low, high = min(over_blocks.low, over_launches.low), max(over_blocks.high, over_launches.high)
    return replace(over_blocks, low=low, high=high)


def launches_matter(d: Iterable[float], launches: Sequence[int]) -> bool:
    """Whether blocks of one launch may be more alike than others: there are fewer than LAUNCHES_TO_COMPARE, or an
    analysis of variance over the ranks of blocks says so, at a level at which it rarely misses what would spoil a
    verdict."""
    import numpy as np
    from scipy.stats import rankdata

    x = as_row(d)
    blocks = [np.array(found) for found in blocks_by_launch(launches)]
    if len(blocks) < LAUNCHES_TO_COMPARE:
        return True
    ranks = rankdata(x)
    groups, rest = len(blocks) - 1, len(x) - len(blocks)
    if rest < 1:
        return False
    between = sum(len(found) * (ranks[found].mean() - ranks.mean()) ** 2 for found in blocks)
    within = sum(np.square(ranks[found] - ranks[found].mean()).sum() for found in blocks)
    return not within or exceeds(between / groups / (within / rest), groups, rest, 1 - LAUNCHES_SHOWN)


def resolution(times: Iterable[float]) -> float:
    """The step of the clock that took these times, relative to their median; 0 where it tells them apart.

    A clock counts as coarse when a tenth of its readings repeat others. Its step is the least gap between two of them.
    """
    import numpy as np

    x = np.sort(as_row(times))
    gaps = np.diff(x)
    fine = gaps[gaps > 1e-9 * x[1:]] if len(x) else gaps
    if not len(fine) or len(gaps) - len(fine) < COARSE * len(x):
        return 0.0
    return float(fine.min() / np.median(x))


def centre(x: Array) -> float:
    """The Hodges-Lehmann estimate; nan of nothing."""
    import numpy as np

    if len(x) > MOST_WALSH:
        return _centre_of_many(x)
    return float(np.median(_walsh(x))) if len(x) else math.nan


def _centre_of_many(x: Array) -> float:
    """The same where the Walsh averages are too many to hold: those below a value are counted, by bisection."""
    import numpy as np

    halves = np.sort(x) / 2
    total = len(x) * (len(x) + 1) // 2

    def at_most(value: float) -> int:
        ordered_pairs = np.searchsorted(halves, value - halves, side="right").sum()
        of_one_block = np.searchsorted(2 * halves, value, side="right")
        return int(ordered_pairs + of_one_block) // 2

    def ranked(rank: int) -> float:
        low, high = 2 * halves[0], 2 * halves[-1]
        for _ in range(60):
            middle = low / 2 + high / 2
            low, high = (low, middle) if at_most(middle) >= rank else (middle, high)
        return float(high)

    return ranked((total + 1) // 2) / 2 + ranked(total // 2 + 1) / 2


def _walsh(x: Array) -> Array:
    import numpy as np

    i, j = np.triu_indices(len(x))
    averages: Array = x[i] / 2 + x[j] / 2
    return averages


@lru_cache(maxsize=1024)
def _signed_rank_cut(n: int, tail: float) -> int:
    """How many Walsh averages lie outside the interval on each side: the most k with P(W <= k - 1) <= tail.

    W, the signed-rank statistic, sums each rank 1..n with probability 1/2.
    """
    import numpy as np

    probability = np.zeros(n * (n + 1) // 4 + 1)  # the lower half
    probability[0] = 1.0
    for rank in range(1, n + 1):
        half = probability / 2
        half[rank:] += probability[:-rank] / 2
        probability = half
    return int(np.searchsorted(np.cumsum(probability), tail, side="right"))


def launch_of_each(launches: Launches, blocks: int) -> Sequence[int]:
    """The launch of each block."""
    groups = range(blocks) if launches is None else launches
    if len(groups) != blocks:
        raise ValueError(f"{blocks} blocks need as many launch numbers, found {len(groups)}")
    return groups


def blocks_by_launch(launches: Sequence[int]) -> list[list[int]]:
    """The blocks of each launch, in the order in which launches ended."""
    at: dict[int, list[int]] = {}
    for block, group in enumerate(launches):
        at.setdefault(group, []).append(block)
    return sorted(at.values(), key=lambda blocks: blocks[-1])


def launch_centres(x: Array, groups: Sequence[int]) -> Array:
    """The centre of each launch's blocks."""
    import numpy as np

    return np.array([centre(x[blocks]) for blocks in blocks_by_launch(groups)])
