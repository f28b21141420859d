"""Start processes of peftopt as copies (`fork`) of one that has imported their libraries already, a fork server.

A worker's imports of torch, transformers and PEFT take seconds; a copy of a process that has them takes milliseconds.
Each copy is a process of its own, with its own memory, group, folder and environment. Only what a library reads from
the environment while it is imported is that of the fork server. The fork server itself is in __main__.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

from peftopt import environments, machine

MESSAGE = 1 << 18
"""Most bytes of a request: nearly all of it is environment variables."""

STREAMS = 3
BESIDE = 64
"""The first number of a copy's further descriptors."""

END_S = 5.0
"""A fork server without a channel ends at once; later than this it is killed."""

MODELS = ("peftopt.models.importing:torch_side", "peftopt.engines.eager")
"""What opens a model: `module` or `module:function`, a function without arguments that imports."""


class Process(Protocol):
    """As much of a `subprocess.Popen` as peftopt uses of a worker or a server."""

    pid: int
    stdin: IO[bytes] | None
    stdout: IO[bytes] | None
    returncode: int | None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired after so many seconds."""

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""

    def kill(self) -> None:
        """Send SIGKILL, if it has not ended."""


class Copy:
    """A process that began as a copy of a fork server; see `Process`. `told`: where the fork server writes its id and,
    at its end, how it ended."""

    def __init__(self, told: int) -> None:
        """Raises ChildProcessError when the fork server has ended."""
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.returncode: int | None = None
        self._told = os.fdopen(told, "rb")
        self._ending = threading.Lock()
        own = self._told.readline()
        if not own:
            self._told.close()
            raise ChildProcessError("the fork server has ended")
        self.pid = int(own)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired after so many seconds."""
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("peftopt", timeout or 0)
            with self._ending:  # another thread may wait too
                if self.returncode is None:
                    self.returncode = os.waitstatus_to_exitcode(int(self._told.readline() or signal.SIGKILL))
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, if it has not ended."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A process that forks itself on request. It starts with the first copy; as a context manager, it and its copies
    end with it.

    `imported`: what it imports, see MODELS. `environment`: its variables. `log`: where its errors go, by default
    nowhere.
    """

    def __init__(
        self, imported: Sequence[str] = MODELS, environment: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        self.imported = imported
        self.environment = environment
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()

    def copy(
        self,
        command: Sequence[str],
        streams: tuple[int, int, int],
        environment: Mapping[str, str],
        folder: Path,
        beside: Sequence[int] = (),
    ) -> Copy:
        """A copy that runs `python -m` a module with arguments, the `command`, in a folder and in a session of its own.

        `streams`: its stdin, stdout and stderr. `beside`: further descriptors, which it finds from number BESIDE on.
        Raises ChildProcessError when the fork server has ended.
        """
        module, *arguments = command
        asked = {"module": module, "arguments": arguments, "environment": dict(environment), "folder": str(folder)}
        heard, told = os.pipe()
        try:
            socket.send_fds(self.channel(), [json.dumps(asked).encode()], [told, *streams, *beside])
        except OSError as error:
            os.close(heard)
            raise ChildProcessError(f"the fork server has ended: {error}") from error
        finally:
            os.close(told)
        return Copy(heard)

    def piped(self, command: Sequence[str], errors: int, environment: Mapping[str, str], folder: Path) -> Copy:
        """A copy whose stdin and stdout are pipes to this process. Raises ChildProcessError when the fork server has
        ended."""
        (stdin, ours_in), (ours_out, stdout) = os.pipe(), os.pipe()
        try:
            copy = self.copy(command, (stdin, stdout, errors), environment, folder)
        except ChildProcessError:
            os.close(ours_in)
            os.close(ours_out)
            raise
        finally:
            os.close(stdin)
            os.close(stdout)
        copy.stdin, copy.stdout = os.fdopen(ours_in, "wb"), os.fdopen(ours_out, "rb")
        return copy

    def channel(self) -> socket.socket:
        """The socket by which copies are asked for."""
        with self._lock:
            if self._channel is None:
                self._start()
            assert self._channel
            return self._channel

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE)
        with theirs, (self.log or Path(os.devnull)).open("ab") as errors:
            self.process = subprocess.Popen(
                [*environments.module("peftopt.forking"), str(theirs.fileno()), *self.imported],
                pass_fds=[theirs.fileno()],
                env=None if self.environment is None else dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,  # Ctrl-C must not end it
            )

    def close(self) -> None:
        """End it, and the copies that still run."""
        if self.process and self._channel:
            self._channel.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def usable() -> bool:
    """Whether processes may begin as copies here: on Linux, without a GPU, which copies cannot share."""
    return sys.platform == "linux" and not machine.gpus()
