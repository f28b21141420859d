"""Two runs: what their intervals show of the difference. Pure."""

from __future__ import annotations

import math

from peftopt.records import Interval
from peftopt.stats.samples import unknown


def difference(ours: Interval, theirs: Interval) -> Interval:
    """The difference, ours - theirs, of two independent estimates (any unit), at their intervals' level, which is one.

    Bounds lie as far off as the root of the summed squares of how far those of the two do, each on its own side, so
    neither has to be symmetric or as wide as the other. Where an interval at the level is not to be had, `welch` finds
    it from one at another. For means of normal samples the interval holds at least its
    level whatever their variances and sizes are. Raises ValueError for two levels.
    Source: Zou and Donner 2008 (recovering variances from limits); Banerjee 1961 (the level).
    """
    if ours.level != theirs.level:
        raise ValueError(f"both intervals must have one level, found {ours.level} and {theirs.level}")
    estimate = ours.estimate - theirs.estimate
    down = math.hypot(ours.estimate - ours.low, theirs.high - theirs.estimate)
    up = math.hypot(ours.high - ours.estimate, theirs.estimate - theirs.low)
    low, high = (estimate - down, estimate + up) if math.isfinite(estimate) else (-math.inf, math.inf)
    return Interval(estimate, low, high, min(ours.n, theirs.n), ours.level)


def welch(ours: Interval, theirs: Interval, level: float = 0.95) -> Interval:
    """`ours` less `theirs` at any `level`, of two independent samples that are known by their intervals alone; of
    ratios give logs.

    A side of an interval shows a standard error by Student's t with n - 1 degrees of freedom; a bound takes those of
    the two sides that face each other. Infinite where a side is, and where it shows no error though n is more than 1:
    samples that happen to agree. One exact value (n = 1) has none. `n` stands for the degrees of freedom of the
    difference, so that it can be compared again.
    Source: Welch 1947 (degrees of freedom); Zou and Donner 2008 (facing sides).
    """
    estimate = ours.estimate - theirs.estimate
    if math.isnan(estimate):
        return unknown(0, level)
    down, down_freedom = _reach_of(ours, ours.low, theirs, theirs.high, level)
    up, up_freedom = _reach_of(ours, ours.high, theirs, theirs.low, level)
    return Interval(estimate, estimate - down, estimate + up, 1 + min(down_freedom, up_freedom), level)


def _reach_of(ours: Interval, ours_to: float, theirs: Interval, theirs_to: float, level: float) -> tuple[float, int]:
    """How far off the difference its bound lies, and the degrees of freedom of that: 0 and 0 of two exact values."""
    from scipy.special import stdtrit

    errors = ((_error(ours, ours_to), ours.n - 1), (_error(theirs, theirs_to), theirs.n - 1))
    total = math.hypot(*(error for error, _ in errors))
    if not total or not math.isfinite(total):
        return total, 0
    parts = sum((error / total) ** 4 / n for error, n in errors if error)
    freedom = max(1, math.floor(1 / parts + 1e-9))
    return float(stdtrit(freedom, (1 + level) / 2)) * total, freedom


def _error(interval: Interval, bound: float) -> float:
    """The standard error that a side of an interval shows; 0 of one exact value, infinite where it cannot be told."""
    from scipy.special import stdtrit

    if interval.low == interval.high:
        return 0.0 if interval.n == 1 else math.inf
    if interval.n < 2 or math.isnan(bound) or math.isnan(interval.level):
        return math.inf
    return float(abs(bound - interval.estimate) / stdtrit(interval.n - 1, (1 + interval.level) / 2))
