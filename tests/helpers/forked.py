"""Processes of peftopt that begin as copies of one in which what they import is imported: nearly all that a worker on a
tiny model takes is imports of torch, transformers and PEFT, and most of a gateway's start is imports too.

Each is a process of its own, with its own memory, group, folder and environment. Only what a library reads from the
environment while it is imported is that of the first. Engines and workers that a command starts are copies too, of
`WORKERS`, with the first process as their parent.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peftopt import environments, machine
from peftopt.engines import _server
from peftopt.models import rendering
from peftopt.runner import orphans, process

MESSAGE = 1 << 18
PIPED = ("peftopt.worker", "peftopt.models.rendering")
"""Modules that answer on their output what comes by their input."""

DESCRIPTORS = 5
"""Most that come with a message: input, output, errors, where the end is told, and the socket for workers."""


class Copy:
    """As much of a `subprocess.Popen` as those use who start one."""

    def __init__(self, told: int) -> None:
        self.stdin: Any = None
        self.stdout: Any = None
        self.told = os.fdopen(told, "rb")
        self.ending = threading.Lock()
        pid = self.told.readline()
        assert pid, f"the process that others are copies of has ended: import what {__file__} does"
        self.pid = int(pid)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("peftopt", timeout or 0)
            with self.ending:  # another thread may wait too
                if self.returncode is None:
                    self.returncode = os.waitstatus_to_exitcode(int(self.told.readline() or signal.SIGKILL))
        assert self.returncode is not None
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class First:
    """The process that others are copies of; it starts with the first of them."""

    def __init__(self, *imported: str) -> None:
        self.imported = imported
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: socket.socket | None = None
        self.lock = threading.Lock()

    def copy(
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
        module, *arguments = map(str, command)
        asked = {"module": module, "arguments": arguments, "env": environment, "constants": dict(constants or {})}
        asked["cwd"] = str(folder or Path.cwd())
        heard, told = os.pipe()
        beside = [workers.running(environment).fileno()] if workers else []
        socket.send_fds(self.running(environment), [json.dumps(asked).encode()], [*streams, told, *beside])
        os.close(told)
        return Copy(heard)

    def begin(self, said: Path, *command: object, **more: Any) -> Copy:
        """A copy that reads nothing, and that writes what it says to a file."""
        with Path(os.devnull).open() as nothing, said.open("w") as file:
            return self.copy(command, (nothing.fileno(), file.fileno(), file.fileno()), **more)

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
        copy = self.copy(command[3:], (stdin, stdout, errors), given["env"], given.get("cwd"))
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
            return self.copy(command[3:], streams, given["env"])

    def running(self, environment: Mapping[str, str]) -> socket.socket:
        """The socket by which copies are asked for."""
        with self.lock:
            if self.channel is None:
                self._start(environment)
            assert self.channel
            return self.channel

    def _start(self, environment: Mapping[str, str]) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE)
        command = [sys.executable, __file__, str(theirs.fileno()), *self.imported]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        given = {name: value for name, value in environment.items() if name != orphans.MARK}  # it outlives a worker
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=given, **quiet)
        theirs.close()

    def close(self) -> None:
        if self.process and self.channel:
            self.channel.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for processes that a test left behind
                self.process.wait(20)
            self.process.kill()


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
    own = process.subprocess, rendering.subprocess
    process.subprocess = rendering.subprocess = with_popen(popen)
    try:
        yield
    finally:
        process.subprocess, rendering.subprocess = own


def with_popen(popen: Callable[..., Any]) -> Any:
    """The module `subprocess` with another Popen."""
    return SimpleNamespace(**{**vars(subprocess), "Popen": popen})


# ---- in the first process ----------------------------------------------------------------------


def main(number: str, *imported: str) -> None:
    sys.path.pop(0)  # the folder of this file
    sys.path.append(str(Path(__file__).parents[1]))  # and what copies may import from it
    channel = socket.socket(fileno=int(number))
    for name in imported:
        with contextlib.suppress(ImportError):
            __import__(name)
    gc.collect()
    gc.freeze()  # a collection in a copy touches none of this memory, which stays shared
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE, DESCRIPTORS)
        with contextlib.suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, 0 if not message else os.WNOHANG)[0]:
                pass
        if not message:
            return
        if os.fork() == 0:
            channel.close()
            keep(json.loads(message), *descriptors)
        for each in descriptors:
            os.close(each)


def keep(given: dict[str, Any], stdin: int, stdout: int, stderr: int, told: int, *workers: int) -> None:
    """Be the parent of one process, and tell its id and how it ended."""
    if (copy := os.fork()) == 0:
        os.setsid()  # before anybody knows it, since who ends it ends its group
        os.write(told, f"{os.getpid()}\n".encode())
        os.close(told)
        work(given, (stdin, stdout, stderr), *workers)
    for each in (stdin, stdout, stderr, *workers):
        os.close(each)
    _, status = os.waitpid(copy, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(told, f"{status}\n".encode())
    os._exit(0)


def work(given: dict[str, Any], streams: tuple[int, int, int], *workers: int) -> None:
    """Become the process, as `python -m` its module would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, though the tests may run without one
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in set(streams):
        os.close(descriptor)
    os.chdir(given["cwd"])
    os.environ.clear()
    os.environ.update(given["env"])
    if "torch" in sys.modules and "OMP_NUM_THREADS" in os.environ:  # which torch has read when it was imported
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tempfile.tempdir = None  # as the environment says now
    sys.argv[:] = [given["module"], *given["arguments"]]
    path = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*path, *(folder for folder in sys.path if folder not in path)]
    sys.modules.pop(given["module"] if given["module"] in PIPED else f"{given['module']}.__main__", None)
    code = 0
    try:
        for name, value in given["constants"].items():
            module, _, constant = name.partition(":")
            assert hasattr(importlib.import_module(module), constant)
            setattr(importlib.import_module(module), constant, value)
        for descriptor in workers:
            first = First()
            first.channel = socket.socket(fileno=descriptor)
            _server.subprocess = with_popen(first.engine)
            process.subprocess = rendering.subprocess = with_popen(first.worker)
        from helpers import faulty_io  # which the first process finds when it has begun

        if faulty_io.VARIABLE in os.environ:
            faulty_io.planted(os.environ[faulty_io.VARIABLE])
        runpy.run_module(given["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 (told, as Python would)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
