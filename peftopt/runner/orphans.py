"""No process outlives the peftopt that started it: workers and all that they start carry a mark in their environment,
by which they are found and ended, whatever group, session or parent they have.

`python orphans.py MARK` is the watcher: it waits until its stdin ends, as it does when the process that started it
dies by whatever means, and ends what carries the mark.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psutil import Process

MARK = "PEFTOPT_STARTED_BY"
"""The variable. Its value begins with a token of the parent process; a worker's own number follows."""

ROUNDS = 20
"""Looks at all processes, at most: one that is being started while the others are ended is found by the next."""

_lock = threading.Lock()
_watcher: tuple[int, str, subprocess.Popen[bytes]] | None = None


def watched() -> str:
    """The token of this process, whose watcher runs from now on."""
    global _watcher
    with _lock:
        if _watcher is None or _watcher[0] != os.getpid():  # a copy of a process has none yet
            token = secrets.token_hex(8)
            watcher = subprocess.Popen(
                [sys.executable, "-P", __file__, token],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # Ctrl-C is not for it
                env={name: value for name, value in os.environ.items() if name != MARK},  # nor what ends its parent
            )
            _watcher = (os.getpid(), token, watcher)
        return _watcher[1]


def end(mark: str) -> int:
    """End every process whose mark begins with this one, and wait until they are gone; how many there were."""
    import psutil

    ended: set[int] = set()
    for _ in range(ROUNDS):
        found = list(_marked(mark))
        if not found:
            break
        for process in found:
            ended.add(process.pid)
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, 1.0)
    return len(ended)


def _marked(mark: str) -> Iterator[Process]:
    """The processes that carry the mark and live."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK, "").startswith(mark) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def main(mark: str) -> None:
    """Wait for the end of stdin, and end what carries the mark."""
    sys.stdin.buffer.read()
    end(mark)


if __name__ == "__main__":
    main(sys.argv[1])
