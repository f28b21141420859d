"""Artifacts that machines share: in a folder or a bucket, at any URL that fsspec can write.

    artifacts/3f/3fa9….json    an artifact: its manifest, and its files with their hashes; written last
    files/8c/8c01….            a file of artifacts, named by the hash of its bytes
    leases/3fa9….json          who builds the artifact now

What a machine lacks it takes from there, checks it, and keeps it in its results folder, from which alone engines read.
What it has built it puts there. A writer that dies leaves files that no artifact names, and two writers of one artifact
write files under different names: what is named is whole, or its hash tells.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from peftopt import identity, redaction, store
from peftopt.errors import BROKEN, BadInput
from peftopt.metrics import format_value
from peftopt.models.checkpoint import check_room
from peftopt.models.folders import keep_private
from peftopt.progress import Hear, Reached
from peftopt.records import Artifact, Build, Json, Model
from peftopt.runner import objects
from peftopt.runner.lease import Lease
from peftopt.runner.objects import Objects, Unreachable

MARK = "peftopt-artifacts.json"
"""The object by which a place is known to hold artifacts."""

FORMAT = json.dumps({"format": 1}).encode()

Make = Callable[[Path], tuple[Model, Mapping[str, Json]]]
Say = Callable[[str], None]


class Damaged(Exception):
    """What a place has of an artifact is not whole; the text says what."""


@dataclass(frozen=True)
class File:
    """A file of an artifact: its name relative to the model's folder, its hash and its bytes."""

    name: str
    sha256: str
    size_bytes: int

    @property
    def object(self) -> str:
        """The object with its bytes."""
        return f"files/{self.sha256[:2]}/{self.sha256}"


@dataclass(frozen=True)
class Shared:
    """An artifact as machines share it."""

    manifest: Mapping[str, Json]
    files: tuple[File, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of all its files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Remote:
    """A place where machines share artifacts. `warn` receives what keeps an artifact from being shared, `tell` what was
    carried."""

    objects: Objects
    warn: Say
    tell: Say

    def obtain(self, home: store.Store, build: Build, make: Make, parent: Path, hear: Hear) -> Artifact:
        """The artifact that `home` has; else the one of this place; else `make` builds it. What this place lacks is put
        there. `parent` is the folder of the model that it is made of. This process has to hold home's lock.

        A place that does not answer stops nothing: the artifact is built. Raises KeyboardInterrupt.
        """
        if (found := home.find(build)) is not None:
            self._put(found, hear)
            return found
        with Lease(self.objects, f"leases/{build.id}.json", _words(build.id), self.warn) as lease:
            taken, damaged = self._take(home, build, lease, parent, hear)
            if taken is not None:
                return taken
            built = home.build(build, make)
            self._put(built, hear, anew=damaged)
            return built

    def _take(
        self, home: store.Store, build: Build, lease: Lease, parent: Path, hear: Hear
    ) -> tuple[Artifact | None, bool]:
        """The artifact of this place, waiting while another machine builds it; None once this machine is to build it,
        with the lease. And whether this place has a damaged one."""
        damaged = b""
        while True:
            text = b""
            try:
                text = self.objects.read(_place(build.id)) or b""
                if text and text != damaged:
                    return self._get(home, read_shared(text, build.id), build, parent, hear), False
            except Damaged as error:
                self.warn(f"{_words(build.id)} in {self.objects.url} is damaged, and is not used: {error}")
                damaged = text
            except Unreachable as error:
                self.warn(f"{error.message}; {_words(build.id)} is built here")
                return None, bool(damaged)
            if lease.held:
                return None, bool(damaged)
            lease.take()

    def _get(self, home: store.Store, shared: Shared, build: Build, parent: Path, hear: Hear) -> Artifact:
        """Keep an artifact of this place in `home`. Raises Damaged where a file is not what its hash says."""
        started = time.perf_counter()

        def fill(temporary: Path) -> dict[str, Json]:
            check_room(temporary, shared.size_bytes)
            done = 0
            for file in shared.files:
                target = temporary / store.MODEL / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not self.objects.get(file.object, target, _moved("take", done, shared, file, hear)):
                    raise Damaged(f"{file.name} is not there")
                if identity.of_file(target) != file.sha256:
                    raise Damaged(f"{file.name} does not match its hash")
                done += file.size_bytes
            keep_private(temporary / store.MODEL, parent)
            return dict(shared.manifest)

        artifact = home.place(build, fill, cached=True)
        self.tell(f"{_words(build.id)} taken from {self.objects.url}: {_carried(shared, started)}")
        return artifact

    def _put(self, artifact: Artifact, hear: Hear, anew: bool = False) -> None:
        """Put an artifact here, unless it is here; `anew`: whatever is here. Its files first, then what names them."""
        try:
            if not anew and self.objects.size(_place(artifact.id)) is not None:
                return
            started = time.perf_counter()
            shared = _shared(artifact)
            done = 0
            for file in shared.files:
                if anew or self.objects.size(file.object) != file.size_bytes:
                    source = Path(artifact.path, store.MODEL, file.name)
                    self.objects.put(source, file.object, _moved("put", done, shared, file, hear))
                done += file.size_bytes
            self.objects.write(_place(artifact.id), redaction.redacted(json.dumps(asdict(shared))).encode())
            self.tell(f"{_words(artifact.id)} put into {self.objects.url}: {_carried(shared, started)}")
        except Unreachable as error:
            self.warn(f"{error.message}; other machines build {_words(artifact.id)} themselves")
        except Damaged as error:
            self.warn(f"{_words(artifact.id)} is not put into {self.objects.url}: {error}")


def opened(url: str, warn: Say, tell: Say) -> Remote:
    """The place at a URL, made if it is not there. Raises BadInput for a URL that is not understood and for another
    format, MissingEnvironment for a package that is not installed and where it cannot be read or written."""
    place = objects.at(url)
    there = place.read(MARK)
    if there not in (None, FORMAT):
        raise BadInput(f"{url} holds artifacts of another peftopt", "use that peftopt, or another URL")
    place.write(MARK, FORMAT)
    place.clear()
    return Remote(place, warn, tell)


def read_shared(text: bytes, build_id: str) -> Shared:
    """An artifact from its object's bytes. Raises Damaged for another artifact's, for bytes that are not whole, and for
    names of files that lead elsewhere."""
    try:
        values = json.loads(text)
        manifest: dict[str, Json] = values["manifest"]
        files = tuple(File(**file) for file in values["files"])
        whole = store.is_sealed(manifest) and _content(files) == manifest["content"]
        ours = manifest["build"]["id"] == build_id
        fine = all(_is_fine(file) for file in files)
    except BROKEN as error:
        raise Damaged("its list of files cannot be read") from error
    if not (whole and ours and files):
        raise Damaged("its list of files does not match its hash")
    if not fine:
        raise Damaged("its list of files has names that lead elsewhere")
    return Shared(manifest, files)


def _is_fine(file: File) -> bool:
    """Whether a file lies below its artifact's folder, and its hash may be a part of a name."""
    path = PurePosixPath(file.name)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts and "\0" not in file.name
    return bool(inside and identity.SHA256.fullmatch(file.sha256) and file.size_bytes >= 0)


def _shared(artifact: Artifact) -> Shared:
    """An artifact of this machine, as others are told of it. Raises Damaged where its files have changed."""
    model = Path(artifact.path, store.MODEL)
    files = tuple(File(name, sha256, (model / name).stat().st_size) for name, sha256 in identity.of_files(model))
    if _content(files) != artifact.content:
        raise Damaged("its files on this machine have changed since it was built")
    return Shared(artifact.facts, files)


def _content(files: tuple[File, ...]) -> str:
    """The hash of an artifact's files, as its manifest has it."""
    return identity.of_value([[file.name, file.sha256] for file in files])


def _place(artifact_id: str) -> str:
    return f"artifacts/{artifact_id[:2]}/{artifact_id}.json"


def _words(artifact_id: str) -> str:
    return f"artifact {artifact_id[:12]}"


def _moved(verb: str, before: int, shared: Shared, file: File, hear: Hear) -> objects.Heard:
    """Hears of a part of a file as a share of the whole artifact."""
    return lambda done: hear(Reached(verb, before + done, shared.size_bytes, file.name))


def _carried(shared: Shared, started: float) -> str:
    return f"{format_value('size', shared.size_bytes)} in {time.perf_counter() - started:.1f} s"
