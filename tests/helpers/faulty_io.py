"""Files that fail: the N-th operation that changes files raises an error of the system's, or kills the processes.

A process that finds VARIABLE in its environment (`planted`, called by helpers.forked) counts together with all others
that find the same: a command and its workers share one count. `injected` does it for a part of this process.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VARIABLE = "PEFTOPT_TEST_FAULTS"

KILLED, ALONE, SHORT = "killed", "killed alone", "short write"
"""All processes of the count die at once, as by a power cut or a container's end; only the one whose turn it is; a
write takes half of its bytes."""

PLACES = ("mkdir", "unlink", "remove", "rmdir", "rename", "replace", "link", "symlink", "truncate", "chmod")
"""Functions of os whose first argument is a path."""

OPENED = ("write", "pwrite", "fsync", "ftruncate", "posix_fallocate", "sendfile", "fchmod")
"""Functions of os whose first argument is a file that is open."""

FAULTS: dict[str, tuple[int | str, tuple[str, ...]]] = {
    "full disk": (errno.ENOSPC, ()),
    "i/o error": (errno.EIO, ()),
    "no access": (errno.EACCES, ()),
    "read-only": (errno.EROFS, ()),
    "short write": (SHORT, ("write", "pwrite")),
    "fsync fails": (errno.EIO, ("fsync",)),
    "rename fails": (errno.EIO, ("rename", "replace")),
    "kill -9": (KILLED, ()),
    "kill -9 of one": (ALONE, ()),
}
"""What an operation meets, and which operations; () is every one."""

_os = {name: getattr(os, name) for name in (*PLACES, *OPENED, "open", "close", "pread")}


@dataclass
class Faults:
    """Counts operations that change files below `root`; the `at`-th (1-based, 0: none) does not happen. `fault`: the
    number of a system error, or one of the words above. `only`: the operations that count, by name; () is all.
    `counter`: the file of the count; without one it is this process's."""

    root: str
    at: int = 0
    fault: int | str = errno.ENOSPC
    only: tuple[str, ...] = ()
    counter: str = ""
    count: int = 0
    inside: set[int] = field(default_factory=set)
    lock: Any = field(default_factory=threading.RLock)

    def next(self, name: str, half: Callable[[], object] | None = None) -> object:
        """Count an operation, and let it fail if it is its turn; `half` does the half of it and says what that returns.
        Not None: what is returned in the place of the whole."""
        if self.only and name not in self.only:
            return None
        if self._turn() != self.at:
            return None
        if self.counter:
            self._note("what", name)
        if self.fault == SHORT and half is not None:
            return half()
        if self.fault in (KILLED, ALONE):
            with contextlib.suppress(OSError):
                if half is not None:
                    half()
            for process in self.processes() if self.fault == KILLED else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.ENOSPC if isinstance(self.fault, str) else self.fault
        raise OSError(number, os.strerror(number))

    def _turn(self) -> int:
        with self.lock:
            if not self.counter:
                self.count += 1
                return self.count
            counter = _os["open"](self.counter, os.O_RDWR)
            try:
                fcntl.flock(counter, fcntl.LOCK_EX)
                self.count = int(_os["pread"](counter, 20, 0) or 0) + 1
                _os["pwrite"](counter, str(self.count).encode(), 0)
            finally:
                _os["close"](counter)
            return self.count

    def counted(self) -> int:
        """How many operations there were, in all processes."""
        return int(Path(self.counter).read_text() or 0) if self.counter else self.count

    def joined(self) -> None:
        """Note that this process counts too."""
        self._note("processes", str(os.getpid()))

    def _note(self, kind: str, text: str) -> None:
        note = _os["open"](f"{self.counter}.{kind}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        _os["write"](note, f"{text}\n".encode())
        _os["close"](note)

    def processes(self) -> list[int]:
        """The others that count, as far as they were told of."""
        file = Path(f"{self.counter}.processes")
        if not self.counter or not file.exists():
            return []
        return [int(line) for line in file.read_text().splitlines() if int(line) != os.getpid()]

    def ours(self, path: Any) -> bool:
        """Whether a path lies below the root."""
        return isinstance(path, str | os.PathLike) and str(Path(path).absolute()).startswith(self.root)

    def told(self) -> str:
        """What VARIABLE says."""
        return json.dumps({name: getattr(self, name) for name in ("root", "at", "fault", "only", "counter")})


class Handle:
    """A file that counts its writes, and its end: what was written may fail as late as that."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file = file
        self._faults = faults
        self._number = file.fileno()

    def write(self, data: Any) -> Any:
        def half() -> Any:
            written = self._file.write(data[: len(data) // 2])
            self._file.flush()
            if isinstance(self._file, io.RawIOBase):
                return written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a buffer tries again, and is told

        short = self._faults.next("write", half)
        return self._file.write(data) if short is None else short

    def truncate(self, size: int | None = None) -> Any:
        self._faults.next("ftruncate")
        return self._file.truncate(size)

    def close(self) -> None:
        if self._file.closed:
            return
        self._faults.inside.discard(self._number)
        self._file.close()
        self._faults.next("close")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __del__(self) -> None:
        if not self._file.closed:
            self._faults.inside.discard(self._number)


@contextlib.contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Everything that opens, writes, syncs, moves, makes or removes files in this process goes through `faults`; of
    libraries that do it without Python, whole files of tensors."""
    with contextlib.ExitStack() as stack:
        _plant(faults, lambda where, name, value: _put(stack, where, name, value))
        yield faults


def planted(told: str) -> None:
    """The same until this process ends, as VARIABLE says."""
    values = json.loads(told)
    faults = Faults(**{**values, "only": tuple(values["only"])})
    faults.joined()
    _plant(faults, setattr)


def _put(stack: contextlib.ExitStack, where: Any, name: str, value: Any) -> None:
    stack.callback(setattr, where, name, getattr(where, name))
    setattr(where, name, value)


def _plant(faults: Faults, put: Callable[[Any, str, Any], None]) -> None:
    opened = _opened(faults, io.open)
    put(builtins, "open", opened)
    put(io, "open", opened)
    put(os, "open", _os_open(faults))
    put(os, "close", _os_close(faults))
    for name in PLACES:
        put(os, name, _at_place(faults, name))
    for name in OPENED:
        put(os, name, _at_opened(faults, name))
    if "safetensors.torch" in sys.modules:
        _plant_tensors(faults, put)


def _opened(faults: Faults, opening: Any) -> Any:
    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = bool(set(mode) & set("wax+"))
        if not faults.ours(file) or not writes or "opener" in kwargs:
            return opening(file, mode, *args, **kwargs)
        faults.next("open")
        handle = opening(file, mode, *args, **kwargs)
        faults.inside.add(handle.fileno())
        return Handle(handle, faults)

    return opened


def _os_open(faults: Faults) -> Any:
    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        ours = faults.ours(path) or kwargs.get("dir_fd") in faults.inside
        if ours and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            faults.next("open")
        number: int = _os["open"](path, flags, *args, **kwargs)
        if ours:
            faults.inside.add(number)
        return number

    return os_open


def _os_close(faults: Faults) -> Any:
    def os_close(number: int) -> None:
        faults.inside.discard(number)
        _os["close"](number)

    return os_close


def _at_place(faults: Faults, name: str) -> Any:
    def called(path: Any, *args: Any, **kwargs: Any) -> Any:
        if faults.ours(path) or kwargs.get("dir_fd") in faults.inside:
            faults.next(name)
        return _os[name](path, *args, **kwargs)

    return called


def _at_opened(faults: Faults, name: str) -> Any:
    def called(number: Any, *args: Any, **kwargs: Any) -> Any:
        def half() -> Any:
            return _os[name](number, args[0][: len(args[0]) // 2], *args[1:])

        descriptor = number if isinstance(number, int) else number.fileno()
        if descriptor in faults.inside:
            short = faults.next(name, half if name in ("write", "pwrite") else None)
            if short is not None:
                return short
        return _os[name](number, *args, **kwargs)

    return called


def _plant_tensors(faults: Faults, put: Callable[[Any, str, Any], None]) -> None:
    """Files of tensors, which safetensors writes without Python: half a file is one whose end is missing."""
    import safetensors.torch

    writing = safetensors.torch.serialize_file

    def serialize_file(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        def half() -> None:
            writing(tensors, path, *args, **kwargs)
            os.truncate(path, Path(path).stat().st_size // 2)
            if faults.fault == SHORT:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if faults.ours(path):
            faults.next("write", half)
        return writing(tensors, path, *args, **kwargs)

    put(safetensors.torch, "serialize_file", serialize_file)
