"""End all processes that peftopt started when peftopt ends. Workers and their descendants carry a mark in their
environment. By this mark they are found and ended, whatever their group, session or parent is.

`python orphans.py MARK` is the watcher. It waits until its stdin ends, which happens when its parent dies, however it
dies. Then it ends all processes with the mark.
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
"""The name of the variable. Its value is a token of the parent process, then a worker's own number."""

ROUNDS = 20
"""Most rounds over all processes: the next round finds a process that started during the last."""

_lock = threading.Lock()
_watcher: tuple[int, str, subprocess.Popen[bytes]] | None = None


def watched() -> str:
    """Start this process's watcher, if it does not run yet, and return the process's token."""
    global _watcher
    with _lock:
        if _watcher is None or _watcher[0] != os.getpid():  # a forked copy of a process has no watcher yet
            token = secrets.token_hex(8)
            watcher = subprocess.Popen(
                [sys.executable, "-P", __file__, token],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # Ctrl-C must not end it
                env={name: value for name, value in os.environ.items() if name != MARK},  # nor its parent's mark
            )
            _watcher = (os.getpid(), token, watcher)
        return _watcher[1]


def end(mark: str) -> int:
    """End every process whose mark begins with this one, and wait until they are gone. Returns how many there were."""
    import psutil

    ended: set[int] = set()
    for _ in range(ROUNDS):
        processes = list(_marked(mark))
        if not processes:
            break
        for process in processes:
            ended.add(process.pid)
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, 1.0)
    return len(ended)


def _marked(mark: str) -> Iterator[Process]:
    """The live processes with the mark."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK, "").startswith(mark) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def main(mark: str) -> None:
    """Wait for the end of stdin, then end all processes with the mark."""
    sys.stdin.buffer.read()
    end(mark)


if __name__ == "__main__":
    main(sys.argv[1])
