"""Memory, handles and threads of a server's processes at rest."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt import machine

REST_S = 3.0
"""The longest that processes are waited for to come to rest."""

READS, READ_EVERY_S = 3, 0.05
"""Readings of the memory, of which the least counts: what is on its way back is not held."""

OWN = ("Anonymous", "Pss_Shmem", "SwapPss")
"""The lines of smaps_rollup that count: memory that is no file's, its part of what processes share by name, and swap.
Pages of files are left out: the kernel takes them back when it wants, and other processes that read a file change them.
What a process has in common with the one that it is a copy of counts whole: its part would grow as others end."""


@dataclass(frozen=True)
class Held:
    """The total of some processes: bytes of the `host` and of NVIDIA GPUs (None: not known), open files and sockets
    (`handles`), threads."""

    host: float
    gpu: float | None
    handles: int
    threads: int


async def at_rest(processes: Callable[[], Sequence[int]]) -> Held | None:
    """The total once they compute nothing, or after REST_S seconds; None if no process is known or left."""
    return await asyncio.to_thread(_at_rest, processes)


def _at_rest(processes: Callable[[], Sequence[int]]) -> Held | None:
    import time

    machine.rest(processes(), REST_S)
    readings = []
    for number in range(READS):
        if number:
            time.sleep(READ_EVERY_S)
        readings.append(host_memory(processes()))
    known = [reading for reading in readings if reading is not None]
    pids = processes()
    handles, threads = handles_and_threads(pids)
    if not known or not threads:
        return None
    return Held(min(known), machine.gpu_memory(pids), handles, threads)


def host_memory(pids: Iterable[int]) -> int | None:
    """Bytes of the host that these processes hold: see OWN; if the kernel does not report that, their unique set size
    and swap. None if none of them exists."""
    import psutil

    held = []
    for pid in pids:
        with contextlib.suppress(OSError, psutil.Error):
            held.append(_rolled_up(pid) or _unique(pid))
    return sum(held) if held else None


def _rolled_up(pid: int) -> int:
    """From /proc/PID/smaps_rollup; 0 where there is no such file. Raises OSError for a process that is gone."""
    file = Path(f"/proc/{pid}/smaps_rollup")
    if not file.exists():
        return 0
    fields = [line.split() for line in file.read_text().splitlines()[1:]]
    return sum(int(kib) * 1024 for name, kib, _ in fields if name.rstrip(":") in OWN)


def _unique(pid: int) -> int:
    import psutil

    memory = psutil.Process(pid).memory_full_info()
    return int(memory.uss) + int(getattr(memory, "swap", 0))


def listening(port: int) -> Sequence[int]:
    """The processes of this machine that listen at a port, with their descendants; () if none is visible."""
    import psutil

    family: set[int] = set()
    with contextlib.suppress(psutil.Error):
        for each in psutil.net_connections("tcp"):
            if each.pid and each.status == psutil.CONN_LISTEN and tuple(each.laddr)[1:2] == (port,):
                family.add(each.pid)
    for pid in list(family):
        with contextlib.suppress(psutil.Error):
            family.update(child.pid for child in psutil.Process(pid).children(recursive=True))
    return sorted(family)


def handles_and_threads(pids: Iterable[int]) -> tuple[int, int]:
    """Open files and sockets, and threads, of these processes together; one that is gone has none."""
    import psutil

    handles = threads = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            handles += process.num_fds()
            threads += process.num_threads()
    return handles, threads
