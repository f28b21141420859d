"""Whose Python runs a plug-in: the main one, or an environment with pins of its own in the user's cache.

One file each; the file's name is the environment's. It has a one-line docstring (its help) and one function:

    def builder() -> Builder        the pins for this machine, from a lock file beside it, and how they are installed
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType

from peftopt import identity, machine, plugins
from peftopt.environments._builder import Builder
from peftopt.errors import BadInput, MissingEnvironment, WorkerFailed, unwritable
from peftopt.records import Plugin

MAIN = "main"
PINS = "environment.json"
"""In an environment's folder: what was installed, so that one built from other pins is noticed."""

LAST_LINES = 12
"""Of pip's output, shown when it fails."""


@dataclass(frozen=True)
class Environment:
    """`state` is "missing", "ready" or "outdated" (built from other pins); `size_bytes` what it takes, or about what
    it will."""

    name: str
    help: str
    state: str
    size_bytes: int
    path: Path


def root() -> Path:
    """The folder of environments: $PEFTOPT_ENVIRONMENTS, else below the user's cache."""
    own = os.environ.get("PEFTOPT_ENVIRONMENTS")
    return (
        Path(own)
        if own
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peftopt" / "environments"
    )


def python(name: str) -> str:
    """The interpreter of an environment. Raises WorkerFailed ("missing environment") when it is not there, or was
    built from other pins than this peftopt's."""
    if name == MAIN:
        # a worker in another environment asks too: its parent, which runs in the main one, has told it
        return os.environ.get("PEFTOPT_PYTHON", sys.executable)
    interpreter = root() / name / "bin" / "python"
    if not interpreter.exists():
        hint = f"peftopt env install {name}"
        raise WorkerFailed("missing environment", f"{name} is not at {interpreter.parent.parent}", hint)
    if _outdated(name):
        hint = f"peftopt env install {name} --force"
        raise WorkerFailed("missing environment", f"{name} was built from other pins than this peftopt's", hint)
    return str(interpreter)


def module(name: str, interpreter: str = "") -> list[str]:
    """The beginning of a command that runs a module, by this process's Python where no other is named: never one of
    that name in the current folder, which may be a downloaded model's."""
    return [interpreter or sys.executable, "-P", "-m", name]


def variables(interpreter: str = "") -> dict[str, str]:
    """The environment variables of this process, for one that is to find this very peftopt."""
    path = (_search_path(interpreter), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _search_path(interpreter: str) -> str:
    """The folder in which a Python finds this peftopt. For another environment's it holds nothing else: beside an
    installed peftopt lie the main environment's libraries, which would be taken in place of its own. Raises
    MissingEnvironment where that folder cannot be made."""
    package = Path(__file__).parents[1]
    if interpreter in ("", python(MAIN)):
        return str(package.parent)
    home = root() / f".peftopt.{identity.of_value(str(package))[:12]}"
    link = home / package.name
    try:
        home.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(package)
    except OSError as error:
        raise unwritable(home, error, "choose another folder with $PEFTOPT_ENVIRONMENTS") from error
    return str(home)


def interpreter(plugin: Plugin) -> str:
    """The Python that runs a plug-in. Raises WorkerFailed when its device, a library that it needs or its Python is not
    there."""
    if device := machine.lacks(plugin.device):
        hint = f"run it on a machine with one; here {plugin.name} has nothing to run on"
        raise WorkerFailed("missing environment", f"{plugin.name} needs {device}", hint)
    if plugin.environment == MAIN and (modules := plugins.missing(plugin)):
        own = plugin.technique == "quantize"
        what = "'peftopt[quantize]'" if own else " ".join(name.replace("_", "-") for name in modules)
        raise WorkerFailed("missing library", ", ".join(modules), f"pip install {what}")
    return python(plugin.environment)


def lacking(plugin: Plugin) -> tuple[list[str], str]:
    """What a plug-in lacks on this machine, and the command that brings it, "" where none does; ([], "") when it can
    run."""
    if device := machine.lacks(plugin.device):
        return [device], ""
    try:
        interpreter(plugin)
    except WorkerFailed as error:
        own = [f"environment {plugin.environment}"]
        return plugins.missing(plugin) if plugin.environment == MAIN else own, error.hint
    return [], ""


def names() -> list[str]:
    """Every environment that peftopt can build, installed or not, in alphabetical order."""
    return sorted(f.stem for folder in __path__ for f in Path(folder).glob("*.py") if not f.stem.startswith("_"))


def known() -> list[Environment]:
    """Every environment that peftopt can build, installed or not."""
    return [_describe(name) for name in names()]


def versions() -> dict[str, Mapping[str, str]]:
    """By environment, the libraries that shape what is made in it: the main one's as installed, the others' pins."""
    pinned = {name: _builder(name).versions() for name in names()}
    return {MAIN: machine.versions(), **pinned}


def install(name: str, force: bool, tell: Callable[[str], None]) -> Environment:
    """Build an environment under a temporary name and move it into place whole; `tell` hears what is going on.

    One that is there already is kept unless `force`. Raises MissingEnvironment when this machine lacks something that
    the build takes, or with pip's last lines when pip fails.
    """
    builder = _builder(name)
    builder.check()
    with _locked(name):
        present = _describe(name)
        if present.state == "ready" and not force:
            return present
        temporary = root() / f".{name}.{os.getpid()}"
        try:
            tell("making the virtual environment")
            _run([*module("venv"), str(temporary)], tell)

            def run(name: str, *arguments: str, **variables: str) -> None:
                _run([*module(name, str(temporary / "bin" / "python")), *arguments], tell, variables)

            builder.build(builder, temporary, run)
            (temporary / PINS).write_text(json.dumps({"requirements": builder.identity()}, indent=1))
            _readdress(temporary, root() / name)
            remove(name, missing_ok=True)
            temporary.rename(root() / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return _describe(name)


def remove(name: str, missing_ok: bool = False) -> int:
    """Delete an environment; returns the bytes that are free again. Raises BadInput when it is not installed."""
    present = _describe(name)
    if present.state == "missing":
        if missing_ok:
            return 0
        raise BadInput(f"environment {name} is not installed", "peftopt env list")
    aside = present.path.with_name(f".{name}.{os.getpid()}.old")
    present.path.rename(aside)  # gone for others at once, however long the deleting takes
    shutil.rmtree(aside)
    return present.size_bytes


def _module(name: str) -> ModuleType:
    if name not in names():
        raise BadInput(f"no environment named {name!r}", f"known: {', '.join(names())}")
    return importlib.import_module(f"peftopt.environments.{name}")


def _builder(name: str) -> Builder:
    builder: Builder = _module(name).builder()
    return builder


def _describe(name: str) -> Environment:
    folder = root() / name
    help_ = (_module(name).__doc__ or "").strip().splitlines()[0]
    if not (folder / "bin" / "python").exists():
        return Environment(name, help_, "missing", _builder(name).megabytes * 10**6, folder)
    return Environment(name, help_, "outdated" if _outdated(name) else "ready", _size(folder), folder)


def _outdated(name: str) -> bool:
    """Whether it was built from other pins. One that somebody made by hand tells of none, and is taken as it is."""
    pins = root() / name / PINS
    if not pins.exists() or name not in names():
        return False
    return bool(json.loads(pins.read_text())["requirements"] != _builder(name).identity())


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """One builder at a time; what a killed one left half made is removed."""
    try:
        root().mkdir(parents=True, exist_ok=True)
        handle = (root() / f".{name}.lock").open("w")
    except OSError as error:
        raise unwritable(root(), error, "choose another folder with $PEFTOPT_ENVIRONMENTS") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for left in root().glob(f".{name}.[0-9]*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _run(command: list[str], tell: Callable[[str], None], variables: Mapping[str, str] = MappingProxyType({})) -> None:
    """Run a builder's command line by line. Raises MissingEnvironment with its last lines when it fails."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_PROGRESS_BAR": "off", "PYTHONUNBUFFERED": "1"}
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**clean, **quiet, **variables},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip())
            tell(line.strip())
    if process.returncode:
        what = " ".join(Path(part).name if n == 0 else part for n, part in enumerate(command))
        lines = "\n".join(f"  {line}" for line in last if line.strip())
        raise MissingEnvironment(f"`{what}` failed:\n{lines}", "check the network, the disk and the compiler")


def _readdress(made: Path, final: Path) -> None:
    """Scripts name the interpreter by its path: let them name the one that it will have."""
    for script in (made / "bin").iterdir():
        if script.is_file() and not script.is_symlink():
            text = script.read_bytes()
            if b"\0" not in text:
                script.write_bytes(text.replace(os.fsencode(made), os.fsencode(final)))
