"""The weights of a folder as they lie on disk: which tensor is where, read and written as ranges of bytes.

Format: safetensors (github.com/huggingface/safetensors#format): eight bytes of header length, a JSON header of names,
dtypes, shapes and offsets, then the tensors without a gap. Nothing here knows torch, and no tensor is held whole.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from peftopt.errors import BadInput, MissingEnvironment
from peftopt.records import Json

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 1),
}
LONGEST_HEADER = 100_000_000
"""Bytes, as in the reference implementation: a longer header is an attack or garbage."""

FAULT_AROUND = 1 << 21
"""Bytes; at least as many as the kernel maps around a page that was asked for: on Linux a large folio, 2 MiB."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
"""PEFT's file; in a model's folder, transformers takes it as a request to load the adapter of that name."""

DIGEST_BYTES = 1 << 20
"""Read back at a time for a digest: stays in the processor's cache."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype in the format's words, and where its bytes start in which file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path = Path()
    start: int = 0

    @property
    def items(self) -> int:
        """How many numbers it holds; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes of the file it takes."""
        return self.items * ITEM_BYTES[self.dtype]


# ---- reading -------------------------------------------------------------------------------------


def read_header(file: Path) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of one file in the order of their bytes, and its metadata.

    Raises BadInput for anything the format forbids: a cut file, overlaps, gaps, unknown dtypes, a header too long.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(LONGEST_HEADER, size - 8):
                raise ValueError("its header is longer than the file" if size >= 8 else "it is empty or cut")
            header = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", None) or {}
        entries = [_entry(name, value, file, 8 + length) for name, value in header.items()]
        entries.sort(key=lambda e: (e.start, e.nbytes))
        end = 8 + length
        for entry in entries:
            if entry.start != end:
                raise ValueError(f"the bytes of {entry.name} overlap or leave a gap")
            end += entry.nbytes
        if end != size:
            raise ValueError(f"it has {size} bytes where its header says {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{file} is not a whole safetensors file: {error}", "copy or download it again") from error
    return entries, metadata


def _entry(name: str, value: Mapping[str, Json], file: Path, data: int) -> Entry:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if value["dtype"] not in ITEM_BYTES:
        raise ValueError(f"{name} has the unknown dtype {value['dtype']!r}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has a shape or offsets that are not counts")
    entry = Entry(name, value["dtype"], shape, file, data + begin)
    if entry.nbytes != end - begin:
        raise ValueError(f"{name} has {end - begin} bytes where its shape needs {entry.nbytes}")
    return entry


class Checkpoint:
    """The tensors of a model or adapter folder by name, and their bytes. Use as a context manager."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files: dict[str, list[Entry]] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.entries: dict[str, Entry] = {}
        self._handles: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file in files:
            entries, self.metadata[file.name] = read_header(file)
            self.files[file.name] = entries
            for entry in entries:
                if entry.name in self.entries:
                    other = self.entries[entry.name].file.name
                    raise BadInput(f"{entry.name} is in both {other} and {file.name}", "remove the stray file")
                self.entries[entry.name] = entry

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
        self._maps.clear()  # closed by whoever holds the last view

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, without the files' headers."""
        return sum(entry.nbytes for entry in self.entries.values())

    def read(self, entry: Entry, at: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from offset `at`. Safe from several threads at once.

        Raises BadInput for a file that became shorter meanwhile.
        """
        handle, position, left = self._handle(entry.file), entry.start + at, into
        while left:
            n = os.preadv(handle, [left], position)
            if not n:
                raise BadInput(f"{entry.file} became shorter while it was read", "do not change the base meanwhile")
            position, left = position + n, left[n:]

    def view(self, entry: Entry, at: int, nbytes: int) -> memoryview:
        """The tensor's bytes from offset `at`, mapped: no copy. `forget` them when they were used."""
        if entry.file not in self._maps:
            # Private and writable only because numba compiles anew for memory that it may not write to; nobody writes.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            whole = mmap.mmap(self._handle(entry.file), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            self._maps.setdefault(entry.file, whole)
        start = entry.start + at
        return memoryview(self._maps[entry.file])[start : start + nbytes]

    def forget(self, entry: Entry, at: int, nbytes: int) -> None:
        """Let go of the memory behind a view: the kernel's page cache keeps it, so that whoever still reads there gets
        it back. A little before it goes too, since each page fault brings in its neighbours (FAULT_AROUND)."""
        start, whole = entry.start + at, self._maps[entry.file]
        first = max(0, start // FAULT_AROUND - 1) * FAULT_AROUND
        whole.madvise(mmap.MADV_DONTNEED, first, min(start + nbytes + FAULT_AROUND, len(whole)) - first)

    def _handle(self, file: Path) -> int:
        if file not in self._handles:
            handle = os.open(file, os.O_RDONLY)
            if self._handles.setdefault(file, handle) != handle:
                os.close(handle)
        return self._handles[file]


def alike(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints agree in the middle of some matrices that both have in one form: sampled, not proven."""
    shared = sorted(n for n in one.entries.keys() & other.entries.keys() if _form(one, n) == _form(other, n))
    matrices = [name for name in shared if len(one.entries[name].shape) > 1]
    for name in matrices[:: max(1, len(matrices) // 16)]:
        entry = one.entries[name]
        samples = [bytearray(min(256, entry.nbytes)) for _ in range(2)]
        for source, into in zip((one, other), samples, strict=True):
            source.read(source.entries[name], (entry.nbytes - len(into)) // 2, memoryview(into))
        if samples[0] != samples[1]:
            return False
    return True


def _form(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...]]:
    return checkpoint.entries[name].dtype, checkpoint.entries[name].shape


def model_files(folder: Path) -> list[Path]:
    """The weight files that transformers would load: those of the index, or the single file.

    Others, such as a consolidated copy beside the shards, are not part of the model. Raises BadInput when the
    index names a file that is missing, when there are both, when an adapter's config lies there too, or when there
    is not a safetensors file.
    """
    if (folder / ADAPTER).is_file():
        raise BadInput(
            f"{folder} holds {ADAPTER} beside the model's weights, and transformers would load that adapter too",
            "move the adapter to a folder of its own, or remove the file if its weights are merged already",
        )
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{index} is not an index of shards: {error}", "copy or download it again") from error
        lacking = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if (folder / SINGLE).is_file() and SINGLE not in names:
            if lacking:  # transformers would load the single file, unless the index was the right one
                raise BadInput(
                    f"{folder} holds {SINGLE} and an index of other files, of which {lacking[0]} is not there",
                    f"if {SINGLE} is whole, the index is stale: remove {INDEX}; else copy the missing shards",
                )
            raise BadInput(
                f"{folder} holds two sets of weights: {SINGLE}, which transformers loads, and the files of {INDEX}",
                "remove the one that is not the model",
            )
        if lacking:
            raise BadInput(f"{index} names {lacking[0]}, which is not in the folder", "copy the missing shard")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        what = f"{len(files)} safetensors files and no {INDEX}" if files else "no safetensors weights"
        hint = "pickled weights (.bin, .pt) are never opened; convert with save_pretrained(safe_serialization=True)"
        raise BadInput(f"{folder} has {what}", hint)
    return files


def open_model(folder: Path) -> Checkpoint:
    """All weights of a model folder; raises BadInput when it is broken.

    What its files hold counts, as it does for transformers: of the index only which files they are. Indexes name tied
    heads that no file holds, and leave out tensors of other models.
    """
    return Checkpoint(model_files(folder))


# ---- writing -------------------------------------------------------------------------------------


@dataclass
class Draft:
    """A new checkpoint being written: every tensor has its place from the start and is filled in any order.

    `layout` maps a file's name to its tensors in order; where they are the same as in `like`, the header is copied
    byte for byte. Raises MissingEnvironment when the disk has too little room.
    """

    folder: Path
    layout: Mapping[str, Sequence[Entry]]
    like: Checkpoint
    entries: dict[str, Entry] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    _handles: dict[Path, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        check_room(self.folder, sum(e.nbytes for entries in self.layout.values() for e in entries))
        mode = 0o666
        for file in {entry.file for entry in self.like.entries.values()}:
            mode &= file.stat().st_mode | 0o600  # who may not read those, may not read these
        for name, wanted in self.layout.items():
            header = _header(name, wanted, self.like)
            placed, end = [], len(header)
            for entry in wanted:
                placed.append(Entry(entry.name, entry.dtype, entry.shape, self.folder / name, end))
                end += entry.nbytes
            handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            self._handles[self.folder / name] = handle
            os.pwrite(handle, header, 0)
            os.posix_fallocate(handle, 0, end)  # a third faster than letting the writes find their blocks
            self.entries |= {entry.name: entry for entry in placed}

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for file in self._handles:
                    self.settle(file)
        finally:
            for handle in self._handles.values():
                os.close(handle)
        if kind is None and len(self.layout) > 1:
            self._write_index()

    def settle(self, file: Path) -> None:
        """Wait until what was written to a file is on the disk; the more is there already, the shorter."""
        os.fsync(self._handles[file])

    def write(self, entry: Entry, at: int, data: memoryview) -> None:
        """Put bytes of a tensor at offset `at`. Safe from several threads at once."""
        handle, position, left = self._handles[entry.file], entry.start + at, data
        while left:
            n = os.pwrite(handle, left, position)
            position, left = position + n, left[n:]

    def read(self, entry: Entry, at: int, into: memoryview) -> None:
        """What was written, read back."""
        os.preadv(self._handles[entry.file], [into], entry.start + at)

    def hasher(self) -> Any:
        """XXH3-128, for the bytes of one tensor from its first to its last."""
        import xxhash

        return xxhash.xxh3_128()

    def digest(self, name: str) -> None:
        """Read a complete tensor back and note its XXH3-128 in `digests`: what any reader of its bytes will get."""
        entry, hasher, buffer = self.entries[name], self.hasher(), memoryview(bytearray(DIGEST_BYTES))
        for at in range(0, entry.nbytes, DIGEST_BYTES):
            block = buffer[: min(DIGEST_BYTES, entry.nbytes - at)]
            self.read(entry, at, block)
            hasher.update(block)
        self.digests[name] = hasher.hexdigest()

    def _write_index(self) -> None:
        total = sum(e.nbytes for e in self.entries.values())
        weight_map = {name: entry.file.name for name, entry in sorted(self.entries.items())}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (self.folder / INDEX).write_text(text + "\n", encoding="utf-8")


def check_room(folder: Path, needed: int) -> None:
    """Raises MissingEnvironment when the folder's disk has less than `needed` bytes and a little free."""
    disk = os.statvfs(folder)
    free, needed = disk.f_bavail * disk.f_frsize, needed + 2**24
    if free < needed:
        raise MissingEnvironment(
            f"the disk of {folder.resolve()} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed",
            "free some space or choose another --out",
        )


def _header(name: str, wanted: Sequence[Entry], like: Checkpoint) -> bytes:
    """The eight bytes and the JSON of a file's header, padded as the reference implementation does."""
    known = like.files.get(name)
    if known and [(e.name, e.dtype, e.shape) for e in known] == [(e.name, e.dtype, e.shape) for e in wanted]:
        with known[0].file.open("rb") as handle:
            return handle.read(known[0].start)
    header: dict[str, Json] = {"__metadata__": like.metadata.get(name) or {"format": "pt"}}
    end = 0
    for entry in wanted:
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
