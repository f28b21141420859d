"""The inner loop of a merge, compiled: delta made, added to the weight and rounded in one pass over the memory.

bf16 is passed as its bits in uint16, fp16 as its bits in int16, fp32 as itself. numba compiles the loop for the types
that it is first called with (two seconds), and keeps the code on the disk for other processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.extending import intrinsic as _intrinsic

with contextlib.suppress(RuntimeError):  # an unknown processor
    # LLVM takes half of what AVX-512 has, lest the processor slow down. Today's do not, and the loop runs faster.
    if config.CPU_FEATURES is None and (_features := binding.get_host_cpu_features()).get("avx512f"):
        config.CPU_FEATURES = f"{_features.flatten()},-prefer-256-bit"

UNIT = 2.0**-24
"""fp32's unit roundoff."""

TWICE = np.float32(2 * UNIT)

ROWS, COLUMNS, RANKS = 4, 512, 4
"""A tile of the delta, which stays in the first-level cache with its weights; and how many products are added to it at
a time: so many that neither loads nor stores hold the arithmetic up, and their factors fit into registers."""

STRIDE = COLUMNS + 48
"""From row to row of a tile: not a whole page, or the processor takes what it reads of one row for what it has just
written to another."""

TILE = ROWS * STRIDE

LINE = 64
"""Bytes: a vector that lies across two lines of the cache takes twice as long."""


def roundings(rank: int) -> int:
    """The most that a product is rounded on its way to an element of the delta, of `rank` products (a multiple of
    RANKS): within RANKS of them, then from sum to sum."""
    return RANKS + rank // RANKS


def intrinsic(function: Callable[..., Any]) -> Any:
    """As numba's, which is untyped."""
    return _intrinsic(function)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        compiled: Callable[..., Any] = njit(cache=True, **options)(function)
    except RuntimeError:  # there is nowhere to keep it
        compiled = njit(**options)(function)
    return compiled


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
def _larger(context: Any, most: Any, value: Any) -> Any:
    """The larger of `most` and the bits of an fp32 magnitude. In 32 bits: numba's own integers would be of 64, and
    halve what a vector holds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.and_(builder.bitcast(arguments[1], word), word(0x7FFFFFFF))
        return builder.select(builder.icmp_unsigned(">", bits, arguments[0]), bits, arguments[0])

    return types.uint32(types.uint32, types.float32), generate


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
# One function: a part in a function of its own is not compiled to the same instructions.
def add_rounded(before, b, a, exact_a, slack, after, tile):  # type: ignore[no-untyped-def]  # noqa: C901
    """Write after = before + b @ a, rounded to the nearest. before and after are [rows, in], b [rows, r] and a [r, in],
    r a multiple of RANKS; `tile` is room for TILE fp32 numbers.

    a is fp32, b fp32 or fp64, and no element of a row of their product in fp32 is off by more than `slack` [rows].
    Where the sum rounds alike with all errors taken off and added, so does the truth; elsewhere it is computed from b
    and exact_a, fp64 [in, r]. Returns the bits of the largest magnitude among the fp32 sums: those of infinity or NaN
    where one is not finite.
    """
    rows, width = before.shape
    factors = np.zeros((ROWS, len(a)), np.float32)
    words = np.zeros(COLUMNS // 8, np.uint64)  # the doubts of eight elements each
    doubtful = words.view(np.uint8)
    largest = np.uint32(0)
    for top in range(0, rows, ROWS):
        here = min(ROWS, rows - top)
        for i in range(here):
            for k in range(len(a)):
                factors[i, k] = b[top + i, k]
        for left in range(0, width, COLUMNS):
            columns = min(COLUMNS, width - left)
            for j in range(tile.size):
                tile[j] = 0
            for k in range(0, len(a), RANKS):
                _accumulate(factors, a, k, left, left + columns, tile)
            for i in range(here):
                row = top + i
                old, new = before[row, left : left + columns], after[row, left : left + columns]
                largest = max(largest, _round(old, tile[i * STRIDE :], slack[row], new, doubtful))
                for word in range(-(-columns // 8)):
                    if words[word]:
                        for j in range(word * 8, min(word * 8 + 8, columns)):
                            if doubtful[j]:
                                exact = 0.0  # the delta first: many small terms would be lost in a large weight
                                for k in range(exact_a.shape[1]):
                                    exact += np.float64(b[row, k]) * exact_a[left + j, k]
                                new[j] = _nearest(np.float64(_wide(old[j])) + exact, new[j])
    return largest


@_compiled
def round_to_nearest(exact, after):  # type: ignore[no-untyped-def]
    """fp64, finite, to the nearest of two bytes; both are flat."""
    for j in range(exact.size):
        after[j] = _nearest(exact[j], after[j])


@_compiled
def _accumulate(b, a, k, left, right, delta):  # type: ignore[no-untyped-def]
    """Add RANKS products from the k-th on to delta [ROWS, COLUMNS], flat, in the columns from left to right: written
    out, and apart from what it is part of, so that it is compiled to vector instructions."""
    b00, b01, b02, b03 = b[0, k], b[0, k + 1], b[0, k + 2], b[0, k + 3]
    b10, b11, b12, b13 = b[1, k], b[1, k + 1], b[1, k + 2], b[1, k + 3]
    b20, b21, b22, b23 = b[2, k], b[2, k + 1], b[2, k + 2], b[2, k + 3]
    b30, b31, b32, b33 = b[3, k], b[3, k + 1], b[3, k + 2], b[3, k + 3]
    a0, a1, a2, a3 = a[k, left:right], a[k + 1, left:right], a[k + 2, left:right], a[k + 3, left:right]
    for j in range(a0.size):
        x0, x1, x2, x3 = a0[j], a1[j], a2[j], a3[j]
        delta[j] += b00 * x0 + b01 * x1 + b02 * x2 + b03 * x3
        delta[STRIDE + j] += b10 * x0 + b11 * x1 + b12 * x2 + b13 * x3
        delta[2 * STRIDE + j] += b20 * x0 + b21 * x1 + b22 * x2 + b23 * x3
        delta[3 * STRIDE + j] += b30 * x0 + b31 * x1 + b32 * x2 + b33 * x3


@_compiled
def _round(before, delta, slack, after, doubtful):  # type: ignore[no-untyped-def]
    """A part of one row; apart for the same reason."""
    largest = np.uint32(0)
    for j in range(before.size):
        value = _wide(before[j]) + delta[j]
        error = abs(value) * TWICE + slack  # the sum's own rounding, and that of the two that follow
        low, high = _rounded(value - error, after[j]), _rounded(value + error, after[j])
        largest = _larger(largest, value)
        after[j], doubtful[j] = low, low != high
    return largest
