"""A server of our own: started, waited for, its last lines told when it dies, ended with all that it started."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from peftopt import environments, machine, redaction
from peftopt.engines import endpoint
from peftopt.errors import NO_MEMORY, MissingEnvironment, WorkerFailed, says_no_memory
from peftopt.forking import ForkServer, Process
from peftopt.records import Model

LAST_LINES = 15
LONGEST_LINE = 2000
"""Characters of such a line: a log of another program's may hold one without an end."""
STOP_S = 20.0

Option = tuple[str, ...]
"""An option of a server's command line: its name, and its values."""


class Started(endpoint.Served):
    """A server that was started here, and ends with the engine: its memory and CPU time are counted."""

    remote = False

    def __init__(
        self,
        model: Model,
        command: Sequence[str],
        variables: Mapping[str, str],
        port: int,
        name: str,
        start_s: float,
        protocol: str = "completions",
    ) -> None:
        """`name` is what the model is served as. Raises WorkerFailed with the server's last lines when it is not ready
        within `start_s` seconds."""
        kind = type(self).__module__.rpartition(".")[2]
        self._server = Server(command, variables, f"http://127.0.0.1:{port}", Path(f"{kind}-{os.getpid()}.log"))
        try:
            self._seconds = self._server.ready(start_s)
            url = self._server.url
            served = endpoint.Params(url, name, protocol, api_key_env=redaction.ENGINE_KEY, timeout_s=600.0)
            super().__init__(model, served)
        except BaseException:
            self._server.stop()
            raise
        self.threads = int(os.environ.get("OMP_NUM_THREADS", 0))

    def processes(self) -> Sequence[int]:
        """The server's processes: what of the memory is the model's."""
        return self._server.processes()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a server that has died cannot be said goodbye to
            super().close()
        self._server.stop()


class Server:
    """A server process in this process's group: it ends with `stop`, and with the group.

    Whatever answers at its address is asked nothing before it is known that this server and no other listens there. It
    begins as a copy of `forks`, if that is given and the command is `python -m` of this very Python.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        url: str,
        log: Path,
        forks: ForkServer | None = None,
    ) -> None:
        """Raises MissingEnvironment where somebody listens at `url` already."""
        check_port(_port(url))
        self.url, self.log = url, log.resolve()
        self._oom_kills = machine.oom_kills()
        with self.log.open("wb") as out:
            self._process = _started(command, {**os.environ, **variables}, out, forks)

    def ready(self, limit_s: float) -> float:
        """Wait until it answers; seconds that took. Raises WorkerFailed with its last lines if it dies or is late."""
        started = time.monotonic()
        while time.monotonic() - started < limit_s:
            if self._process.poll() is not None:
                reason = NO_MEMORY if self._lacked_memory() else "server died"
                raise WorkerFailed(reason, f"exit status {self._process.returncode}\n{self._last()}", self._where)
            if _answers(f"{self.url}/health"):
                self._check_own()
                return time.monotonic() - started
            time.sleep(0.25)
        raise WorkerFailed("timeout", f"the server was not ready after {limit_s:g} s\n{self._last()}", self._where)

    def _lacked_memory(self) -> bool:
        """Whether it ended, or was ended, for lack of memory, as the kernel or its own last lines say."""
        killed = self._process.returncode == -signal.SIGKILL and machine.oom_kills() > self._oom_kills
        return killed or says_no_memory(self._last())

    def _check_own(self) -> None:
        """Raises WorkerFailed where what answers is not this server: another process took its port."""
        port, own = _port(self.url), set(self.processes())
        found = listeners(port, own)
        if not found or found - own:
            who = ", ".join(sorted(map(_who, found - own))) or "nobody knows which"
            hint = "end it, or run this again: another port is taken then"
            raise WorkerFailed("port taken", f"another process listens on 127.0.0.1:{port} ({who})", hint)

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def why(self) -> str:
        """How it ended, and its last lines."""
        return f"exit status {self._process.poll()}\n{self._last()}"

    def processes(self) -> Sequence[int]:
        import psutil

        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            return [own.pid, *(child.pid for child in own.children(recursive=True))]
        return []

    def kill(self) -> None:
        """End it at once: for another thread, while `stop` waits."""
        self._process.kill()

    def stop(self) -> None:
        """Ask it to end, and end what is left of it."""
        import psutil

        family = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.kill()
        self._process.wait()
        psutil.wait_procs(family, STOP_S)
        redaction.scrub(self.log)

    @property
    def _where(self) -> str:
        return f"its whole log: {self.log}"

    def _last(self) -> str:
        """The last lines of the log."""
        with self.log.open(errors="replace") as lines:
            last = deque((line.rstrip()[:LONGEST_LINE] for line in lines if line.strip()), maxlen=LAST_LINES)
        return redaction.redacted("\n".join(last))


def _started(command: Sequence[str], variables: Mapping[str, str], out: BinaryIO, forks: ForkServer | None) -> Process:
    """Start the server, which writes all that it says to `out`."""
    python = environments.module("")[:-1]
    if forks and list(command[: len(python)]) == python:
        with contextlib.suppress(ChildProcessError), Path(os.devnull).open("rb") as nothing:
            streams = (nothing.fileno(), out.fileno(), out.fileno())
            return forks.copy(command[len(python) :], streams, variables, Path.cwd())
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=out,
        env=variables,
        preexec_fn=partial(machine.die_with_parent, signal.SIGTERM),
    )


def _answers(url: str) -> bool:
    """Whether a server on this machine answers 200 there; no proxy is asked, and no redirect followed."""
    address = urlsplit(url)
    asked = http.client.HTTPConnection(str(address.hostname), address.port, timeout=5.0)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(asked):
        asked.request("GET", address.path)
        return asked.getresponse().status == 200
    return False


def _port(url: str) -> int:
    return int(urlsplit(url).port or 0)


HERE = ("127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1")  # nosec B104 # addresses to recognise, none to bind to
"""Addresses at which a process is reached by 127.0.0.1."""

UNKNOWN = 0
"""Who listens, where the system does not say: a process of another user's."""


def listeners(port: int, own: Collection[int]) -> set[int]:
    """The processes that listen on a port of this machine, UNKNOWN for one that may not be seen; where the system tells
    of others only to root, as macOS does, those of `own`."""
    import psutil

    try:
        found = [(c.pid or UNKNOWN, c) for c in psutil.net_connections("tcp")]
    except psutil.AccessDenied:
        found = [(process, c) for process in own for c in _connections(process)]
    heard = ((process, c.laddr) for process, c in found if c.status == psutil.CONN_LISTEN and c.laddr)
    return {process for process, at in heard if at.port == port and at.ip in HERE}


def _connections(process: int) -> Sequence[Any]:
    import psutil

    with contextlib.suppress(psutil.Error):
        return list(psutil.Process(process).net_connections("tcp"))
    return ()


def _who(process: int) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        return f"{psutil.Process(process).name()}, process {process}" if process else "a process of another user"
    return f"process {process}"


def check_port(port: int) -> None:
    """Raises MissingEnvironment for a port that somebody listens on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise MissingEnvironment(f"port {port} is taken: {error.strerror}", "choose another: --port") from error


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
