"""Pages of libraries that a copy would lack: Linux leaves the read-only pages of files out of a copy's page tables.

They come back one by one when they are used. Until then a copy's resident memory is smaller than that of a process
from nothing, by 80 MB of PyTorch's code, and its first requests wait for page faults.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

PAGE = mmap.PAGESIZE
ENTRY_BYTES = 8
"""Of a page in pagemap; its highest bit says that the page is there (docs.kernel.org/admin-guide/mm/pagemap.html)."""

MADV_POPULATE_READ = 22
"""man 2 madvise; Linux 5.14. An older one refuses it, and the copy goes without."""

Range = tuple[int, int]
"""Addresses, from the first to the one after the last."""


def resident() -> list[Range]:
    """The read-only pages of files that this process has in its page tables; [] where Linux does not tell."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            return [found for start, end in mapped(maps) for found in _present(start, end, pagemap.fileno())]
    except OSError:
        return []


def mapped(maps: str) -> Iterator[Range]:
    """The ranges of read-only private mappings of files, in the lines of /proc/PID/maps."""
    for line in maps.splitlines():
        addresses, rights, _, _, inode = line.split(maxsplit=5)[:5]
        if rights in ("r--p", "r-xp") and inode != "0":
            start, end = (int(number, 16) for number in addresses.split("-"))
            yield start, end


def _present(start: int, end: int, pagemap: int) -> Iterator[Range]:
    """The parts of a range that are there."""
    entries = os.pread(pagemap, (end - start) // PAGE * ENTRY_BYTES, start // PAGE * ENTRY_BYTES)
    there = [bool(last & 0x80) for last in entries[ENTRY_BYTES - 1 :: ENTRY_BYTES]]
    at = start
    for present, run in groupby(there):
        size = sum(1 for _ in run) * PAGE
        if present:
            yield at, at + size
        at += size


def populate(ranges: Iterable[Range]) -> None:
    """Put these pages into this process's page tables."""
    madvise = ctypes.CDLL(None).madvise
    for start, end in ranges:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_POPULATE_READ)
