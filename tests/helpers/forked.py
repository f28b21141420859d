"""Processes of peftopt that begin as copies (peftopt/forking) of one in which what they import is imported: nearly all
that a worker on a tiny model takes is imports of torch, transformers and PEFT, and most of a gateway's start is imports
too. Engines and workers that a command starts are copies too, of `WORKERS`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peftopt import environments, forking, machine
from peftopt.engines import _server
from peftopt.forking import BESIDE, Copy, ForkServer
from peftopt.forking.__main__ import run
from peftopt.models import rendering
from peftopt.runner import orphans, process

PIPED = ("peftopt.worker", "peftopt.models.rendering")
"""Modules that answer on their output what comes by their input."""

TESTS = Path(__file__).parents[1]
USABLE = forking.usable


class First(ForkServer):
    """The process that others are copies of; it starts with the first of them, and outlives a test."""

    def __init__(self, *imported: str) -> None:
        super().__init__(imported)

    def program(
        self,
        command: Sequence[object],
        streams: tuple[int, int, int],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        constants: Mapping[str, object] | None = None,
        workers: First | None = None,
    ) -> Copy:
        """A process that runs `python -m` a module with arguments, the `command`. `constants`: other values than the
        modules have, by "module:NAME". `workers`: engines and workers that the process starts are copies of that
        one."""
        environment = dict(os.environ if environment is None else environment)
        self.asked_for(environment)
        beside = [workers.asked_for(environment).fileno()] if workers else []
        path = os.pathsep.join(filter(None, [environment.get("PYTHONPATH", ""), str(TESTS)]))
        given = [json.dumps(dict(constants or {})), "workers" if workers else ""]
        words = ["helpers.forked", *given, *map(str, command)]
        return self.copy(words, streams, {**environment, "PYTHONPATH": path}, folder or Path.cwd(), beside)

    def asked_for(self, environment: Mapping[str, str]) -> socket.socket:
        """The socket by which copies are asked for; the process starts with these variables, if it has to."""
        self.environment = self.environment or unmarked(environment)
        return self.channel()

    def begin(self, said: Path, *command: object, **more: Any) -> Copy:
        """A copy that reads nothing, and that writes what it says to a file."""
        with Path(os.devnull).open() as nothing, said.open("w") as file:
            return self.program(command, (nothing.fileno(), file.fileno(), file.fileno()), **more)

    def output(self, *command: object, timeout_s: float) -> tuple[int, str]:
        """The exit code of a copy that ends by itself, and what it has said."""
        with tempfile.TemporaryDirectory() as folder:
            copy = self.begin(Path(folder, "said"), *command)
            try:
                copy.wait(timeout_s)
            finally:
                copy.kill()
            return copy.wait(), Path(folder, "said").read_text()

    def worker(self, command: list[str], **given: Any) -> Any:
        """A worker process, or one that renders templates, in the place of `subprocess.Popen`."""
        if command not in [environments.module(name) for name in PIPED]:
            return subprocess.Popen(command, **given)
        (stdin, ours_in), (ours_out, stdout) = os.pipe(), os.pipe()
        errors = given["stderr"].fileno() if "stderr" in given else 2
        copy: Any = self.program(command[3:], (stdin, stdout, errors), given["env"], given.get("cwd"))
        os.close(stdin)
        os.close(stdout)
        binary = "" if given.get("text") else "b"
        copy.stdin, copy.stdout = os.fdopen(ours_in, f"w{binary}"), os.fdopen(ours_out, f"r{binary}")
        return copy

    def engine(self, command: Sequence[str], **given: Any) -> Any:
        """An engine's server, in the place of `subprocess.Popen`."""
        if list(command[:4]) != environments.module("peftopt.server"):
            return subprocess.Popen(command, **given)
        with Path(os.devnull).open() as nothing:
            streams = (nothing.fileno(), given["stdout"].fileno(), given["stderr"].fileno())
            return self.program(command[3:], streams, given["env"])


def unmarked(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without the mark of a worker, which the first process outlives."""
    return {name: value for name, value in environment.items() if name != orphans.MARK}


WORKERS = First(
    *("torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "torchao", "safetensors.torch"),
    *("peftopt.worker", "peftopt.engines.eager", "peftopt.merging.kernel", "peftopt.probes.quality"),
    *(
        "transformers.utils.chat_template_utils",
        "peftopt.probes.speed",
        "peftopt.probes.load",
        "peftopt.server.__main__",
        "peftopt.engines._rows",
        "uvicorn",
    ),
)
COMMANDS = First(
    *("peftopt.cli", "peftopt.cli.console", "peftopt.gateway.run", "peftopt.gateway.backends", "peftopt.gateway.admin"),
    *("peftopt.gateway.decided", "peftopt.runner.preflight", "peftopt.loadtest.protocols.chat", "aiohttp", "fastapi"),
    *("uvloop", "uvicorn.protocols.http.httptools_impl", "uvicorn.lifespan.off", "prometheus_client", "pydantic.v1"),
)


def workers() -> First | None:
    """What workers and engines are copies of; None where each has to start from nothing: copies cannot share a GPU."""
    return None if machine.gpus() else WORKERS


@contextlib.contextmanager
def starting_by(popen: Callable[..., Any]) -> Iterator[None]:
    """Worker processes are started by this in the place of `subprocess.Popen`."""
    own = process.subprocess, rendering.subprocess, forking.usable
    process.subprocess = rendering.subprocess = with_popen(popen)
    forking.usable = USABLE if popen is subprocess.Popen else lambda: False
    try:
        yield
    finally:
        process.subprocess, rendering.subprocess, forking.usable = own


def with_popen(popen: Callable[..., Any]) -> Any:
    """The module `subprocess` with another Popen."""
    return SimpleNamespace(**{**vars(subprocess), "Popen": popen})


# ---- in a copy ---------------------------------------------------------------------------------


def main(constants: str, copies: str, module: str, *arguments: str) -> None:
    """Become the program: set the constants, have workers and engines start as copies, and run the module."""
    for name, value in json.loads(constants).items():
        owner, _, constant = name.partition(":")
        assert hasattr(importlib.import_module(owner), constant)
        setattr(importlib.import_module(owner), constant, value)
    if copies:
        first = First()
        first._channel = socket.socket(fileno=BESIDE)
        _server.subprocess = with_popen(first.engine)
        process.subprocess = rendering.subprocess = with_popen(first.worker)
        forking.usable = lambda: False
    from helpers import faulty_io

    if faulty_io.VARIABLE in os.environ:
        faulty_io.planted(os.environ[faulty_io.VARIABLE])
    sys.argv[:] = [module, *arguments]
    run(module)


if __name__ == "__main__":
    main(*sys.argv[1:])
