"""Means and ratios over prompts, each prompt a cluster, and what is more than chance. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from peftopt.records import Interval
from peftopt.stats.samples import as_row, unknown


def mean(samples: Iterable[float], level: float = 0.95) -> Interval:
    """The mean (unit of the samples) over independent prompts with its t interval, infinite below n = 2."""
    x = as_row(samples)
    return ratio_of_means(x, [1.0] * len(x), level)


def ratio_of_means(num: Iterable[float], den: Iterable[float], level: float = 0.95) -> Interval:
    """sum(num) / sum(den) over prompts, each prompt one cluster, by the delta method with a t quantile.

    `num` in any unit, `den` >= 0 (a count of tokens); ValueError for others, and where they differ in length.
    Source: Miller 2024, arXiv 2411.00640, section 2.2.
    """
    import numpy as np
    from scipy.special import stdtrit

    a, b = as_row(num), as_row(den)
    n = len(a)
    if n != len(b) or (b < 0).any():
        raise ValueError("num and den must be as long as each other, and den 0 or more")
    if not b.sum() > 0:
        return unknown(n, level)
    ratio = float(a.sum() / b.sum())
    if n < 2:
        return Interval(ratio, -math.inf, math.inf, n, level)
    error = math.sqrt(n / (n - 1)) * float(np.linalg.norm(a - ratio * b) / b.sum())
    half = float(stdtrit(n - 1, (1 + level) / 2)) * error
    return Interval(ratio, ratio - half, ratio + half, n, level)


def perplexity_ratio(
    nll_variant: Iterable[float], nll_reference: Iterable[float], tokens: Iterable[float], level: float = 0.95
) -> Interval:
    """Perplexity of the variant over the reference's, from each prompt's summed nll (nats) and its tokens. Raises
    ValueError where the three differ in length."""
    variant, reference = as_row(nll_variant), as_row(nll_reference)
    if len(variant) != len(reference):
        raise ValueError("the variant and the reference must score the same prompts")
    gap = ratio_of_means(variant - reference, tokens, level)
    return Interval(_exp(gap.estimate), _exp(gap.low), _exp(gap.high), gap.n, level)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else x * math.inf


def exceeds(ratio: float, groups: int, rest: int, level: float = 0.99) -> bool:
    """Whether a ratio of mean squares is more than chance: the F test with `groups` and `rest` degrees of freedom."""
    from scipy.special import fdtr

    return bool(fdtr(groups, rest, ratio) > level)


def slope(x: Iterable[float], y: Iterable[float]) -> float:
    """The slope of the least-squares line of y (any unit) over x, which must not be all the same."""
    import numpy as np

    a, b = as_row(x), as_row(y)
    centred = a - a.mean()
    return float(centred @ b / np.square(centred).sum())
