"""The errors that users see. Each says what is wrong and what to do, and has an exit code."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

# Exit codes, the same for every verb. Nothing measured is never ACCEPTED.
ACCEPTED = 0
REJECTED = 1
BAD_INPUT = 2
INCONCLUSIVE = 3
ENVIRONMENT = 4
BUG = 5
INTERRUPTED = 130
CLOSED_PIPE = 141
"""A shell's exit code for a program that SIGPIPE ended: the reader has gone, so it is neither 0 nor a verdict."""

EXIT = {"accepted": ACCEPTED, "rejected": REJECTED, "inconclusive": INCONCLUSIVE, "not judged": ENVIRONMENT}
"""Exit codes of outcomes."""

BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
"""Errors from reading another program's JSON: it is not JSON, is nested too deep, or has another shape."""


NO_MEMORY = "out of memory"
"""The failure's reason for a process that needed more memory than the machine or the GPU has."""

_NO_MEMORY_TEXTS = (
    NO_MEMORY,
    "outofmemory",
    "memoryerror",
    "bad_alloc",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
)
"""Texts with which Python, C++, torch, NumPy and the system report a lack of memory."""


def says_no_memory(text: str) -> bool:
    """Whether an error's text, or the end of a log, reports a lack of memory."""
    lowered = text.lower().replace("cannot allocate memory in static tls", "")  # a loader's limit, not the machine's
    return any(words in lowered for words in _NO_MEMORY_TEXTS)


class PeftoptError(Exception):
    """A problem the user can act on. Printed as `error: message` and `hint: hint`, never as a traceback."""

    exit_code = BUG

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadInput(PeftoptError):
    """Something the user wrote or pointed at is wrong (exit 2)."""

    exit_code = BAD_INPUT


class BadRecipe(BadInput):
    """All mistakes of one recipe. `problems` holds (line, message, hint); lines count from 1, and 0 is no line."""

    def __init__(self, path: str, problems: Sequence[tuple[int, str, str]]) -> None:
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__(f"{path} has {count}")
        self.path = path
        self.problems = tuple(problems)


class Rejected(PeftoptError):
    """A result did not pass its checks (exit 1)."""

    exit_code = REJECTED


class MissingEnvironment(PeftoptError):
    """The machine lacks something, or a path cannot be written (exit 4)."""

    exit_code = ENVIRONMENT


class Occupied(MissingEnvironment):
    """Another process uses the same folder (exit 4)."""


class WorkerFailed(PeftoptError):
    """A worker process or a server died, hung or refused (exit 4); `reason` is a few words: "timeout", "died"."""

    exit_code = ENVIRONMENT

    def __init__(self, reason: str, detail: str = "", hint: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason, hint)
        self.reason = reason
        self.detail = detail


_SYSTEM = "ENOSPC EDQUOT EIO EROFS EACCES EPERM EFBIG EMFILE ENFILE ENOMEM ESTALE ENODEV ENXIO"
SYSTEM = frozenset(getattr(errno, name) for name in _SYSTEM.split())
"""Numbers of system errors that the machine causes, wherever they occur."""

FULL = (errno.ENOSPC, errno.EDQUOT)


def unwritable(path: Path | str, error: OSError, hint: str = "", needed: int = 0) -> MissingEnvironment:
    """The error for a file or folder that cannot be written. For a full disk, the message gives the `needed` and the
    free bytes."""
    why = error.strerror or str(error)
    if error.errno in FULL:
        need = f"{needed:,} bytes are needed, " if needed else ""
        why = f"{why}; {need}{_free(Path(path)):,} bytes are free"
        hint = f"make room, or {hint or 'write to another disk'}"
    return MissingEnvironment(f"cannot write {path}: {why}", hint or "check the folder's owner, mode and disk")


def unusable(error: OSError) -> MissingEnvironment:
    """The error for an unexpected system error, with the file's path if the system gives it."""
    path = error.filename or error.filename2
    if error.errno in FULL and path:
        return unwritable(str(path), error)
    if error.errno in FULL:
        return MissingEnvironment(f"cannot write: {error.strerror}", "make room on the disk that the output goes to")
    where = f" {path}" if path else ""
    return MissingEnvironment(
        f"the system refused to read or write{where}: {error.strerror}", "check its owner, mode and disk"
    )


def _free(path: Path) -> int:
    """Free bytes on the disk of a path, which may not exist yet; 0 if unknown."""
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return 0


def as_input(error: WorkerFailed) -> Exception:
    """The user's error behind a worker's failure, such as BadInput for a refused input; else the failure itself."""
    kinds = {"refused": BadInput, "missing environment": MissingEnvironment, "unusable": Rejected}
    if error.reason not in kinds:
        return error
    return kinds[error.reason](error.detail, error.hint)
