"""Temporary folders of this process's, for logs of workers and for models that are soon gone. What a process has left
that was killed is removed when the next one needs such a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from peftopt import store

PREFIX = "peftopt-"
LOGS_STAY_S = 86400.0
"""A folder that holds logs and nothing else stays for a day: an error has named one of them."""

_held: list[int] = []
"""Locks of this process's folders: the kernel frees them when it ends, however it does."""


def folder(tell: Callable[[str], None] = lambda _: None) -> Path:
    """A new one, this process's until it ends; `tell` hears how much the dead had left."""
    store.tell_removed(_clear(Path(tempfile.gettempdir())), Path(tempfile.gettempdir()), tell)
    new = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    lock = os.open(new, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    _held.append(lock)
    return new


@contextlib.contextmanager
def temporary(tell: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """The same, removed at the end."""
    new = folder(tell)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _clear(home: Path) -> int:
    """Remove the folders of this user's that no living process holds; how many bytes that were."""
    freed = 0
    for left in home.glob(f"{PREFIX}[0-9]*-*"):
        owner = left.name.removeprefix(PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            mine = left.stat().st_uid == os.getuid() and left.is_dir() and not left.is_symlink()
            if mine and not (owner.isdigit() and store.is_alive(int(owner))) and not _is_held(left) and _may_go(left):
                freed += store.size(left)
                shutil.rmtree(left, ignore_errors=True)
    return freed


def _is_held(left: Path) -> bool:
    """Whether a process holds its lock: one of another container, perhaps, whose number says nothing here."""
    lock = os.open(left, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _may_go(left: Path) -> bool:
    files = [file for file in left.rglob("*") if file.is_file()]
    only_logs = bool(files) and all(file.suffix == ".log" for file in files)
    return not only_logs or time.time() - max(file.stat().st_mtime for file in files) > LOGS_STAY_S
