"""Shares and rates: exact intervals of counts. Pure."""

from __future__ import annotations

import math

from peftopt.records import Interval
from peftopt.stats.samples import unknown


def proportion(k: int, n: int, level: float = 0.95) -> Interval:
    """The share k / n with its exact two-sided interval. Source: Clopper and Pearson 1934."""
    tail = (1 - level) / 2
    low = 1 - upper_bound(n - k, n, 1 - tail)
    return Interval(k / n if n else math.nan, low, upper_bound(k, n, 1 - tail), n, level)


def upper_bound(k: float, n: float, confidence: float = 0.95) -> float:
    """The highest rate that k events in n trials leave open, one-sided and exact; 1 - 0.05^(1/n) for k = 0.

    Source: Clopper and Pearson 1934; Eypasch et al. 1995 for k = 0.
    """
    from scipy.special import betaincinv

    if not 0 <= k <= n:
        raise ValueError(f"k must lie between 0 and n, found {k} of {n}")
    if k == 0 and n:
        return -math.expm1(math.log1p(-confidence) / n)
    return float(betaincinv(k + 1, n - k, confidence)) if k < n else 1.0


def needed_n(rate: float, family: int = 1, confidence: float = 0.95) -> int:
    """The fewest prompts that bound the rate below `rate` when none fails, for `family` variants together.

    299 for 1 %, 2,995 for 0.1 %. Source: Eypasch et al. 1995; Bonferroni over the family.
    """
    if not 0 < rate < 1 or family < 1:
        raise ValueError(f"needs a rate between 0 and 1 and a family of 1 or more, found {rate} and {family}")
    return math.ceil(math.log((1 - confidence) / family) / math.log1p(-rate))


def flips(worse: int, better: int) -> float:
    """One-sided exact p-value that the variant is worse: prompts now wrong that were right, and the reverse.

    Source: McNemar 1947, the exact form; Dutta et al. 2024, arXiv 2407.09141, on flips against accuracy.
    """
    from scipy.special import bdtrc

    if min(worse, better) < 0:
        raise ValueError(f"counts must be 0 or more, found {worse} and {better}")
    return float(bdtrc(worse - 1, worse + better, 0.5)) if worse else 1.0


MOSTLY = 0.8
"""Of the error of an interval for a difference, what the larger part has: the variant's own failures."""


def excess(worse: int, better: int, n: int, level: float = 0.95) -> Interval:
    """The share of `n` pairs in which only the variant failed, less the share in which only the reference did.

    Bounds are those of two exact intervals that share the error, so they hold for any n, also where none failed.
    Source: Clopper and Pearson 1934; Bonferroni over the two.
    """
    ours, theirs = proportion(worse, n, 1 - MOSTLY * (1 - level)), proportion(better, n, 1 - (1 - MOSTLY) * (1 - level))
    estimate = (worse - better) / n if n else math.nan
    return Interval(estimate, ours.low - theirs.high, ours.high - theirs.low, n, level)


def kept(lost: int, right: int, won: int, wrong: int, level: float = 0.95) -> Interval:
    """A share of right answers as a ratio to the reference's: of its `right` ones `lost` are wrong now, of its `wrong`
    ones `won` are right now. Exact given what the reference got right: two intervals that share the error."""
    if not right:
        return unknown(0, level)
    down, up = proportion(lost, right, 1 - MOSTLY * (1 - level)), proportion(won, wrong, 1 - (1 - MOSTLY) * (1 - level))
    gain = wrong / right
    low, high = 1 - down.high + gain * up.low, 1 - down.low + gain * up.high
    return Interval((right - lost + won) / right, low, high, right + wrong, level)
