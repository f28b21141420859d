"""Quantiles, and shares of samples whose groups share their fate. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from peftopt.records import Interval
from peftopt.stats.samples import as_row, unknown
from peftopt.stats.shares import upper_bound

if TYPE_CHECKING:
    from peftopt.stats.samples import Array


def quantile(samples: Iterable[float], q: float, level: float = 0.95) -> Interval:
    """The q-quantile (unit of the samples) with its exact, equal-tailed interval from order statistics.

    A bound that no order statistic reaches is infinite: P95 at 95 % has an upper bound from n = 72 on.
    Source: David and Nagaraja 2003, "Order Statistics", section 7.1.
    """
    import numpy as np

    x = np.sort(as_row(samples))
    return _quantile_of(x, len(x), q, level)


def quantile_of_groups(groups: Iterable[Iterable[float]], q: float, level: float = 0.95) -> Interval:
    """`quantile` of samples whose groups (launches, or blocks) share their fate; inf stands for a failed request.

    Samples of one group say less than as many independent ones. The design effect at the quantile, from the spread of
    the groups' shares below it, says how much less; with few groups that is itself uncertain, so the effective number
    of samples is also cut by a ratio of t quantiles. One group has no interval.
    Source: Woodruff 1952 (inverting the share); Korn and Graubard 1998 (effective number of samples).
    """
    import numpy as np

    parts = [np.array(list(group), dtype=float) for group in groups]
    parts = [part for part in parts if len(part)]
    x = np.sort(np.concatenate(parts)) if parts else np.array([])
    if np.isnan(x).any():
        raise ValueError("samples must be numbers")
    if len(parts) < 2:
        return replace(_quantile_of(x, len(x), q, level), low=-math.inf, high=math.inf)
    n = len(x)
    centre = x[min(math.ceil(q * n), n) - 1]
    below = np.array([(part <= centre).sum() for part in parts])
    sizes = np.array([len(part) for part in parts])
    return _quantile_of(x, math.floor(_effective(below, sizes, level)), q, level)


def share_of_groups(counts: Iterable[tuple[int, int]], level: float = 0.95) -> Interval:
    """The share k / n over groups (k, n) that share their fate, with the exact interval of as many independent samples
    as they are worth: see `quantile_of_groups`. One group has no interval. Source: Korn and Graubard 1998."""
    import numpy as np

    groups = [(k, n) for k, n in counts if n]
    k, n = sum(k for k, _ in groups), sum(n for _, n in groups)
    if len(groups) < 2:
        return replace(unknown(n, level), estimate=k / n if n else math.nan)
    effective = _effective(np.array([k for k, _ in groups]), np.array([n for _, n in groups]), level)
    low = 1 - upper_bound((1 - k / n) * effective, effective, (1 + level) / 2)
    return Interval(k / n, low, upper_bound(k / n * effective, effective, (1 + level) / 2), n, level)


def fewest_for(q: float, level: float = 0.95) -> int:
    """The fewest samples from which the q-quantile has a finite interval: 72 for P95 at 95 %, 368 for P99."""
    if not 0 < q < 1:
        raise ValueError(f"q must lie between 0 and 1, found {q}")
    return math.ceil(math.log((1 - level) / 2) / math.log(max(q, 1 - q)))


def _quantile_of(ordered: Array, effective: int, q: float, level: float) -> Interval:
    """The q-quantile of ordered samples, with the bounds that so many independent ones would give."""
    import numpy as np
    from scipy.special import bdtr

    if not 0 < q < 1:
        raise ValueError(f"q must lie between 0 and 1, found {q}")
    n = len(ordered)
    if not n:
        return unknown(0, level)
    at_most = bdtr(np.arange(effective), effective, q)  # P(k or fewer of the samples lie below the quantile)
    lower = int(np.searchsorted(at_most, (1 - level) / 2, side="right"))
    upper = int(np.searchsorted(at_most, 1 - (1 - level) / 2, side="left")) + 1
    low = float(ordered[lower * n // effective - 1]) if lower else -math.inf
    high = float(ordered[-(-upper * n // effective) - 1]) if upper <= effective else math.inf
    finite = ordered[np.isfinite(ordered)]
    middle = np.quantile(ordered, q) if len(finite) == n else ordered[math.ceil(q * n) - 1]
    return Interval(float(middle), low, high, n, level)


def _effective(below: Array, sizes: Array, level: float) -> float:
    """How many independent samples two or more groups are worth, of which so many are `below` something."""
    import numpy as np
    from scipy.special import stdtrit

    n, groups, tail = int(sizes.sum()), len(sizes), (1 + level) / 2
    share = below.sum() / n
    between = groups / (groups - 1) * np.square(below - share * sizes).sum()
    alone = n * share * (1 - share)
    effect = max(between / alone, 1.0) if alone else 1.0
    few = (stdtrit(n - 1, tail) / stdtrit(groups - 1, tail)) ** 2
    return float(n / effect * few)
