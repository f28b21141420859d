"""The parent's side of a worker process: start it, send jobs with a deadline, name failures, end its whole group."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from peftopt import environments, forking, jobs, machine, redaction
from peftopt.errors import NO_MEMORY, BadInput, WorkerFailed, says_no_memory
from peftopt.jobs import Failed, Job, Reply
from peftopt.measurements import Answer, Record, structured
from peftopt.progress import Hear, Reached
from peftopt.records import Json
from peftopt.runner import orphans, trace

WORKER = "peftopt.worker"
GRACE_S = 5.0
LAST_BYTES = 4096
"""Bytes at the end of a log that are searched for the reason of a worker's death."""

_LIVE: set[WorkerProcess] = set()
_INTERRUPTED = threading.Event()
_NUMBERS = itertools.count(1)


def interrupt() -> None:
    """End every worker now. A thread that waits for a worker gets KeyboardInterrupt: no failure is recorded."""
    _INTERRUPTED.set()
    for child in tuple(_LIVE):
        child.kill()


def calm() -> None:
    """The interrupt is over: it does not end workers that start from now on."""
    _INTERRUPTED.clear()


def interrupted(within_s: float) -> bool:
    """Wait for an interrupt for at most so many seconds. Returns whether there is one."""
    return _INTERRUPTED.wait(within_s)


class WorkerProcess:
    """One worker process, as a context manager. Afterwards, the worker and its descendants have ended. It begins as a
    copy of `forks`, if that is given and lives."""

    def __init__(
        self,
        log: Path,
        threads: int,
        cache: Path | None = None,
        python: str = sys.executable,
        forks: forking.ForkServer | None = None,
    ) -> None:
        self.log = log
        self.mark = f"{orphans.watched()}.{next(_NUMBERS)}."
        log.parent.mkdir(parents=True, exist_ok=True)
        self._oom_kills = machine.oom_kills()
        with log.open("ab") as errors:
            self._log_from = errors.tell()
            variables = {**_environment(python, threads, cache), orphans.MARK: self.mark}
            self.process = _started(python, errors, variables, log.parent, forks)
        self.unread = b""
        _LIVE.add(self)
        if _INTERRUPTED.is_set():  # it came while this worker started
            self.kill()

    def ask(
        self,
        job: Job[Reply],
        deadline_s: float,
        tell: Callable[[Answer], None] = lambda _: None,
        hear: Hear = lambda _: None,
    ) -> Reply:
        """Do one job and return its reply. `tell` receives each answer on the way, `hear` the progress.

        Raises WorkerFailed with the reason: "out of memory", "timeout", "killed (SIGKILL)", "refused", …
        """
        with trace.span(self.log.stem, job.name()):
            return self._ask(job, deadline_s, tell, hear)

    def _ask(self, job: Job[Reply], deadline_s: float, tell: Callable[[Answer], None], hear: Hear) -> Reply:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _line notices a dead worker, and names the reason
            self.process.stdin.write(jobs.as_line(job).encode())
            self.process.stdin.flush()
        until = time.monotonic() + deadline_s
        while True:
            message = json.loads(self._line(until, deadline_s))
            if "record" in message:
                tell(_structured(Answer, message["record"], job.name()))
            elif "progress" in message:
                hear(_structured(Reached, message["progress"], job.name()))
            elif "failed" in message:
                failed = _structured(Failed, message["failed"], job.name())
                raise WorkerFailed(failed.reason, failed.detail, failed.hint)
            else:
                return _structured(job.reply(), message["done"], job.name())

    def _line(self, until: float, deadline_s: float) -> bytes:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.unread:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            if not readable:
                self.kill()
                raise WorkerFailed("timeout", f"no answer within {deadline_s:g} s", f"its log: {self.log}")
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                if _INTERRUPTED.is_set():
                    raise KeyboardInterrupt
                raise self._death()
            self.unread += piece
        line, self.unread = self.unread.split(b"\n", 1)
        return line

    def _death(self) -> WorkerFailed:
        code = self.process.wait()
        hint = f"its log: {self.log}"
        if code == -signal.SIGKILL and machine.oom_kills() > self._oom_kills:
            return WorkerFailed(NO_MEMORY, "the kernel ended it for lack of memory (SIGKILL)", hint)
        if code in (1, -signal.SIGABRT) and says_no_memory(last := self._last_words()):
            return WorkerFailed(NO_MEMORY, last.splitlines()[-1][:200], hint)
        if code == -signal.SIGKILL:
            return WorkerFailed("killed (SIGKILL)", "often the kernel's answer to too little memory", hint)
        if code < 0:
            return WorkerFailed(f"killed ({signal.Signals(-code).name})", "", hint)
        return WorkerFailed("died", f"exit status {code}", hint)

    def _last_words(self) -> str:
        """The end of the worker's log."""
        with self.log.open("rb") as lines:
            lines.seek(max(self._log_from, lines.seek(0, os.SEEK_END) - LAST_BYTES))
            return lines.read().decode(errors="replace").strip()

    def written(self) -> int:
        """Bytes the worker has written so far, by the kernel's count, without disturbing the worker. 0 where the system
        does not count."""
        import psutil

        with contextlib.suppress(psutil.Error, AttributeError):
            return int(psutil.Process(self.process.pid).io_counters().write_chars)
        return 0

    def processes(self) -> set[int]:
        """The ids of the worker and its descendants."""
        import psutil

        with contextlib.suppress(psutil.Error):
            worker = psutil.Process(self.process.pid)
            return {worker.pid, *(child.pid for child in worker.children(recursive=True))}
        return set()

    def cpu_s(self) -> float:
        """Seconds of CPU time that the worker and its descendants have taken."""
        return machine.cpu_s(self.processes())

    def kill(self) -> None:
        """End the whole process group now, and the processes that the worker started in other groups."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        orphans.end(self.mark)

    def close(self) -> None:
        """Let the worker end by itself, then end its group, and wait until its GPU memory is free. Turns beside memory
        that is still held are flagged, like turns beside any other process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        family = self.processes()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)
        self.kill()
        machine.await_gpu(family)
        self.process.stdout.close()
        redaction.scrub(self.log)
        _LIVE.discard(self)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, WorkerFailed):
            self.kill()  # interrupted or a bug: nothing to wait for
        self.close()


def _started(
    python: str, errors: BinaryIO, variables: Mapping[str, str], folder: Path, forks: forking.ForkServer | None
) -> forking.Process:
    """Start the worker in that folder, into which some libraries write files, and in a session of its own."""
    if forks:
        with contextlib.suppress(ChildProcessError):  # it was ended, perhaps for lack of memory
            return forks.piped([WORKER], errors.fileno(), variables, folder)
    return subprocess.Popen(
        environments.module(WORKER, python),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=variables,
        cwd=folder,
        start_new_session=True,
    )


@contextlib.contextmanager
def fork_server(log: Path, threads: int, *imported: str) -> Iterator[forking.ForkServer | None]:
    """A fork server for workers of the main environment with so many threads, and what they import besides. It ends
    with this context, and so do its copies. None where processes cannot begin as copies."""
    if not forking.usable():
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{orphans.watched()}.{next(_NUMBERS)}."
    variables = {**_environment(environments.python(environments.MAIN), threads, None), orphans.MARK: mark}
    with forking.ForkServer([*forking.MODELS, *imported], variables, log) as server:
        yield server


def _structured(record: type[Record], values: Json, job: str) -> Record:
    """A worker's reply as a record. Raises WorkerFailed for another shape: a plug-in may return anything."""
    try:
        return structured(record, values, job)
    except BadInput as error:
        hint = f"peftopt/jobs.py says what each job answers, here with {record.__name__}"
        raise WorkerFailed("not understood", f"the worker's reply: {error.message}", hint) from error


def _environment(python: str, threads: int, cache: Path | None) -> dict[str, str]:
    """A worker's environment variables: its number of threads, how they wait, its cache."""
    redaction.engine_key()  # before the worker starts: both send requests to the same servers
    own = {
        **machine.waiting(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's threads would slow down torch's and ours, which compute
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
        "PEFTOPT_PYTHON": environments.python(environments.MAIN),
    }
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        own["TORCHINDUCTOR_CACHE_DIR"] = str(cache.resolve())
    return {**environments.variables(python), **own}
