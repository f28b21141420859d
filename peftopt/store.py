"""The results folder: content-addressed artifacts and append-only measurements. A path that exists is whole."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from peftopt import corpus, identity
from peftopt.errors import BROKEN, BadInput, Occupied, unwritable
from peftopt.measurements import PROBES, Measured, measured
from peftopt.metrics import METRICS, counted, format_value
from peftopt.records import FORMAT, Artifact, Build, Json, Measurement, Model, Plan
from peftopt.redaction import redacted

MANIFEST = "artifact.json"
MODEL = "model"
SEAL = "manifest_sha256"
"""The key of a manifest's own hash."""

ARTIFACT = re.compile("[0-9a-f]{64}")
"""The pattern of an artifact's id: a hash, which is a part of paths."""

LOCK_LOOK_S = 0.2
"""Seconds between two attempts to take a lock that another process holds."""


def _never(within_s: float) -> bool:
    """Wait without a possible interrupt."""
    time.sleep(within_s)
    return False


@dataclass(frozen=True)
class Store:
    """The results folder. `warn` receives a text for everything that was repaired or dropped."""

    root: Path
    warn: Callable[[str], None] = lambda _: None

    def check_writable(self) -> None:
        """Raises MissingEnvironment when results cannot be written here. Leaves no file behind."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise unwritable(self.root, error, "choose another folder with --results") from error

    def folder(self, artifact_id: str) -> Path:
        """The folder of an artifact, which may not exist yet."""
        return self.root / "artifacts" / artifact_id[:2] / artifact_id

    def cache(self, artifact_id: str) -> Path:
        """The folder for an engine's compiled graphs of this model, outside the artifact; see `claim`."""
        return claim(self.root / "cache" / (artifact_id[:16] or "source"))

    def find(self, build: Build) -> Artifact | None:
        """The artifact, its files checked by their hash. A damaged artifact is moved aside and counts as missing."""
        folder = self.folder(build.id)
        if not folder.exists():
            return None
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            artifact = _artifact(folder, manifest, cached=True)
            whole = is_sealed(manifest) and identity.of_folder(folder / MODEL) == artifact.content
            damage = "" if whole else "does not match its hash"
        except (OSError, *BROKEN) as error:
            damage = f"cannot be read ({type(error).__name__}: {error})"
        if damage:
            aside = unused(folder.with_name(f"{folder.name}.damaged.{os.getpid()}"))
            folder.rename(aside)
            self.warn(f"artifact {build.id[:12]} {damage}: moved to {aside}, building it again")
            return None
        return artifact

    @contextlib.contextmanager
    def locked(self, build: Build, interrupted: Callable[[float], bool] = _never) -> Iterator[None]:
        """Lock an artifact for one builder; the kernel frees the lock of a dead process. While waiting, warns once who
        holds the lock, and calls `interrupted` again and again. Each call waits for at most the given seconds; when it
        returns true, raises KeyboardInterrupt."""
        folder = self.folder(build.id)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("a+", encoding="utf-8") as handle:
            what, waits = f"artifact {build.id[:12]}", False
            while not _locks(handle):
                if not waits:
                    self.warn(f"{what} is being built by {_holder(handle)}: waiting for it")
                waits = True
                if interrupted(LOCK_LOOK_S):
                    raise KeyboardInterrupt
            if (dead := _holder(handle, "")) and not waits:
                self.warn(f"{what} was left half built by {dead}, which has ended: taken over")
            _sign(handle)
            try:
                yield
            finally:
                handle.truncate(0)

    def clear(self) -> None:
        """Remove the leftovers of killed builders, and say how large they were. Running builds stay."""
        freed = 0
        for half in self.root.glob("artifacts/*/*.tmp.*"):
            lock = half.with_name(half.name.partition(".")[0] + ".lock")
            with lock.open("a+", encoding="utf-8") as handle:
                if _locks(handle):
                    freed += size(half)
                    shutil.rmtree(half, ignore_errors=True)
        tell_removed(freed, self.root / "artifacts", self.warn)

    def model(self, artifact_id: str, source: Model) -> Model:
        """The model of an artifact; for "", the recipe's own `source`. A baked prompt replaces the adapter, on its
        parent's base. Unmerged adapters are the source's, wherever they lie now: an artifact's id depends on contents,
        not on paths."""
        if not artifact_id:
            return source
        folder = self.folder(artifact_id)
        manifest = json.loads((folder / MANIFEST).read_text())
        parent = self.model(manifest["build"]["parent"], source)
        if manifest.get("on_parent"):
            return Model(parent.path, (str(folder / MODEL),))
        return Model(str(folder / MODEL), parent.adapters if manifest["adapters"] else ())

    def build(self, build: Build, make: Callable[[Path], tuple[Model, Mapping[str, Json]]]) -> Artifact:
        """Build an artifact. `make` fills the given folder."""

        def fill(temporary: Path) -> dict[str, Json]:
            model, facts = make(temporary / MODEL)
            on_parent = model.path != str(temporary / MODEL)
            manifest: dict[str, Json] = {
                "format": FORMAT,
                "build": asdict(build),
                "content": identity.of_folder(temporary / MODEL),
                "size_bytes": size(temporary / MODEL) + (size(Path(model.path)) if on_parent else 0),
                "on_parent": on_parent,
                "adapters": bool(model.adapters) and not on_parent,
                **facts,
            }
            return {**manifest, SEAL: _seal(manifest)}

        return self.place(build, fill, cached=False)

    def place(self, build: Build, fill: Callable[[Path], dict[str, Json]], cached: bool) -> Artifact:
        """Put an artifact into its place, whole or not at all. `fill` writes the model to MODEL below the given folder,
        and returns the manifest. `cached`: whether it was built before. This process has to hold the lock."""
        folder = self.folder(build.id)
        for orphan in folder.parent.glob(f"{folder.name}.tmp.*"):
            shutil.rmtree(orphan)  # this process holds the lock, so the writer is dead
        temporary = folder.with_name(f"{folder.name}.tmp.{os.getpid()}")
        try:
            temporary.mkdir(parents=True)
            manifest = fill(temporary)
            write(temporary / MANIFEST, json.dumps(manifest, indent=1))
            move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return _artifact(folder, manifest, cached)


def is_sealed(manifest: Mapping[str, Json]) -> bool:
    """Whether a manifest has its own hash, or none: an older peftopt wrote none."""
    return manifest.get(SEAL) in (None, _seal(manifest))


def _seal(manifest: Mapping[str, Json]) -> str:
    """The hash of a manifest's values, as they are after writing and reading."""
    return identity.of_value(json.loads(json.dumps({key: each for key, each in manifest.items() if key != SEAL})))


def _artifact(folder: Path, manifest: dict[str, Json], cached: bool) -> Artifact:
    return Artifact(
        id=manifest["build"]["id"],
        path=str(folder),
        content=manifest["content"],
        size_bytes=manifest["size_bytes"],
        seconds=manifest["seconds"],
        cached=cached,
        facts=manifest,
    )


# ---- a run's folder ----------------------------------------------------------------------------


def append(path: Path, *measurements: Measurement, hint: str = "") -> None:
    """Add a line for each measurement, without secrets. The lines are on disk before this returns. A lone surrogate,
    which UTF-8 cannot hold, is written as its JSON escape."""
    lines = [json.dumps({"format": FORMAT, **asdict(each)}, ensure_ascii=False) for each in measurements]
    text = "".join(redacted(line) + "\n" for line in lines)
    try:
        add_lines(path, text)
    except OSError as error:
        raise unwritable(path, error, hint, needed=len(text)) from error


def add_lines(path: Path, text: str) -> None:
    """Add whole lines to a file, or none of them. They are on disk before this returns. First cuts off half a line that
    a killed process left at the end. Raises OSError."""
    cut_torn_line(path)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as handle:
        before = os.fstat(handle.fileno()).st_size
        try:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise


BY_RECIPE = "by_recipe"
"""The folder of a results folder where each run leaves a note, an empty file. So the runs of a recipe are found
without a list of all runs."""


def note(run: Path, recipe: str) -> None:
    """Leave a note of a run, below its recipe's name. Raises MissingEnvironment where it cannot be written."""
    file = _notes(run.parents[1], recipe) / run.name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise unwritable(file, error, "choose another folder with --results") from error


def noted(root: Path, recipe: str) -> list[str]:
    """The names of a recipe's runs that left a note in this results folder. A run may be removed since. A run of an
    older peftopt, and one that was copied here, has no note."""
    folder = _notes(root, recipe)
    return [file.name for file in folder.iterdir()] if folder.is_dir() else []


def _notes(root: Path, recipe: str) -> Path:
    return root / BY_RECIPE / recipe


OWNER = ".owner"
"""The file of a run folder that a measuring process locks; its text names the process."""


def own(folder: Path, warn: Callable[[str], None] = lambda _: None) -> TextIO:
    """Lock a run folder for this process, until `disown` or the end of the process.

    Raises Occupied, which names the other process, if another process has the lock.
    """
    try:
        handle = (folder / OWNER).open("a+", encoding="utf-8")
    except OSError as error:
        raise unwritable(folder / OWNER, error) from error
    before = _holder(handle, "")
    if not _locks(handle):
        handle.close()
        hint = "wait until it ends, or stop it: two processes on one machine would slow each other down"
        raise Occupied(f"{folder} is being measured by {before or 'another process'}", hint)
    if before:
        warn(f"{folder.name} was left unfinished by {before}")
    _sign(handle)
    return handle


def _locks(handle: TextIO) -> bool:
    """Take the lock of a file, unless another process has it. Returns whether it was taken."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(handle: TextIO, unknown: str = "another process") -> str:
    """The process that has written its name into a lock's file."""
    handle.seek(0)
    return handle.read() or unknown


def _sign(handle: TextIO) -> None:
    """Write this process's name into a lock's file; on a full disk, the name is lost."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle.fileno(), 0)
        os.write(handle.fileno(), signature().encode())


def signature() -> str:
    """How a lock names this process as its holder."""
    return f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


def owner(folder: Path) -> str:
    """The process that measures in a folder, by its owner file; "" for none, and for a dead process of this machine."""
    try:
        text = (folder / OWNER).read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return ""
    words = text.split()
    here = len(words) > 3 and words[1].isdigit() and words[3] == socket.gethostname()
    return "" if here and not is_alive(int(words[1])) else text


def disown(handle: TextIO) -> None:
    """Unlock a run folder that `own` locked."""
    handle.truncate(0)
    handle.close()


FINISHED = ".finished"
"""The file of a run folder that marks a run with all its measurements."""


def is_finished(folder: Path) -> bool:
    """Whether a run has measured everything. A run of an older peftopt has no owner file: it had, if it is decided."""
    old = not (folder / OWNER).exists() and (folder / "decision.json").exists()
    return old or (folder / FINISHED).exists()


def is_interrupted(folder: Path) -> bool:
    """Whether a run still measures, or stopped before it had measured everything."""
    return (folder / OWNER).exists() and not is_finished(folder)


def cut_torn_line(path: Path) -> None:
    """Cut off an incomplete last line, which a killed process left, so that the next text starts a new line."""
    if not path.exists() or _ends_a_line(path):
        return
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - 1))
        return handle.read() in (b"", b"\n")


def read_object(path: Path) -> dict[str, Json]:
    """The JSON object in a file of a run folder. Raises BadInput for a file without one."""
    try:
        value = json.loads(read_text(path))
    except BROKEN as error:
        raise BadInput(f"{path} is not JSON: {error}", "restore the file or run again") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds no JSON object", "restore the file or run again")
    return value


def read_plan(path: Path) -> Plan:
    """The plan of a run folder. Raises BadInput for a file that is not a plan."""
    import cattrs

    hint = "run the recipe again"
    try:
        check_file(path)
        plan = cattrs.structure(json.loads(path.read_text(encoding="utf-8")), Plan)
    except OSError as error:
        hint = "give a folder below results/runs, or for imported measurements their recipe too: --recipe"
        raise BadInput(f"no run at {path.parent}: {error.strerror}", hint) from error
    except (cattrs.BaseValidationError, *BROKEN) as error:
        raise BadInput(f"{path} is not a plan of this peftopt", hint) from error
    if unknown := _unknown(plan):
        raise BadInput(f"{path} names {unknown}, which it does not hold", hint)
    return plan


def _unknown(plan: Plan) -> str:
    """The first thing that a plan refers to and does not contain, in words; "" for a complete plan."""
    recipe, artifacts = plan.recipe, {"", *(build.id for build in plan.builds)}
    for what, by_name in (("variant", recipe.variants), ("workload", recipe.workloads)):
        for name, each in by_name.items():
            if each.name != name:
                return f"the {what} {each.name!r}"
    if recipe.baseline not in recipe.variants:
        return f"the baseline {recipe.baseline!r}"
    if not recipe.variants.keys() <= plan.models.keys():
        return "models of other variants"
    if recipe.minimize.name not in METRICS or recipe.minimize.workload not in {"", *recipe.workloads}:
        return f"the metric {str(recipe.minimize)!r}"
    if strange := next((id_ for id_ in artifacts if id_ and not ARTIFACT.fullmatch(id_)), ""):
        return f"the artifact {strange!r}"  # a path that would lead elsewhere
    strangers = {*plan.models.values(), *(build.parent for build in plan.builds)} - artifacts
    return f"the artifact {min(strangers)!r}" if strangers else ""


def read(path: Path, warn: Callable[[str], None] = lambda _: None) -> list[Measured]:
    """All measurements of a run. Leaves out, with a warning, an incomplete last line (of a killed process) and lines of
    an unknown probe (of a newer peftopt). The file stays as it is.

    Raises BadInput, which names the line and the field, for another format version, a broken line before the last, and
    values that do not fit the line's probe.
    """
    if not path.exists():
        return []
    check_file(path)
    raw = path.read_bytes()
    whole, _, torn = raw.rpartition(b"\n")
    if torn:
        warn(f"{path}: dropped a torn last line of {len(torn)} bytes")
    lines = [(number, _measurement(path, number, line)) for number, line in corpus.lines(whole)]
    unknown: dict[str, list[int]] = {}
    for number, line in lines:
        if str(line.probe) not in PROBES:
            unknown.setdefault(str(line.probe), []).append(number)
    for probe, numbers in unknown.items():
        left_out = f"{counted(len(numbers), 'line')} left out, first line {numbers[0]}"
        warn(f"{path}: no probe is named {probe!r}: {left_out}")
    return [measured(line, f"{path}:{number}") for number, line in lines if str(line.probe) not in unknown]


def _measurement(path: Path, number: int, line: bytes) -> Measurement:
    try:
        values = json.loads(corpus.text_of(line))
        version = values.pop("format")
        if version == FORMAT:
            return Measurement(**values)
    except BROKEN as error:
        raise BadInput(f"{path}:{number} is not a measurement", "restore the file or run again") from error
    raise BadInput(
        f"{path}:{number} has format {version}, this peftopt reads {FORMAT}", "use the peftopt that wrote it"
    )


def check_file(path: Path) -> None:
    """Raises BadInput for a pipe, a socket or a device, which may never end, and OSError for a missing file."""
    if not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)):
        raise BadInput(f"{path} is not a file but a pipe, a socket or a device", "remove it, or restore the file")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises BadInput if it cannot be read, is not UTF-8, or has more than 100 MB."""
    try:
        check_file(path)
        if path.stat().st_size > 100_000_000:
            raise BadInput(f"{path} is {path.stat().st_size / 1e6:.0f} MB", "a text file is expected here")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text", "save it as UTF-8") from error


def write(path: Path, text: str, hint: str = "") -> None:
    """Write a file whole or not at all, without secrets. Raises MissingEnvironment, with the hint, if it cannot be
    written; an existing file then stays as it was."""
    remove_orphans(path)
    text = redacted(text)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise unwritable(path, error, hint, needed=len(text)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_orphans(path: Path) -> int:
    """Remove half-written files and folders of killed processes: `.NAME.PID.…` beside this path. Returns their
    bytes."""
    freed = 0
    for orphan in path.absolute().parent.glob(f".{glob.escape(path.name)}.*.*"):
        owner = orphan.name.removeprefix(f".{path.name}.").partition(".")[0]
        if not owner.isdigit() or is_alive(int(owner)):
            continue
        if orphan.is_dir() and not orphan.is_symlink():
            freed += size(orphan)
            shutil.rmtree(orphan, ignore_errors=True)
        else:
            freed += orphan.lstat().st_size
            orphan.unlink(missing_ok=True)
    return freed


def tell_removed(freed: int, where: Path, warn: Callable[[str], None]) -> None:
    """Warn of removed leftovers of dead processes, if there were any."""
    if freed:
        warn(f"removed {format_value('size', freed)} that interrupted work left in {where}")


def is_alive(process: int) -> bool:
    """Whether a process with this id runs, whoever its user is."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


ROOT = 0
"""The id of root, whose files no other user can have written, such as those of a container's image."""


def claim(folder: Path) -> Path:
    """Make a folder for compiled graphs, or check an existing one. Loading a graph runs code, since torch stores graphs
    as pickles. So this raises BadInput if others may have written there: if the folder (behind links) belongs to
    another user, or if every user may write to it or to a folder above it. Raises MissingEnvironment if the folder
    cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error, "compiled graphs are kept there: make its folder writable") from error
    home = folder.resolve()
    hint = "code from a compile cache is run: work in a folder of your own, where it is compiled again"
    if home.stat().st_uid not in (os.getuid(), ROOT):
        raise BadInput(f"the compile cache {folder} belongs to another user", hint)
    for place in (home, *home.parents):
        mode = place.stat().st_mode
        keeps_owners = place != home and mode & stat.S_ISVTX  # such as /tmp: only owners may rename their files
        if mode & stat.S_IWOTH and not keeps_owners:
            raise BadInput(f"the compile cache {folder} is not safe: every user may write to {place}", hint)
    return folder


def unused(path: Path) -> Path:
    """The path, or the first of PATH.2, PATH.3, … that does not exist, so that no file is replaced."""
    others = (path.with_name(f"{path.name}.{n}") for n in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], others) if not os.path.lexists(candidate))


def move(folder: Path, to: Path) -> None:
    """Rename a finished folder. Its files and its name are on disk before this returns."""
    settle(folder)
    folder.rename(to)
    _sync(to.absolute().parent)


def absorb(folder: Path, into: Path) -> None:
    """Move the files of a folder into another on the same disk. They replace files of the same name."""
    for file in [f for f in folder.rglob("*") if f.is_file()]:
        target = into / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    shutil.rmtree(folder, ignore_errors=True)


def size(folder: Path) -> int:
    """Bytes of all files in a folder. A link counts as its target."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def settle(folder: Path) -> None:
    """Wait until a folder's files and names are on disk, safe from a power cut."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
