"""The inner loop of a merge, compiled: weight and delta summed and rounded in one pass.

bf16 is passed as its bits in uint16, fp16 as its bits in int16, fp32 as itself. numba compiles the loop for the types
that it is first called with (two seconds), and keeps the code on the disk for other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic as _intrinsic

UNIT = 2.0**-24
"""fp32's unit roundoff."""

TWICE = np.float32(2 * UNIT)


def intrinsic(function: Callable[..., Any]) -> Any:
    """numba's own is untyped."""
    return _intrinsic(function)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        found: Callable[..., Any] = njit(cache=True, **options)(function)
    except RuntimeError:  # there is nowhere to keep it
        found = njit(**options)(function)
    return found


# ---- what numba lacks: floats of two bytes -------------------------------------------------------


@intrinsic
def _wide(context: Any, value: Any) -> Any:
    """A weight as fp32, exactly."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (bits,), word = arguments, ir.IntType(32)
        if value == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(bits, word), word(16)), ir.FloatType())
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType()) if value == types.int16 else bits

    return types.float32(value), generate


@intrinsic
def _bits(context: Any, value: Any) -> Any:
    """The bits of an fp32 value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _rounded(context: Any, value: Any, like: Any) -> Any:
    """The bits of an fp32 value rounded to the type of `like`. Ties of bf16 go away from zero, a third faster than to
    even; nobody takes what is that near a tie."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, word = arguments[0], ir.IntType(32)
        if like == types.uint16:
            return builder.lshr(builder.add(builder.bitcast(number, word), word(0x8000)), word(16))
        return builder.zext(builder.bitcast(builder.fptrunc(number, ir.HalfType()), ir.IntType(16)), word)

    return types.uint32(types.float32, like), generate


@intrinsic
def _nearest(context: Any, value: Any, like: Any) -> Any:
    """The bits of an fp64 value, rounded to the nearest of the type of `like`: to odd in fp32, and from there to even
    (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums")."""
    double, number, word = ir.DoubleType(), ir.FloatType(), ir.IntType(32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exact = arguments[0]
        single = builder.fptrunc(exact, number)
        back, bits = builder.fpext(single, double), builder.bitcast(single, word)
        magnitude = builder.module.declare_intrinsic("llvm.fabs", [double])
        past = builder.fcmp_ordered(">", builder.call(magnitude, [back]), builder.call(magnitude, [exact]))
        inexact = builder.fcmp_ordered("!=", back, exact)
        bits = builder.or_(builder.sub(bits, builder.zext(past, word)), builder.zext(inexact, word))
        if like == types.int16:
            half = builder.fptrunc(builder.bitcast(bits, number), ir.HalfType())
            return builder.zext(builder.bitcast(half, ir.IntType(16)), word)
        last = builder.and_(builder.lshr(bits, word(16)), word(1))
        return builder.lshr(builder.add(builder.add(bits, word(0x7FFF)), last), word(16))

    return types.uint32(types.float64, like), generate


# ---- the loops -----------------------------------------------------------------------------------


@_compiled
def add_rounded(before, delta, slack, exact_b, exact_a, after):  # type: ignore[no-untyped-def]
    """after = before + delta, rounded to the nearest. All three are [rows, in].

    `delta` is fp32, and no element of a row is off by more than `slack` [rows]. Where the sum rounds alike with all
    errors taken off and added, so does the truth; elsewhere it is computed from exact_b [rows, r] and exact_a [in, r].
    Returns the bits of the largest magnitude among the fp32 sums: those of infinity or NaN where one is not finite.
    """
    words = np.zeros(before.shape[1] // 8 + 1, np.uint64)  # the doubts of eight elements each
    doubtful = words.view(np.uint8)
    largest = np.uint32(0)
    for row in range(len(before)):
        old, new = before[row], after[row]
        largest = max(largest, _round(old, delta[row], slack[row], new, doubtful))
        for word in range(len(words)):
            if words[word]:
                for j in range(word * 8, min(word * 8 + 8, len(old))):
                    if doubtful[j]:
                        exact = np.float64(_wide(old[j]))
                        for k in range(exact_a.shape[1]):
                            exact += exact_b[row, k] * exact_a[j, k]
                        new[j] = _nearest(exact, new[j])
    return largest


@_compiled
def round_to_nearest(exact, after):  # type: ignore[no-untyped-def]
    """fp64, finite, to the nearest of two bytes; both are flat."""
    for j in range(exact.size):
        after[j] = _nearest(exact[j], after[j])


@_compiled
def _round(before, delta, slack, after, doubtful):  # type: ignore[no-untyped-def]
    """One row, apart from what it is part of: so it is compiled to vector instructions."""
    largest = np.uint32(0)
    for j in range(before.size):
        value = _wide(before[j]) + delta[j]
        error = abs(value) * TWICE + slack  # the sum's own rounding, and that of the two that follow
        low, high = _rounded(value - error, after[j]), _rounded(value + error, after[j])
        largest = max(largest, _bits(value) & np.uint32(0x7FFFFFFF))
        after[j], doubtful[j] = low, low != high
    return largest
