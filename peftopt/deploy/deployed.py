"""What is deployed: the command line of `serve`, what it reads, and what it needs. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from peftopt.deploy.flags import Flag
from peftopt.deploy.times import Times

UPSTREAM = "upstream"
"""In the place of an engine's name: a server that somebody else runs."""


@dataclass(frozen=True)
class Deployed:
    """`flags`: the arguments of `serve`, each with its reason, read in the `folder` that relative paths start from, and
    those that are `left`; `decided`: lines on the run whose decision that is; the `python` that has peftopt.

    `reads`: folders and files, absolute; `keys`: the file of API keys, "" for none; `secret`: the environment variable
    of the operators' key, "" for none; `state`: its folder, absolute; `log`: the folder of the log, "" for none;
    `environments`: the folder of the engines' environments, "" where the engine has none of its own."""

    flags: tuple[Flag, ...]
    folder: str
    python: str
    times: Times
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    reads: tuple[str, ...] = ()
    keys: str = ""
    secret: str = ""
    state: str = "/state"
    log: str = ""
    environments: str = ""
    image: str = "peftopt:latest"
    engine: str = ""
    gpus: int = 0
    cpus: float = 2.0
    memory_gib: float = 8.0
    left: tuple[Flag, ...] = ()
    decided: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of `serve`."""
        return tuple(word for flag in self.flags for word in flag.words)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Lines on the run: what is served, and where each argument comes from; () without a run."""
        if not self.decided:
            return ()
        given = (f"{shlex.join(flag.words)}: {flag.why}" for flag in self.flags)
        left = (f"{', '.join(flag.words)} is left: {flag.why}" for flag in self.left)
        return (*self.decided, *given, *left)

    @property
    def command(self) -> tuple[str, ...]:
        """The command line where nothing else is around it."""
        return (self.python, "-m", "peftopt.cli", "serve", *self.arguments)

    @property
    def supervisor(self) -> tuple[str, ...]:
        """The command line where somebody else starts the workers."""
        return (*self.command, "--workers", str(self.workers), "--join", self.join)

    @property
    def join(self) -> str:
        """The socket that those join at."""
        return f"{self.state}/workers.sock"

    @property
    def contained(self) -> tuple[str, ...]:
        """The arguments in a container: every network, a folder of its own for the state, the log on stdout."""
        inside = ("--host", "0.0.0.0", "--port", "8000", "--state", "/state")  # nosec B104 # in a container of its own
        return (*self.arguments, *inside, *(("--log", "-") if self.log else ()))

    @property
    def written(self) -> tuple[str, ...]:
        """The folders that it writes to, outside of a container."""
        return outermost([self.state, self.log] if self.log else [self.state])

    @property
    def mounts(self) -> tuple[str, ...]:
        """What a container has to see, each at its own path; none lies in another."""
        return outermost(self.reads)


def outermost(paths: Sequence[str]) -> tuple[str, ...]:
    """The paths that lie in no other of them, in order, each once."""
    unique = [PurePosixPath(path) for path in dict.fromkeys(paths)]
    return tuple(str(path) for path in unique if not any(other in path.parents for other in unique))


@dataclass(frozen=True)
class File:
    """A file to write."""

    name: str
    text: str


@dataclass(frozen=True)
class Exported:
    """What was made: `files`, how to use them, and what their reader should know."""

    files: tuple[File, ...]
    use: str
    notes: tuple[str, ...] = field(default=())
