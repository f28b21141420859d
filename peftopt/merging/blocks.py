"""Tensors from checkpoint to checkpoint in blocks of a quarter of a million elements: little memory, one rounding.

A compiled loop (kernel.py) makes the product of B and A in fp32, adds the weight, rounds once to the output's dtype,
and computes in fp64 the few elements that fp32's own error could round the other way. A block is checked for values
that no training leaves behind, and written to its place; it settles on the disk while more are made. Nothing here loads
torch, but for what `put` is given.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftopt import machine
from peftopt.errors import BadInput
from peftopt.merging.lanes import Lanes
from peftopt.models.adapter import Pair
from peftopt.models.checkpoint import ITEM_BYTES, Checkpoint, Draft, Entry
from peftopt.models.values import FLOATS, dtype_of, largest, wrong

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 18
"""Elements in a block: what is read and written of it stays in the second-level cache, and a thread is busy with it for
long enough, since threads wait for each other in between."""

PIECE = 1 << 26
"""Elements that one thread takes at a time, so that one huge embedding does not end as one thread's work. A tensor of
one piece gets its digest while its blocks are in the cache; others are read back."""

HELD = 1 << 23
"""Bytes of the base that stay mapped before a thread lets go of them."""

SETTLED = 1 << 27
"""Bytes written to a file before the disk is waited for, beside the work: so there is little to wait for at the end."""

HALVES = {"F16": "int16", "BF16": "uint16"}
"""The dtypes of two bytes, and as what their bits go to the compiled loop."""

OVERFLOW = {"F16": 0x477FF000, "BF16": 0x7F7F8000}
"""The bits of the smallest fp32 magnitude that is rounded to infinity."""


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
    """What is added to some rows of a weight, as one product b @ a of shapes [rows, r] and [r, in], r a multiple of the
    loop's. `b` as the adapter has it, in fp32 if that holds it; `a` in fp32, with the adapter's scale; `exact_a` the
    same in fp64, as [in, r]; `slack` is how far each row [rows] of the product in fp32 may be off."""

    b: np.ndarray
    a: np.ndarray
    exact_a: np.ndarray
    slack: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[Pair], rows: range) -> Delta:
        """All pairs as one: scale * A stacked [sum of r, in], B side by side [rows, sum of r].

        PEFT calls this combination "cat": the delta is the exact weighted sum of the adapters' deltas.
        """
        import numpy as np

        a = [read(p.adapter.weights, p.a).astype(np.float64) * p.scale for p in pairs]
        b = [_widened(read(p.adapter.weights, p.b, rows)) for p in pairs]
        return cls.product(np.hstack(b) if len(b) > 1 else b[0], np.vstack(a))

    @classmethod
    def product(cls, b: np.ndarray, a: np.ndarray) -> Delta:
        """Of b in fp32 or fp64, and a in fp64. The error is bounded by |b| |a|, and that by Cauchy and Schwarz: the
        roundings of the loop's sums, one each for b and a, and three to spare (Higham, "Accuracy and Stability of
        Numerical Algorithms", 3.1)."""
        import numpy as np

        from peftopt.merging.kernel import RANKS, UNIT, roundings

        if more := -len(a) % RANKS:
            b, a = np.pad(b, ((0, 0), (0, more))), np.pad(a, ((0, more), (0, 0)))
        fast = aligned(a.shape, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found in the sums
            fast[...] = a
            rows = np.einsum("ij,ij->i", b, b, dtype=np.float64)  # squares that fp32 would lose
            most = np.sqrt(rows * np.einsum("ij,ij->j", a, a).max(initial=0.0))
            slack = ((roundings(len(a)) + 5) * UNIT * most).astype(np.float32)
        return cls(b, fast, np.ascontiguousarray(a.T), slack)

    def rows(self, start: int, stop: int) -> Delta:
        """The part of the delta that is added to the rows from `start` to `stop`; views, not copies."""
        return Delta(self.b[start:stop], self.a, self.exact_a, self.slack[start:stop])

    def whole(self) -> np.ndarray:
        """In fp64, [rows, in]."""
        product: np.ndarray = self.b.astype(self.exact_a.dtype) @ self.exact_a.T
        return product


class Blocks:
    """The loops. `threads` work side by side, each with its own buffers; those of the matrix library rest."""

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self._local = threading.local()

    def __enter__(self) -> Blocks:
        self._lanes, self._settler = Lanes(self.threads), ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._lanes.close()
        self._settler.shutdown(cancel_futures=True)

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

        `pairs` maps a tensor's name to the pairs that add up. Yields tensors as they are finished, in any order. Raises
        BadInput naming the first that comes out with a value that no training leaves behind: see models/values.py.
        """
        targets, jobs = [], []
        for entry in entries:
            for piece in _pieces(entry):
                targets.append(draft.entries[entry.name])
                jobs.append(partial(self._piece, base, draft, entry, piece, pairs.get(entry.name, ()), norms))
        futures = self._lanes.submit((t.file, job) for t, job in zip(targets, jobs, strict=True))
        running = dict(zip(futures, targets, strict=True))
        left, unsettled, settling = Counter(t.name for t in running.values()), Counter[Path](), []
        pieces: dict[str, list[tuple[bool, tuple[float, float]]]] = defaultdict(list)
        for done in as_completed(running):
            target = running[done]
            pieces[target.name].append(done.result())
            left[target.name] -= 1
            if left[target.name]:
                continue
            if target.name not in draft.digests:
                settling.append(self._settler.submit(draft.digest, target.name))
            unsettled[target.file] += target.nbytes
            if unsettled[target.file] > SETTLED:
                settling.append(self._settler.submit(draft.settle, target.file))
                unsettled[target.file] = 0
            changed, squares = zip(*pieces.pop(target.name), strict=True)
            both = [math.sqrt(sum(each)) for each in zip(*squares, strict=True)] if norms else ()
            yield Written(target.name, any(changed), *both)
        for settled in settling:
            settled.result()

    def _piece(
        self, base: Checkpoint, draft: Draft, entry: Entry, piece: range, pairs: Sequence[Pair], norms: bool
    ) -> tuple[bool, tuple[float, float]]:
        """Rows `piece` of a tensor; whether anything changed, and the sums of squares of delta and weight."""
        import numpy as np

        width = row_width(entry)
        target = draft.entries[entry.name]
        delta = Delta.of(pairs, piece) if pairs else None
        changed, squares = entry.dtype != target.dtype, (0.0, 0.0)
        hasher = draft.hasher() if len(piece) * width == entry.items else None
        rows, size, held = max(1, BLOCK // max(1, width)), ITEM_BYTES[entry.dtype], 0
        for start in range(piece.start, piece.stop, rows):
            at, nbytes = start * width * size, min(rows, piece.stop - start) * width * size
            raw = out = np.asarray(base.view(entry, at, nbytes))
            if entry.dtype in FLOATS:
                before = (raw.copy() if raw.ctypes.data % size else raw).view(dtype_of(entry.dtype)).reshape(-1, width)
                if delta is None:
                    out = before if entry.dtype == target.dtype else narrowed(before, target.dtype)
                    check_values(out, entry)
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
        """The sum before + delta, [rows, in], in the dtype of `target`: rounded once, checked; two bytes as bits."""
        import numpy as np

        if target.dtype in HALVES and entry.dtype != "F64":
            return self._round_sum(entry, target, before, delta)
        if "F64" in (entry.dtype, target.dtype):
            out = narrowed(before.astype(np.float64) + delta.whole(), target.dtype)
        else:
            out = before.astype(np.float32) + delta.b.astype(np.float32) @ delta.a
        check_values(out, entry)
        return out.view(HALVES.get(target.dtype, out.dtype))

    def _round_sum(self, entry: Entry, target: Entry, before: np.ndarray, delta: Delta) -> np.ndarray:
        """The same for two bytes, to the nearest: see kernel.add_rounded."""
        import numpy as np

        from peftopt.merging import kernel

        given = before.view(HALVES[entry.dtype]) if entry.dtype in HALVES else before
        after = self._buffer("after", before.shape, HALVES[target.dtype])
        tile = self._buffer("tile", (kernel.TILE,), "float32")
        most = kernel.add_rounded(given, delta.b, delta.a, delta.exact_a, delta.slack, after, tile)
        largest_sum = float(np.array([most], np.uint32).view(np.float32)[0])
        _check(entry, math.inf if most >= OVERFLOW[target.dtype] else largest_sum)
        return after

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of this thread, whose memory is used again for every block."""
        import numpy as np

        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        have = getattr(self._local, name, None)
        if have is None or len(have) < nbytes:
            have = aligned((nbytes,), np.uint8)
            setattr(self._local, name, have)
        view: np.ndarray = have[:nbytes].view(dtype).reshape(shape)
        return view

    # ---- whole tensors -----------------------------------------------------------------------

    def put(self, draft: Draft, name: str, tensor: Any) -> None:
        """Write a whole tensor to its place, rounded once to the dtype that the draft has for it. Raises BadInput where
        its shape is another, or a value is one that no training leaves behind."""
        target = draft.entries[name]
        if tuple(tensor.shape) != target.shape:
            raise BadInput(f"{name} came out as {list(tensor.shape)}, its place is {list(target.shape)}")
        flat = tensor.contiguous().view(-1)
        blocks = (partial(self._put_block, draft, target, flat, at) for at in range(0, len(flat), BLOCK))
        for done in self._lanes.submit((target.file, block) for block in blocks):
            done.result()
        draft.digest(name)

    def _put_block(self, draft: Draft, target: Entry, flat: Any, at: int) -> None:
        import torch

        dtype = dtype_of(target.dtype)
        after = flat[at : at + BLOCK].to(getattr(torch, dtype.name)).view(torch.uint8).numpy()
        if target.dtype in FLOATS:
            check_values(after.view(dtype), target)
        draft.write(target, at * dtype.itemsize, after.data)


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that begins with a line of the cache."""
    import numpy as np

    from peftopt.merging.kernel import LINE

    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    spare = np.empty(nbytes + LINE, np.uint8)
    start = -spare.ctypes.data % LINE
    view: np.ndarray = spare[start : start + nbytes].view(dtype).reshape(shape)
    return view


def _widened(values: np.ndarray) -> np.ndarray:
    """Exactly, in fp32 or fp64."""
    import numpy as np

    return values if values.dtype == np.float64 else values.astype(np.float32)


def row_width(entry: Entry) -> int:
    """Elements of a row: a matrix goes by rows, anything else is one long row of single elements."""
    return entry.shape[-1] if len(entry.shape) == 2 and entry.shape[-1] else 1


def _pieces(entry: Entry) -> Iterator[range]:
    """The rows of a tensor in pieces of about PIECE elements; of an empty one, one without rows."""
    width = row_width(entry)
    total, step = entry.items // width, max(1, PIECE // width)
    for start in range(0, max(1, total), step):
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

    values = read(source, entry)
    return torch.from_numpy(values.reshape(-1).view(np.uint8)).view(getattr(torch, values.dtype.name)).view(entry.shape)


def narrowed(exact: np.ndarray, name: str) -> np.ndarray:
    """Rounded once to the format's dtype of this name; what is NaN or infinite stays so. numpy casts fp64 to a half
    precision through fp32, and so rounds a near tie twice."""
    import numpy as np

    from peftopt.merging import kernel

    if name not in HALVES or exact.dtype != np.float64 or not math.isfinite(largest(exact)):
        with np.errstate(over="ignore"):
            return exact.astype(dtype_of(name))
    after = np.empty(exact.shape, HALVES[name])
    kernel.round_to_nearest(exact.reshape(-1), after.reshape(-1))
    return after.view(dtype_of(name))


def check_values(values: np.ndarray, entry: Entry) -> None:
    """Raises BadInput when one of a tensor's values is one that no training leaves behind."""
    _check(entry, largest(values))


def _check(entry: Entry, most: float) -> None:
    if problem := wrong(entry, most):
        raise BadInput(
            f"the weight {entry.name} {problem}",
            "the base's file is damaged: copy or download it again; or the adapter's scaling is too large",
        )


def threads() -> int:
    """As many as the machine gives, and no more than four: beyond that the disk is the limit."""
    return min(4, machine.threads())
