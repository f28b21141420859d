"""The errors a user can meet: each says what is wrong and what to do, and carries its exit code."""

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
"""What a shell says of a program that SIGPIPE ended: nobody reads on, so it is neither 0 nor a verdict."""

EXIT = {"accepted": ACCEPTED, "rejected": REJECTED, "inconclusive": INCONCLUSIVE, "not judged": ENVIRONMENT}
"""Exit codes of outcomes."""

BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
"""What reading another program's JSON may raise: it is none, is too deep, or not of the shape that is meant."""


NO_MEMORY = "out of memory"
"""The reason of a process that the machine's or a GPU's memory did not suffice for."""

_SAID = (
    NO_MEMORY,
    "outofmemory",
    "memoryerror",
    "bad_alloc",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
)
"""How Python, C++, torch, NumPy and the system say that there is no memory."""


def says_no_memory(text: str) -> bool:
    """Whether an error's text, or the end of a log, tells of a lack of memory."""
    said = text.lower().replace("cannot allocate memory in static tls", "")  # a loader's limit, not the machine's
    return any(words in said for words in _SAID)


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
    """All the mistakes of one recipe at once; `problems` holds (line, message, hint), line 1-based or 0."""

    def __init__(self, path: str, problems: Sequence[tuple[int, str, str]]) -> None:
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__(f"{path} has {count}")
        self.path = path
        self.problems = tuple(problems)


class Rejected(PeftoptError):
    """What was made did not pass its own checks (exit 1)."""

    exit_code = REJECTED


class MissingEnvironment(PeftoptError):
    """The machine lacks something, or a path cannot be written (exit 4)."""

    exit_code = ENVIRONMENT


class Occupied(MissingEnvironment):
    """Another process works where this one would (exit 4)."""


class WorkerFailed(PeftoptError):
    """A worker process or a server died, hung or refused (exit 4); `reason` is a few words: "timeout", "died"."""

    exit_code = ENVIRONMENT

    def __init__(self, reason: str, detail: str = "", hint: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason, hint)
        self.reason = reason
        self.detail = detail


_SYSTEM = "ENOSPC EDQUOT EIO EROFS EACCES EPERM EFBIG EMFILE ENFILE ENOMEM ESTALE ENODEV ENXIO"
SYSTEM = frozenset(getattr(errno, name) for name in _SYSTEM.split())
"""Numbers of system errors that are the machine's, whichever line of ours meets them."""

FULL = (errno.ENOSPC, errno.EDQUOT)


def unwritable(path: Path | str, error: OSError, hint: str = "", needed: int = 0) -> MissingEnvironment:
    """The error for a file or folder that the system did not let us write, of `needed` bytes; a full disk says how much
    is free."""
    why = error.strerror or str(error)
    if error.errno in FULL:
        asked = f"{needed:,} bytes are needed, " if needed else ""
        why = f"{why}; {asked}{_free(Path(path)):,} bytes are free"
        hint = f"make room, or {hint or 'write to another disk'}"
    return MissingEnvironment(f"cannot write {path}: {why}", hint or "check the folder's owner, mode and disk")


def unusable(error: OSError) -> MissingEnvironment:
    """The error for a system error that no line of ours expected: which file it was, as far as the system said."""
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
    """Bytes that are free on the disk of a path that may not exist yet; 0 where nobody can tell."""
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return 0


def as_input(error: WorkerFailed) -> Exception:
    """A worker that refused its input met a mistake of the user's, not a fault of the machine."""
    kinds = {"refused": BadInput, "missing environment": MissingEnvironment, "unusable": Rejected}
    if error.reason not in kinds:
        return error
    return kinds[error.reason](error.detail, error.hint)
