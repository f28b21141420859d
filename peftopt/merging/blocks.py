"""Tensors from checkpoint to checkpoint in blocks of a quarter of a million elements: little memory, one rounding.

Of some rows of a block, the product of B and A is made in fp32; then a compiled loop (kernel.py) adds the weight,
rounds once to the output's dtype, and computes in fp64 the few elements that fp32's own error could round the other
way. A block is checked for values that are not finite, and written to its place; a file that is complete settles on the
disk while the next one is made. Nothing here loads torch, but for what `put` is given.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftopt import machine
from peftopt.adapter import Pair
from peftopt.checkpoint import ITEM_BYTES, Checkpoint, Draft, Entry
from peftopt.errors import BadInput

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 18
"""Elements in a block: what is read and written of it stays in the second-level cache, and a thread is busy with it for
long enough, since threads wait for each other in between."""

STRIP = 1 << 17
"""Elements of a block that are worked on at a time: rows whose product stays in the second-level cache."""

PIECE = 1 << 26
"""Elements that one thread takes at a time, so that one huge embedding does not end as one thread's work. A tensor of
one piece gets its digest while its blocks are in the cache; others are read back."""

HELD = 1 << 23
"""Bytes of the base that stay mapped before a thread lets go of them."""

FLOATS = ("F64", "F32", "F16", "BF16")
HALVES = {"F16": "int16", "BF16": "uint16"}
"""The dtypes of two bytes, and as what their bits go to the compiled loop."""


def dtype_of(name: str) -> np.dtype[Any]:
    """numpy's dtype for the format's word, from ml_dtypes where numpy has none; `.name` is torch's word for it. Raises
    KeyError for one that neither has."""
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
    found: np.dtype[Any] = np.dtype(known[name])
    return found


@dataclass(frozen=True)
class Written:
    """One tensor of the new checkpoint: whether any value differs from the base's, and the norms ‖delta‖ and ‖W‖
    (Frobenius) where they were asked for."""

    name: str
    changed: bool
    delta_norm: float | None = None
    weight_norm: float | None = None


@dataclass(frozen=True)
class Delta:
    """What is added to some rows of a weight, as one product b @ a of shapes [rows, r] and [r, in]: in fp32; in fp64,
    `exact_a` as [in, r]; and how far each row [rows] of the fp32 product may be off."""

    b: np.ndarray
    a: np.ndarray
    exact_b: np.ndarray
    exact_a: np.ndarray
    slack: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[Pair], rows: range, width: int) -> Delta:
        """All pairs as one: A stacked [sum of r, in], scale * B side by side [rows, sum of r].

        PEFT calls this combination "cat": the delta is the exact weighted sum of the adapters' deltas.
        """
        import numpy as np

        a = [read(p.adapter.weights, p.a).astype(np.float64) for p in pairs]
        b = [read(p.adapter.weights, p.b, rows).astype(np.float64) * p.scale for p in pairs]
        return cls.product(np.hstack([np.empty((len(rows), 0)), *b]), np.vstack([np.empty((0, width)), *a]))

    @classmethod
    def product(cls, b: np.ndarray, a: np.ndarray) -> Delta:
        """Of two fp64 matrices. Its error is bounded by |b| |a|, and that by Cauchy and Schwarz: r roundings for a sum
        of r products in any order, one each for b and a, and three to spare (Higham, "Accuracy and Stability of
        Numerical Algorithms", 3.1)."""
        import numpy as np

        from peftopt.merging.kernel import UNIT

        most = np.linalg.norm(b, axis=1) * np.linalg.norm(a, axis=0).max(initial=0.0)
        with np.errstate(over="ignore"):  # what is not finite is found in the sums
            slack = ((len(a) + 5) * UNIT * most).astype(np.float32)
            return cls(b.astype(np.float32), a.astype(np.float32), b, np.ascontiguousarray(a.T), slack)

    def rows(self, start: int, stop: int) -> Delta:
        return Delta(self.b[start:stop], self.a, self.exact_b[start:stop], self.exact_a, self.slack[start:stop])

    def whole(self) -> np.ndarray:
        """In fp64, [rows, in]."""
        found: np.ndarray = self.exact_b @ self.exact_a.T
        return found


class Blocks:
    """The loops. `threads` work side by side, each with its own buffers; those of the matrix library rest."""

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self._local = threading.local()

    def __enter__(self) -> Blocks:
        self._pool, self._settler = ThreadPoolExecutor(self.threads), ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._pool, self._settler):
            pool.shutdown(cancel_futures=True)

    # ---- the jobs ----------------------------------------------------------------------------

    def transfer(
        self,
        base: Checkpoint,
        draft: Draft,
        entries: Sequence[Entry],
        pairs: Mapping[str, Sequence[Pair]],
        norms: bool = False,
    ) -> Iterator[Written]:
        """Bring these tensors of the base into the draft, those named in `pairs` with their LoRA deltas added.

        `pairs` maps a tensor's name to the pairs that add up. Raises BadInput naming the first tensor that comes
        out with a value that is not finite.
        """
        import numpy  # noqa: F401 (brings the matrix library, whose threads would get into each other's way)
        import threadpoolctl

        with threadpoolctl.threadpool_limits(1, "blas"):
            yield from self._transfer(base, draft, entries, pairs, norms)

    def _transfer(
        self,
        base: Checkpoint,
        draft: Draft,
        entries: Sequence[Entry],
        pairs: Mapping[str, Sequence[Pair]],
        norms: bool,
    ) -> Iterator[Written]:
        jobs = []
        for entry in entries:
            deltas = pairs.get(entry.name, ())
            pieces = list(_pieces(entry))
            jobs.append((entry, [self._pool.submit(self._piece, base, draft, entry, p, deltas, norms) for p in pieces]))
        left = Counter(draft.entries[entry.name].file for entry in entries)
        settling = []
        for entry, running in jobs:
            found = [piece.result() for piece in running]
            delta, weight = (sum(squares[side] for _, squares in found) ** 0.5 for side in (0, 1))
            norms_found = (delta, weight) if norms else (None, None)
            yield Written(entry.name, any(changed for changed, _ in found), *norms_found)
            if entry.name not in draft.digests:
                settling.append(self._settler.submit(draft.digest, entry.name))
            left[file := draft.entries[entry.name].file] -= 1
            if not left[file]:
                settling.append(self._settler.submit(draft.settle, file))
        for done in settling:
            done.result()

    def _piece(
        self, base: Checkpoint, draft: Draft, entry: Entry, piece: range, pairs: Sequence[Pair], norms: bool
    ) -> tuple[bool, tuple[float, float]]:
        """Rows `piece` of a tensor; whether anything changed, and the sums of squares of delta and weight."""
        import numpy as np

        width = row_width(entry)
        target = draft.entries[entry.name]
        delta = Delta.of(pairs, piece, width) if pairs or entry.dtype != target.dtype else None
        changed, squares = entry.dtype != target.dtype, (0.0, 0.0)
        hasher = draft.hasher() if len(piece) * width == entry.items else None
        rows, size, held = max(1, BLOCK // max(1, width)), ITEM_BYTES[entry.dtype], 0
        for start in range(piece.start, piece.stop, rows):
            at, nbytes = start * width * size, min(rows, piece.stop - start) * width * size
            raw = out = np.asarray(base.view(entry, at, nbytes))
            if entry.dtype in FLOATS:
                before = (raw.copy() if raw.ctypes.data % size else raw).view(dtype_of(entry.dtype)).reshape(-1, width)
                if delta is None:
                    check_finite(before, entry.name)
                else:
                    own = delta.rows(start - piece.start, start - piece.start + len(before))
                    out = self._sum(entry, target, before, own)
                    # Whether one of the tensor's blocks has changed is not asked again of the others.
                    changed = changed or not np.array_equal(out, before.view(out.dtype))
                    if norms:
                        parts = np.linalg.norm(own.whole()), np.linalg.norm(before.astype(np.float64))
                        squares = squares[0] + float(parts[0]) ** 2, squares[1] + float(parts[1]) ** 2
            written = out.reshape(-1).view(np.uint8).data
            draft.write(target, start * width * ITEM_BYTES[target.dtype], written)
            if hasher:
                hasher.update(written)
            held += nbytes
            if held >= HELD or start + rows >= piece.stop:
                base.forget(entry, at + nbytes - held, held)
                held = 0
        if hasher:
            draft.digests[entry.name] = hasher.hexdigest()
        return changed, squares

    def _sum(self, entry: Entry, target: Entry, before: np.ndarray, delta: Delta) -> np.ndarray:
        """before + delta [rows, in] in the dtype of `target`, rounded once, checked; two bytes as their bits."""
        import numpy as np

        if target.dtype in HALVES and entry.dtype != "F64":
            return self._round_sum(entry, target, before, delta)
        if "F64" in (entry.dtype, target.dtype):
            exact = before.astype(np.float64) + delta.whole()
            check_finite(exact, entry.name)
            out = narrowed(exact, target.dtype)
        else:
            out = before.astype(np.float32) + delta.b @ delta.a
        check_finite(out, entry.name)
        return out.view(HALVES.get(target.dtype, out.dtype))

    def _round_sum(self, entry: Entry, target: Entry, before: np.ndarray, delta: Delta) -> np.ndarray:
        """The same for two bytes, to the nearest: see kernel.add_rounded."""
        import numpy as np

        from peftopt.merging import kernel

        given = before.view(HALVES[entry.dtype]) if entry.dtype in HALVES else before
        after, most = self._buffer("after", before.shape, HALVES[target.dtype]), np.uint32(0)
        rows, width = before.shape
        step = max(1, STRIP // max(1, width))
        for at in range(0, rows, step):
            some = delta.rows(at, at + step)
            product = np.matmul(some.b, some.a, out=self._buffer("product", (len(some.b), width), np.float32))
            strip = slice(at, at + step)
            largest = kernel.add_rounded(given[strip], product, some.slack, some.exact_b, some.exact_a, after[strip])
            most = max(most, largest)
        with np.errstate(over="ignore"):
            check_finite(np.array([most], np.uint32).view(np.float32).astype(dtype_of(target.dtype)), entry.name)
        return after

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of this thread, whose memory is used again for every block."""
        import numpy as np

        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        have = getattr(self._local, name, None)
        if have is None or len(have) < nbytes:
            have = np.empty(nbytes, np.uint8)
            setattr(self._local, name, have)
        found: np.ndarray = have[:nbytes].view(dtype).reshape(shape)
        return found

    # ---- whole tensors -----------------------------------------------------------------------

    def put(self, draft: Draft, name: str, tensor: Any) -> None:
        """Write a whole tensor to its place, rounded once to the dtype that the draft has for it."""
        target = draft.entries[name]
        if tuple(tensor.shape) != target.shape:
            raise BadInput(f"{name} came out as {list(tensor.shape)}, its place is {list(target.shape)}")
        flat = tensor.contiguous().view(-1)
        list(self._pool.map(lambda at: self._put_block(draft, target, flat, at), range(0, len(flat), BLOCK)))
        draft.digest(name)

    def _put_block(self, draft: Draft, target: Entry, flat: Any, at: int) -> None:
        import torch

        dtype = dtype_of(target.dtype)
        after = flat[at : at + BLOCK].to(getattr(torch, dtype.name)).view(torch.uint8).numpy()
        if target.dtype in FLOATS:
            check_finite(after.view(dtype), target.name)
        draft.write(target, at * dtype.itemsize, after.data)


def row_width(entry: Entry) -> int:
    """Elements of a row: a matrix goes by rows, anything else is one long row of single elements."""
    return entry.shape[-1] if len(entry.shape) == 2 and entry.shape[-1] else 1


def _pieces(entry: Entry) -> Iterator[range]:
    """The rows of a tensor in pieces of about PIECE elements."""
    width = row_width(entry)
    total, step = entry.items // width, max(1, PIECE // width)
    for start in range(0, total, step):
        yield range(start, min(start + step, total))


def read(source: Checkpoint | Draft, entry: Entry, rows: range | None = None) -> np.ndarray:
    """A tensor, or some rows of a matrix, in its own dtype."""
    import numpy as np

    width = row_width(entry)
    rows = range(entry.items // width) if rows is None else rows
    size = ITEM_BYTES[entry.dtype]
    data = np.empty(len(rows) * width * size, np.uint8)
    source.read(entry, rows.start * width * size, data.data)
    shape = entry.shape if len(rows) * width == entry.items else (len(rows), width)
    return data.view(dtype_of(entry.dtype)).reshape(shape)


def read_tensor(source: Checkpoint | Draft, entry: Entry) -> Any:
    """A tensor as torch's, in its own dtype."""
    import numpy as np
    import torch

    found = read(source, entry)
    return torch.from_numpy(found.reshape(-1).view(np.uint8)).view(getattr(torch, found.dtype.name)).view(entry.shape)


def narrowed(exact: np.ndarray, name: str) -> np.ndarray:
    """fp64, finite, rounded once to the format's dtype of this name. numpy casts to a half precision through fp32, and
    so rounds a near tie twice."""
    import numpy as np

    from peftopt.merging import kernel

    if name not in HALVES:
        with np.errstate(over="ignore"):
            return exact.astype(dtype_of(name))
    after = np.empty(exact.shape, HALVES[name])
    kernel.round_to_nearest(exact.reshape(-1), after.reshape(-1))
    return after.view(dtype_of(name))


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


def check_finite(values: np.ndarray, name: str) -> None:
    """Raises BadInput when a weight is NaN or infinite."""
    if not math.isfinite(largest(values)):
        raise BadInput(
            f"the weight {name} holds NaN or infinity",
            "the base or the adapter is broken, or the adapter's scaling is too large for the dtype: check them",
        )


def threads() -> int:
    """As many as the machine gives, and no more than four: beyond that the disk is the limit."""
    return min(4, machine.threads())
