"""Samples as an array, and what nothing can be said of. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peftopt.records import Interval

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]


def as_row(samples: Iterable[float]) -> Array:
    """The samples as an array. Raises ValueError where they are not a row of finite numbers."""
    import numpy as np

    x = np.array(samples if isinstance(samples, np.ndarray) else list(samples), dtype=float)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise ValueError("samples must be a row of finite numbers")
    return x


def unknown(n: int, level: float) -> Interval:
    """The interval of n samples that say nothing."""
    return Interval(math.nan, -math.inf, math.inf, n, level)


def median(xs: Iterable[float]) -> float:
    """The median (unit of the samples); nan of nothing."""
    x = list(xs)
    return float(statistics.median(x)) if x else math.nan
