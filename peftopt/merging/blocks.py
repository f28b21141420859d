"""Tensors from checkpoint to checkpoint in blocks of a million elements: little memory, one rounding.

A block is widened to fp32 in a buffer that stays in the processor's cache, given its delta by one `addmm_`, rounded
once to the output's dtype, checked for values that are not finite, and written to its place. The few elements that
fp32's own error could round the other way are computed again in fp64. A file that is complete settles on the disk
while the next one is made.
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
    import torch

BLOCK = 1 << 20
"""Elements in a block: 8 MB of buffers a thread. Half as many take a seventh longer, since threads wait for each other
at every call into torch; twice as many are little faster, and take more memory."""

PIECE = 1 << 26
"""Elements that one thread takes at a time, so that one huge embedding does not end as one thread's work. A tensor of
one piece gets its digest while its blocks are in the cache; others are read back."""


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype for the format's word. Raises KeyError for one that torch does not have."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }[name]


DOUBT = 2.0**-23
"""How far fp32 is taken to be off, in units of a block's largest weight, old or new: twice its unit roundoff."""

SLACK = 1.125
"""How much larger than the largest old weight of a block the largest new one may be, before the block is done again."""

FLOATS = ("F64", "F32", "F16", "BF16")


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
    """What is added to some rows of a weight, as one product b @ a of shapes [rows, r] and [r, in]: both in the dtype
    that the sum is computed in, and in fp64, `exact_a` as [in, r].

    The former have one rank more, of ones, which shifts the whole sum by what is put into b's last column. No element
    of the product is larger than `most`.
    """

    b: torch.Tensor
    a: torch.Tensor
    exact_b: np.ndarray
    exact_a: np.ndarray
    most: float = math.inf

    @classmethod
    def of(cls, pairs: Sequence[Pair], rows: range, dtype: torch.dtype) -> Delta:
        """All pairs as one: A stacked [sum of r, in], scale * B side by side [rows, sum of r].

        PEFT calls this combination "cat": the delta is the exact weighted sum of the adapters' deltas.
        """
        import torch

        a = torch.cat([read(p.adapter.weights, p.a).double() for p in pairs])
        b = torch.cat([read(p.adapter.weights, p.b, rows).double() * p.scale for p in pairs], dim=1)
        wide_a, wide_b = torch.ones(len(a) + 1, a.shape[1], dtype=dtype), torch.ones(len(b), len(a) + 1, dtype=dtype)
        wide_a[:-1], wide_b[:, :-1] = a, b
        most = float(b.norm(dim=1).max() * a.norm(dim=0).max())  # Cauchy and Schwarz
        return cls(wide_b, wide_a, b.numpy(), a.t().contiguous().numpy(), most)

    def rows(self, start: int, stop: int) -> Delta:
        return Delta(self.b[start:stop], self.a, self.exact_b[start:stop], self.exact_a, self.most)

    def add_to(self, weight: torch.Tensor, shift: float) -> None:
        """weight += b @ a + shift, in the weight's dtype."""
        self.b[:, -1] = shift
        weight.addmm_(self.b, self.a)

    def norm(self) -> float:
        """Its Frobenius norm."""
        return float((self.b[:, :-1] @ self.a[:-1]).norm())

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Single elements of it, in fp64."""
        import numpy as np

        found: np.ndarray = np.einsum("ij,ij->i", self.exact_b[rows], self.exact_a[columns])
        return found


class Blocks:
    """The loops. `threads` work side by side, each with its own buffers; torch's own threads rest during a transfer."""

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
        import torch

        own = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from self._transfer(base, draft, entries, pairs, norms)
        finally:
            torch.set_num_threads(own)

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
        import torch

        width = row_width(entry)
        target = draft.entries[entry.name]
        delta = Delta.of(pairs, piece, _wide(entry)) if pairs else None
        changed, squares = False, (0.0, 0.0)
        hasher = draft.hasher() if len(piece) * width == entry.items else None
        rows, size = max(1, BLOCK // max(1, width)), ITEM_BYTES[entry.dtype]
        for start in range(piece.start, piece.stop, rows):
            at, nbytes = start * width * size, min(rows, piece.stop - start) * width * size
            raw = out = torch.frombuffer(base.view(entry, at, nbytes), dtype=torch.uint8)
            if entry.dtype in FLOATS:
                own = delta and delta.rows(start - piece.start, start - piece.start + rows)
                out, changed, block = self._add(entry, target, raw, own, width, norms, changed)
                squares = squares[0] + block[0], squares[1] + block[1]
            draft.write(target, start * width * ITEM_BYTES[target.dtype], out.numpy().data)
            if hasher:
                hasher.update(out.numpy().data)
            base.forget(entry, at, nbytes)
        if hasher:
            draft.digests[entry.name] = hasher.hexdigest()
        return changed, squares

    def _add(
        self, entry: Entry, target: Entry, raw: Any, delta: Delta | None, width: int, norms: bool, changed: bool
    ) -> tuple[Any, bool, tuple[float, float]]:
        """One block, as bytes: widened, the delta added, rounded once, checked. Whether one of the tensor's blocks has
        `changed` so far is not asked again of the others."""
        import torch

        if raw.data_ptr() % ITEM_BYTES[entry.dtype]:
            raw = raw.clone()  # tensors may start anywhere in a file
        before = raw.view(dtype_of(entry.dtype))
        if delta is None and entry.dtype == target.dtype:
            check_finite(before, entry.name)
            return raw, changed, (0.0, 0.0)
        wide = self._buffer("wide", len(before) * _wide(entry).itemsize).view(_wide(entry))
        out = self._buffer("out", len(before) * ITEM_BYTES[target.dtype])
        after, squares = out.view(dtype_of(target.dtype)), (0.0, 0.0)
        if delta is None or after.itemsize != 2:
            wide.copy_(before)
            if delta is not None:
                delta.add_to(wide.view(-1, width), 0.0)
            after.copy_(wide)
            check_finite(after, entry.name)
        else:
            self._round_sum(entry.name, before, delta, wide, after, width)
        if delta is not None and norms:
            squares = delta.norm() ** 2, float(before.to(wide.dtype).norm()) ** 2
        changed = changed or entry.dtype != target.dtype or not torch.equal(before, after)
        return out, changed, squares

    def _round_sum(self, name: str, before: Any, delta: Delta, wide: Any, after: Any, width: int) -> None:
        """The nearest to before + delta in the dtype of `after`, which is of two bytes; `wide` is there to compute in.

        Two sums are rounded, one that is less than the true one by more than fp32's error, and one that is more. Where
        they round alike, so does the truth; the few others are computed in fp64. The error is one of the terms, so it
        is large for sums in which large terms cancel.
        """
        import torch

        bound = largest(before)
        while True:
            doubt = DOUBT * SLACK * bound
            wide.copy_(before)
            delta.add_to(wide.view(-1, width), -doubt)
            after.copy_(wide)
            if bound + delta.most <= min(SLACK * bound, torch.finfo(after.dtype).max):
                break  # nothing can have outgrown it, or be infinite: nobody has to look
            if (most := check_finite(after, name)) <= SLACK * bound:
                break
            bound = most
        above = self._buffer("above", len(wide) * after.itemsize).view(after.dtype).copy_(wide.add_(2 * doubt))
        at = _differing(after.view(torch.int16).numpy(), above.view(torch.int16).numpy())
        exact = before[torch.from_numpy(at)].double().numpy() + delta.at(at // width, at % width)
        after[torch.from_numpy(at)] = torch.from_numpy(rounded_to_odd(exact)).to(after.dtype)

    def _buffer(self, name: str, nbytes: int) -> Any:
        """A byte tensor of this thread, allocated once and used again for every block."""
        import torch

        have = getattr(self._local, name, None)
        if have is None or len(have) < nbytes:
            have = torch.empty(max(nbytes, BLOCK * 4), dtype=torch.uint8)
            setattr(self._local, name, have)
        return have[:nbytes]

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
        block = flat[at : at + BLOCK]
        size = ITEM_BYTES[target.dtype]
        out = self._buffer("out", len(block) * size)
        after = out.view(dtype_of(target.dtype))
        after.copy_(block)
        check_finite(after, target.name)
        draft.write(target, at * size, out.numpy().data)


def _differing(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where two arrays of two bytes an element differ. Few do, so they are looked for four at a time, and one at a time
    in the words that differ."""
    import numpy as np

    whole = len(one) // 4 * 4
    words = np.flatnonzero(one[:whole].view(np.int64) != other[:whole].view(np.int64))
    at = np.concatenate([(words[:, None] * 4 + np.arange(4)).ravel(), np.arange(whole, len(one))])
    found: np.ndarray = at[one[at] != other[at]]
    return found


def row_width(entry: Entry) -> int:
    """Elements of a row: a matrix goes by rows, anything else is one long row of single elements."""
    return entry.shape[-1] if len(entry.shape) == 2 and entry.shape[-1] else 1


def _wide(entry: Entry) -> torch.dtype:
    """What a tensor is computed in."""
    import torch

    return torch.float64 if entry.dtype == "F64" else torch.float32


def _pieces(entry: Entry) -> Iterator[range]:
    """The rows of a tensor in pieces of about PIECE elements."""
    width = row_width(entry)
    total, step = entry.items // width, max(1, PIECE // width)
    for start in range(0, total, step):
        yield range(start, min(start + step, total))


def read(source: Checkpoint | Draft, entry: Entry, rows: range | None = None) -> Any:
    """A tensor, or some rows of a matrix, in its own dtype."""
    import torch

    width = row_width(entry)
    rows = range(entry.items // width) if rows is None else rows
    size = ITEM_BYTES[entry.dtype]
    data = torch.empty(len(rows) * width * size, dtype=torch.uint8)
    source.read(entry, rows.start * width * size, data.numpy().data)
    shape = entry.shape if len(rows) * width == entry.items else (len(rows), width)
    return data.view(dtype_of(entry.dtype)).view(shape)


def rounded_to_odd(exact: np.ndarray) -> np.ndarray:
    """fp64 to fp32 in such a way that rounding it to a half precision gives the nearest to the fp64 value. torch's own
    way through fp32 rounds a near tie twice (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums").
    """
    import numpy as np

    with np.errstate(over="ignore"):
        single = exact.astype(np.float32)
    past = np.abs(single) > np.abs(exact)
    bits: np.ndarray = (single.view(np.int32) - past) | (single != exact)
    return bits.view(np.float32)


def largest(values: torch.Tensor) -> float:
    """The largest magnitude; infinite or NaN where one of the values is.

    The bits of floats, read as integers, lie in the order of the magnitudes on either side of zero, and are looked
    through at half the cost: signed for the largest positive one, unsigned for the largest negative one.
    """
    import numpy as np
    import torch

    if not values.numel():
        return 0.0
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    signed = values.view(whole).numpy()
    unsigned = int(signed.view(f"u{values.itemsize}").max())
    bits = max(int(signed.max()), unsigned & torch.iinfo(whole).max)
    return float(torch.from_numpy(np.array([bits], dtype=signed.dtype)).view(values.dtype))


def check_finite(values: torch.Tensor, name: str) -> float:
    """The largest magnitude. Raises BadInput when a weight is NaN or infinite."""
    if not values.is_floating_point():
        return 0.0
    if not math.isfinite(most := largest(values)):
        raise BadInput(
            f"the weight {name} holds NaN or infinity",
            "the base or the adapter is broken, or the adapter's scaling is too large for the dtype: check them",
        )
    return most


def threads() -> int:
    """As many as the machine gives, and no more than four: beyond that the disk is the limit."""
    return min(4, machine.threads())
