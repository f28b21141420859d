"""Our own server with a fault, for tests of who looks for faults: `python -m helpers.faulty_server FAULT options…`.

"leak": each unload keeps a megabyte for good. "stuck": the third unload never returns. "handles": each keeps a socket
open. "none": nothing is wrong.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

from peftopt.engines import _rows
from peftopt.server import __main__ as server
from peftopt.server import scheduler

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
