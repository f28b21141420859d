"""Objects below a URL: files of a folder or of a bucket, by fsspec. An object is there whole or not at all."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from peftopt import redaction
from peftopt.errors import FULL, BadInput, MissingEnvironment, PeftoptError, unwritable
from peftopt.runner.process import interrupted

WHOLE = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"))
"""Protocols without folders, whose objects appear when all their bytes are there. Other file systems get a temporary
file, which is then renamed."""

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra of peftopt that brings its package."""

ASIDE = "tmp"
"""The folder of temporary files."""

OLD = timedelta(days=1)
"""No file takes so long to write: an older temporary file is what a killed process left."""

LONGEST = 300
"""Characters that are shown of another library's error."""

Heard = Callable[[int], None]
"""Receives how many bytes of a file have been carried."""


class Unreachable(MissingEnvironment):
    """A store that machines share does not answer, or refuses (exit 4)."""


class _Stopped(Exception):
    """Ends a transfer, which another thread does, after an interrupt."""


@dataclass(frozen=True)
class Objects:
    """The objects below `root` of the file system `fs`, which the user calls `url`. Each method raises Unreachable."""

    fs: Any
    root: str
    url: str

    @property
    def _appears_whole(self) -> bool:
        kind = self.fs.protocol
        return not WHOLE.isdisjoint((kind,) if isinstance(kind, str) else kind)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        """The bytes of an object; None where there is none."""
        with self._asked("read"), contextlib.suppress(FileNotFoundError):
            content: bytes = self.fs.cat_file(self._path(name))
            return content
        return None

    def size(self, name: str) -> int | None:
        """How many bytes an object has; None where there is none."""
        with self._asked("read"), contextlib.suppress(FileNotFoundError):
            return int(self.fs.info(self._path(name))["size"])
        return None

    def write(self, name: str, content: bytes) -> None:
        """Write an object, or replace it."""
        with self._asked("write"), self._placed(name) as path:
            self.fs.pipe_file(path, content)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object where there is none. Returns whether it did: of two writers, one does."""
        with self._asked("write"), contextlib.suppress(FileExistsError):
            if self._appears_whole:
                self.fs.pipe_file(self._path(name), content, mode="create")
            else:
                self._make_folder(name)
                with self.fs.open(self._path(name), "xb") as file:
                    file.write(content)
            return True
        return False

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with self._asked("write"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(name))

    def put(self, file: Path, name: str, hear: Heard) -> None:
        """Write a file to an object. A folder's file keeps the file's mode: who may not read the one may not read the
        other."""
        with self._asked("write"), self._placed(name) as path:
            self.fs.put_file(str(file), path, callback=_callback(hear))
            if self._is_local:
                self.fs.chmod(path, file.stat().st_mode & 0o777)

    def get(self, name: str, file: Path, hear: Heard) -> bool:
        """Write an object to a file. Returns whether there is one. Raises MissingEnvironment for a full disk."""
        with self._asked("read"), contextlib.suppress(FileNotFoundError):
            try:
                self.fs.get_file(self._path(name), str(file), callback=_callback(hear))
            except OSError as error:
                if error.errno in FULL:
                    raise unwritable(file, error) from error
                raise
            return True
        return False

    def clear(self) -> None:
        """Remove temporary files that killed processes left."""
        if self._appears_whole:
            return
        with self._asked("read"), contextlib.suppress(FileNotFoundError):
            for path in self.fs.ls(self._path(ASIDE), detail=False):
                with contextlib.suppress(FileNotFoundError):  # another machine has removed it
                    if datetime.now(UTC) - self.fs.modified(path) > OLD:
                        self.fs.rm_file(path)

    @property
    def _is_local(self) -> bool:
        return "file" in self.fs.protocol

    def _make_folder(self, name: str) -> None:
        self.fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    @contextlib.contextmanager
    def _placed(self, name: str) -> Iterator[str]:
        """Where to write an object. It has its name afterwards."""
        if self._appears_whole:
            yield self._path(name)
            return
        temporary = f"{ASIDE}/{uuid.uuid4().hex}"
        self._make_folder(temporary)
        try:
            yield self._path(temporary)
            self._make_folder(name)
            self.fs.mv(self._path(temporary), self._path(name))
        except BaseException:
            with contextlib.suppress(OSError):
                self.fs.rm_file(self._path(temporary))
            raise

    @contextlib.contextmanager
    def _asked(self, verb: str) -> Iterator[None]:
        """Every library that fsspec uses has errors of its own."""
        try:
            yield
        except _Stopped:
            raise KeyboardInterrupt from None
        except PeftoptError:
            raise
        except Exception as error:
            raise _unreachable(verb, self.url, error) from error


def at(url: str) -> Objects:
    """The objects below a URL, or in a folder. Raises BadInput for a URL that fsspec does not know or that holds a
    password, MissingEnvironment where its package is not installed, Unreachable."""
    if redaction.redacted(url) != url:
        hint = "put it where the file system's library looks for it, such as ~/.aws/credentials or the environment"
        raise BadInput("the URL of --artifacts holds a secret, which a list of processes would show", hint)
    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        install = f"pip install 'peftopt[{EXTRAS[protocol]}]'" if protocol in EXTRAS else str(error)
        raise MissingEnvironment(f"a URL of {protocol} needs a package that is not installed", install) from error
    except ValueError as error:
        hint = "give a folder, or a URL such as s3://BUCKET/PREFIX"
        raise BadInput(f"--artifacts {url} is not understood: {error}", hint) from error
    except Exception as error:
        raise _unreachable("reach", url, error) from error
    if not root.strip("/"):
        raise BadInput(f"--artifacts {url} names no folder and no bucket", "s3://BUCKET/PREFIX")
    return Objects(fs, root.rstrip("/"), url)


def absolute(url: str) -> str:
    """The URL as another process may use it, whose working folder is another; "" stays."""
    return url if "://" in url or not url else str(Path(url).resolve())


def _callback(hear: Heard) -> Any:
    """Hears of each part that was carried, and stops at an interrupt."""
    from fsspec.callbacks import Callback

    def hook(size: int | None, value: int, **_: object) -> None:
        if interrupted(0):
            raise _Stopped
        hear(value)

    return Callback(hooks={"heard": hook})


def _unreachable(verb: str, url: str, error: Exception) -> Unreachable:
    words = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    hint = "check the URL and the network"
    if isinstance(error, PermissionError) or "credentials" in words.lower():
        hint = "check the credentials: they have to allow to list, read, write and delete below it"
    return Unreachable(f"cannot {verb} {url}: {words[:LONGEST]}", hint)
