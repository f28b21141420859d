"""The lines of a log that is written on, set aside under other names, and replaced: each once, in order."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from peftopt.errors import MissingEnvironment
from peftopt.gateway import lines as gateway_lines

MOST_BYTES = 2**20
"""A longer line is none of ours: only so much of it is read."""

HEAD_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A place in a log: so many bytes and lines into the file that had this inode, and whose first line has this hash
    ("" as long as it has none). `modified_ns`: when the file was written last, as far as it was read."""

    inode: int
    head: str = ""
    offset: int = 0
    line: int = 0
    modified_ns: int = 0


@dataclass(frozen=True)
class _File:
    path: Path
    file: BinaryIO
    device: int
    size: int
    mark: Mark
    """Its beginning."""

    def holds(self, mark: Mark) -> bool:
        """Whether a place is in this file. The first line tells, since a copy has another inode, and an inode is used
        again once its file is gone."""
        return self.mark.head == mark.head and mark.offset <= self.size


class Files:
    """A log's files. `start` is where the line begins that was given last, `end` where the next begins."""

    def __init__(self, paths: Sequence[Path], end: Mark | None = None) -> None:
        """`paths`: the log, or several that follow each other, the oldest first; `end`: where to go on."""
        self._paths = list(paths)
        self._file: _File | None = None
        self._mark = end
        self._before, self._offset, self._line = (end.offset, end.offset, end.line) if end else (0, 0, 0)
        self.notices: list[str] = []

    @property
    def end(self) -> Mark | None:
        """Where the next line begins; None before the first file was opened."""
        return replace(self._mark, offset=self._offset, line=self._line) if self._mark else None

    @property
    def start(self) -> Mark | None:
        """Where the line begins that was given last."""
        return replace(self._mark, offset=self._before, line=self._line - 1) if self._mark else None

    @property
    def where(self) -> str:
        """The file and the line that was given last, for a person."""
        return f"{self._file.path if self._file else ''}:{self._line}"

    def lines(self, over: bool = False) -> Iterator[bytes]:
        """The lines since the last time, with their ends. One that is still being written is left for the next time,
        unless the log is `over`. Raises MissingEnvironment where there is no file."""
        opened = self._opened()
        try:
            for number, each in enumerate(opened):
                # a writer stays in a file that was renamed until it is told, so an empty one after it does not end it
                followed = any(later.size for later in opened[number + 1 :])
                yield from self._of(each, over or followed)
                if not followed:
                    break
        finally:
            for each in opened:
                each.file.close()

    def _of(self, each: _File, over: bool) -> Iterator[bytes]:
        self._file = each
        if not (self.end and each.holds(self.end)):
            self._offset = self._line = 0
        self._mark = each.mark
        read = each.file.readline
        each.file.seek(self._offset)
        while line := read(MOST_BYTES):
            more = 0
            if not line.endswith(b"\n"):
                if len(line) < MOST_BYTES and not over:
                    break
                if len(line) == MOST_BYTES:
                    more = _rest_of_line(each.file)
            if not self._offset:
                self._mark = replace(self._mark, head=_hash(line))
            self._before = self._offset
            self._offset += len(line) + more
            self._line += 1
            yield line

    def _opened(self) -> list[_File]:
        """From the file that was read on, the oldest first. They are opened from the newest back, so that one that is
        set aside meanwhile is met twice rather than missed."""
        found: list[_File] = []
        for path in reversed(self._candidates()):
            each = _open(path)
            if each is None:
                continue
            if any((each.device, each.mark.inode) == (other.device, other.mark.inode) for other in found):
                each.file.close()
                continue
            found.insert(0, each)
            if self.end and self.end.head and each.holds(self.end):
                return found
        if not found:
            hint = "give the file that peftopt serve --log writes"
            raise MissingEnvironment(f"there is no log {self._paths[-1]}", hint)
        return self._unread(self._mark, found) if self._mark else found

    def _unread(self, mark: Mark, found: list[_File]) -> list[_File]:
        """Of all files, where the one that was read is gone, or had no line yet: those that were written since."""
        newer = [
            each
            for each in found
            if each.mark.modified_ns > mark.modified_ns or (not mark.head and each.mark.inode == mark.inode)
        ]
        for each in found:
            if each not in newer:
                each.file.close()
        if newer and mark.head:
            self.notices.append(f"the file that was read is gone, and what it got since: on with {newer[0].path}")
        return newer

    def _candidates(self) -> list[Path]:
        """Every file that the log may be in, the oldest first; before the first one was read, only those asked for."""
        if self._mark is None:
            return self._paths
        asked = {path.resolve() for path in self._paths}
        files = []
        for path in self._paths:
            files += [other for other in _set_aside(path) if other.resolve() not in asked]
            files.append(path)
        return files


def _set_aside(path: Path) -> list[Path]:
    """The files that a gateway or logrotate has set aside of a log, the oldest first. Their numbers do not tell: of a
    gateway's the highest is the newest, of logrotate's the lowest. When they were written last does."""
    numbered = gateway_lines.set_aside(path)
    dated = sorted(path.parent.glob(f"{glob.escape(path.name)}-[0-9]*"))
    ordered = [*dated, *(numbered[number] for number in sorted(numbered))]
    return sorted(ordered, key=_modified_ns)


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _open(path: Path) -> _File | None:
    """None for a file that is not there, or not any more. Raises MissingEnvironment for one that cannot be read."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        hint = "check the path and its permissions"
        raise MissingEnvironment(f"cannot read {path}: {error.strerror}", hint) from error
    status = os.fstat(file.fileno())
    first = file.readline(HEAD_BYTES)
    head = _hash(first) if first.endswith(b"\n") or len(first) == HEAD_BYTES else ""
    return _File(
        path=path,
        file=file,
        device=status.st_dev,
        size=status.st_size,
        mark=Mark(inode=status.st_ino, head=head, modified_ns=status.st_mtime_ns),
    )


def _hash(first_line: bytes) -> str:
    return hashlib.sha256(first_line[:HEAD_BYTES]).hexdigest()[:16]


def _rest_of_line(file: BinaryIO) -> int:
    """Passes over what is left of a line that is too long; how many bytes that is."""
    passed = 0
    while piece := file.readline(MOST_BYTES):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed
