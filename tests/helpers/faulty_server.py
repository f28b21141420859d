"""Our own server with a fault, for tests of who looks for faults: `python -m helpers.faulty_server FAULT options…`.

"leak": each unload keeps a megabyte for good. "stuck": the third unload never returns. "handles": each keeps a socket
open. "none": nothing is wrong.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt.engines import _rows
from peftopt.engines._server import Server, free_port
from peftopt.loadtest.protocols import Target
from peftopt.server import __main__ as server
from peftopt.server import scheduler

TESTS = Path(__file__).parents[1]
KEPT: list[Any] = []
MB = 2**20


def leak(self: _rows.Served, name: str) -> None:
    remove(self, name)
    KEPT.append(bytearray(b"x" * MB))


def handles(self: _rows.Served, name: str) -> None:
    remove(self, name)
    KEPT.append(socket.socket())


async def stuck(self: scheduler.Scheduler, name: str) -> None:
    KEPT.append(name)
    if len(KEPT) >= 3:
        await asyncio.Event().wait()
    await unload(self, name)


@dataclass
class Started:
    """A server, and the processes that are known of it."""

    target: Target
    pids: Sequence[int] = ()

    def processes(self) -> Sequence[int]:
        return self.pids


@contextmanager
def started(fault: str, base: Path, folder: Path) -> Iterator[Started]:
    """Our own server with a fault, in a process of its own. It is no copy of another one: what copies share counts
    half, until one of them writes to it."""
    port = free_port()
    words = [sys.executable, "-m", "helpers.faulty_server", fault, "--base", base, "--port", port]
    words += ["--threads", 1, "--device", "cpu"]
    variables = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    process = Server([str(word) for word in words], variables, f"http://127.0.0.1:{port}", folder / "said")
    try:
        process.ready(300)
        yield Started(Target(process.url, timeout_s=300), process.processes())
    finally:
        process.kill()
        process.stop()


remove, unload = _rows.Served.remove, scheduler.Scheduler.unload

if __name__ == "__main__":
    match sys.argv[1]:
        case "leak":
            _rows.Served.remove = leak  # type: ignore[method-assign]
        case "handles":
            _rows.Served.remove = handles  # type: ignore[method-assign]
        case "stuck":
            scheduler.Scheduler.unload = stuck  # type: ignore[method-assign]
    sys.exit(server.main(sys.argv[2:]))
