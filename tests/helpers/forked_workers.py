"""Worker processes that begin as copies of one in which the libraries are imported: nearly all that a worker on a tiny
model takes is imports of torch, transformers and PEFT.

Each is a process of its own, with its own memory, group, folder and environment. Only what a library reads from the
environment while it is imported is that of the first.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peftopt.runner import process

IMPORTED = (
    *("torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "torchao", "safetensors.torch"),
    *("peftopt.worker", "peftopt.engines.eager", "peftopt.merging.kernel", "peftopt.probes.quality"),
    *("peftopt.probes.speed", "peftopt.probes.load"),
)
MESSAGE = 1 << 18


class Forked:
    """As much of a `subprocess.Popen` as a WorkerProcess uses."""

    def __init__(self, stdin: int, stdout: int, told: int) -> None:
        self.stdin, self.stdout, self.told = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb"), os.fdopen(told, "rb")
        pid = self.told.readline()
        assert pid, f"the process that workers are copies of has ended: import what {__file__} does"
        self.pid = int(pid)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("peftopt.worker", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self.told.readline()))
            self.told.close()
        return self.returncode


class First:
    """The process that workers are copies of; it starts with the first of them."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def popen(self, command: list[str], **given: Any) -> Any:
        """In the place of `subprocess.Popen`."""
        if command != [sys.executable, "-m", "peftopt.worker"]:
            return subprocess.Popen(command, **given)
        with self.lock:
            if self.process is None:
                self.start(given["env"])
        (stdin, ours_in), (ours_out, stdout), (ours_told, told) = os.pipe(), os.pipe(), os.pipe()
        message = json.dumps({"env": dict(given["env"]), "cwd": str(given["cwd"])}).encode()
        socket.send_fds(self.channel, [message], [stdin, stdout, given["stderr"].fileno(), told])
        for end in (stdin, stdout, told):
            os.close(end)
        return Forked(ours_in, ours_out, ours_told)

    def start(self, environment: dict[str, str]) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE)
        command = [sys.executable, __file__, str(theirs.fileno())]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, **quiet)
        theirs.close()

    def close(self) -> None:
        if self.process:
            self.channel.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for workers that a test left behind
                self.process.wait(20)
            self.process.kill()


@contextlib.contextmanager
def starting_by(popen: Callable[..., Any]) -> Iterator[None]:
    """Worker processes are started by this in the place of `subprocess.Popen`."""
    own = process.subprocess
    process.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    try:
        yield
    finally:
        process.subprocess = own


# ---- in the first process ----------------------------------------------------------------------


def main() -> None:
    sys.path.pop(0)  # the folder of this file
    channel = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            __import__(name)
    gc.collect()
    gc.freeze()  # a collection in a copy touches none of this memory, which stays shared
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE, 4)
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


def keep(given: dict[str, Any], stdin: int, stdout: int, stderr: int, told: int) -> None:
    """Be the parent of one worker, and tell its id and how it ended."""
    if (worker := os.fork()) == 0:
        os.close(told)
        work(given, stdin, stdout, stderr)
    for each in (stdin, stdout, stderr):
        os.close(each)
    os.write(told, f"{worker}\n".encode())
    _, status = os.waitpid(worker, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(told, f"{status}\n".encode())
    os._exit(0)


def work(given: dict[str, Any], stdin: int, stdout: int, stderr: int) -> None:
    """Become the worker, as `python -m peftopt.worker` would."""
    os.setsid()
    for number, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(given["cwd"])
    os.environ.clear()
    os.environ.update(given["env"])
    sys.argv[:] = ["peftopt.worker"]
    path = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*path, *(folder for folder in sys.path if folder not in path)]
    sys.modules.pop("peftopt.worker", None)
    code = 0
    try:
        runpy.run_module("peftopt.worker", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 (told, as Python would)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
