"""Files that fail: the N-th file operation of this process raises an error of the system's, or kills the process."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL
SHORT = "short"


@dataclass
class Faults:
    """Counts operations that change files below `root`; the `at`-th (1-based, 0: none) does not happen. `fault`: the
    number of a system error, SHORT for a write of half the bytes before a full disk, or KILLED."""

    root: str
    at: int = 0
    fault: int | str = errno.ENOSPC
    count: int = 0

    def next(self, half: Callable[[], object] = lambda: None) -> None:
        """Count an operation, and let it fail if it is its turn; `half` does the half of it."""
        self.count += 1
        if self.count != self.at:
            return
        if self.fault in (SHORT, KILLED):
            half()
        if self.fault == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.ENOSPC if isinstance(self.fault, str) else self.fault
        raise OSError(number, os.strerror(number))

    def ours(self, path: Any) -> bool:
        """Whether a path lies below the root."""
        return isinstance(path, str | os.PathLike) and str(Path(path).absolute()).startswith(self.root)


class Handle:
    """A file that counts its writes."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file = file
        self._faults = faults

    def write(self, data: Any) -> Any:
        self._faults.next(lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
        return self._file.write(data)

    def truncate(self, size: int | None = None) -> Any:
        self._faults.next()
        return self._file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


@contextlib.contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Everything that opens, writes, syncs, moves, makes or removes files in this process goes through `faults`."""
    opening = io.open
    inside: set[int] = set()

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not faults.ours(file) or not set(mode) & set("wax+"):
            return opening(file, mode, *args, **kwargs)
        faults.next()
        handle = opening(file, mode, *args, **kwargs)
        inside.add(handle.fileno())
        return Handle(handle, faults)

    def failing(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            first = args[0]
            if faults.ours(first) or (isinstance(first, int) and first in inside):
                faults.next()
            return function(*args, **kwargs)

        return called

    names = ("fsync", "replace", "rename", "mkdir", "unlink", "truncate", "ftruncate", "rmdir", "remove", "link")
    kept = {name: getattr(os, name) for name in names}
    try:
        builtins.open, io.open = opened, opened  # type: ignore[assignment]
        for name, function in kept.items():
            setattr(os, name, failing(function))
        yield faults
    finally:
        builtins.open, io.open = opening, opening
        for name, function in kept.items():
            setattr(os, name, function)
