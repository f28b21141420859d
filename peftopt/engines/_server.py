"""A server of our own: started, waited for, its last lines told when it dies, ended with all that it started."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from peftopt import machine
from peftopt.engines import endpoint
from peftopt.errors import MissingEnvironment, WorkerFailed
from peftopt.records import Model

LAST_LINES = 15
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
            super().__init__(model, endpoint.Params(url=url, model=name, protocol=protocol, timeout_s=600.0))
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
    """A server process in this process's group: it ends with `stop`, and with the group."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], url: str, log: Path) -> None:
        self.url, self.log = url, log.resolve()
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **variables},
                preexec_fn=partial(machine.die_with_parent, signal.SIGTERM),
            )

    def ready(self, limit_s: float) -> float:
        """Wait until it answers; seconds that took. Raises WorkerFailed with its last lines if it dies or is late."""
        started = time.monotonic()
        while time.monotonic() - started < limit_s:
            if self._process.poll() is not None:
                raise WorkerFailed(
                    "server died", f"exit status {self._process.returncode}\n{self._last()}", self._where
                )
            if _answers(f"{self.url}/health"):
                return time.monotonic() - started
            time.sleep(0.25)
        raise WorkerFailed("timeout", f"the server was not ready after {limit_s:g} s\n{self._last()}", self._where)

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

    @property
    def _where(self) -> str:
        return f"its whole log: {self.log}"

    def _last(self) -> str:
        """The last lines of the log."""
        with self.log.open(errors="replace") as lines:
            return "\n".join(deque((line.rstrip() for line in lines if line.strip()), maxlen=LAST_LINES))


def _answers(url: str) -> bool:
    """Whether a server on this machine answers 200 there; no proxy is asked."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError, http.client.HTTPException), direct.open(url, timeout=5.0) as answer:
        return bool(answer.status == 200)
    return False


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
