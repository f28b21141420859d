"""The numbers of weights: their dtypes in numpy, and those that no training leaves behind.

A bit that flips on a disk or on the way makes a weight infinite, or some 10^38. Where nobody knows the hash of the
right file, that is how it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peftopt.models.checkpoint import ITEM_BYTES, Checkpoint, Entry

if TYPE_CHECKING:
    import numpy as np

FLOATS = ("F64", "F32", "F16", "BF16")

LIMIT = 1e4
"""No trained matrix has a value beyond: published checkpoints stay below some hundreds. The highest bit of an exponent
multiplies what is below 2 by 2^128 in bf16 and fp32, and by 65,536 in fp16."""

VECTOR_LIMIT = 1e20
"""The same for norms and biases, some of which are large. A single number has no limit: it may be what a mask holds."""

LOOKED_BYTES = 1 << 22
"""Bytes looked through at a time, so that no tensor is held whole."""


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of numpy for the format's word, from ml_dtypes where numpy has none; `.name` is torch's word for it.
    Raises KeyError for one that neither has."""
    import ml_dtypes
    import numpy as np

    known: dict[str, type[Any]] = {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }
    dtype: np.dtype[Any] = np.dtype(known[name])
    return dtype


def largest(values: np.ndarray) -> float:
    """The largest magnitude; infinite or NaN where one of the values is.

    The bits of floats, read as integers, lie in the order of the magnitudes on either side of zero, and are looked
    through at half the cost: signed for the largest positive one, unsigned for the largest negative one.
    """
    import numpy as np

    if not values.size:
        return 0.0
    signed = values.view(f"i{values.itemsize}")
    unsigned = int(signed.view(f"u{values.itemsize}").max())
    bits = max(int(signed.max()), unsigned & np.iinfo(signed.dtype).max)
    return float(np.array([bits], dtype=signed.dtype).view(values.dtype)[0])


def wrong(entry: Entry, most: float) -> str:
    """What is wrong with a tensor whose largest magnitude is `most`, "" for nothing. Pure."""
    if not math.isfinite(most):
        return "holds NaN or infinity"
    if entry.dtype in UNSCALED and most > (LIMIT if len(entry.shape) > 1 else VECTOR_LIMIT) and entry.items > 1:
        return f"holds a value of {most:.3g}, which no training leaves behind"
    return ""


def damaged(weights: Checkpoint) -> Iterator[str]:
    """What is wrong with values of a checkpoint, a sentence for each tensor: one that is not finite, or one beyond the
    limits. Integers and packed weights are not looked at."""
    for entry in weights.entries.values():
        if entry.dtype in LOOKED and (problem := wrong(entry, _largest_of(weights, entry))):
            yield f"{entry.name} {problem}"


UNSCALED = (*FLOATS, "F8_E4M3")
"""The dtypes whose numbers are never scaled to more than LIMIT."""

LOOKED = (*UNSCALED, "F8_E5M2")
"""The dtypes whose magnitudes are in the order of their bits."""


def _largest_of(weights: Checkpoint, entry: Entry) -> float:
    import numpy as np

    step = LOOKED_BYTES // ITEM_BYTES[entry.dtype] * ITEM_BYTES[entry.dtype]
    most, buffer = 0.0, bytearray(min(step, entry.nbytes))
    for at in range(0, entry.nbytes, step):
        part = memoryview(buffer)[: min(step, entry.nbytes - at)]
        weights.read(entry, at, part)
        found = largest(np.frombuffer(part, dtype_of(entry.dtype)))
        if not math.isfinite(found):
            return found
        most = max(most, found)
    return most
