"""The parent's end of a worker: start it, ask with a deadline, name what went wrong, reap its whole group."""

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
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from peftopt import environments, jobs, machine, redaction
from peftopt.errors import NO_MEMORY, BadInput, WorkerFailed, says_no_memory
from peftopt.jobs import Failed, Job, Reply
from peftopt.measurements import Answer, Record, structured
from peftopt.progress import Hear, Reached
from peftopt.records import Json
from peftopt.runner import orphans, trace

GRACE_S = 5.0
LAST_BYTES = 4096
"""So much of a log is looked at for why a worker died."""

_LIVE: set[WorkerProcess] = set()
_INTERRUPTED = threading.Event()
_NUMBERS = itertools.count(1)


def interrupt() -> None:
    """End every worker now. Whoever waits for one gets KeyboardInterrupt: it is not a failure to record."""
    _INTERRUPTED.set()
    for child in tuple(_LIVE):
        child.kill()


def calm() -> None:
    """An interrupt is over: what starts now is not meant by it."""
    _INTERRUPTED.clear()


def interrupted(within_s: float) -> bool:
    """Whether everything is to end, or will be within so many seconds."""
    return _INTERRUPTED.wait(within_s)


class WorkerProcess:
    """One worker process. Use as a context manager; it and its descendants are gone afterwards."""

    def __init__(self, log: Path, threads: int, cache: Path | None = None, python: str = sys.executable) -> None:
        self.log = log
        self.mark = f"{orphans.watched()}.{next(_NUMBERS)}."
        log.parent.mkdir(parents=True, exist_ok=True)
        self._oom_kills = machine.oom_kills()
        with log.open("ab") as errors:
            self._log_from = errors.tell()
            self.process = subprocess.Popen(
                [python, "-m", "peftopt.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**_environment(threads, cache), orphans.MARK: self.mark},
                cwd=log.parent,  # libraries that drop files where they stand drop them here
                start_new_session=True,
            )
        self.unread = b""
        _LIVE.add(self)

    def ask(
        self,
        job: Job[Reply],
        deadline_s: float,
        tell: Callable[[Answer], None] = lambda _: None,
        hear: Hear = lambda _: None,
    ) -> Reply:
        """Do one job and return its reply; `tell` hears each answer on the way, `hear` how far the work has come.

        Raises WorkerFailed with the reason: "out of memory", "timeout", "killed (SIGKILL)", "refused", …
        """
        with trace.span(self.log.stem, job.name()):
            return self._ask(job, deadline_s, tell, hear)

    def _ask(self, job: Job[Reply], deadline_s: float, tell: Callable[[Answer], None], hear: Hear) -> Reply:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed, and named, by _line
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
        """The end of what it has written to its log."""
        with self.log.open("rb") as lines:
            lines.seek(max(self._log_from, lines.seek(0, os.SEEK_END) - LAST_BYTES))
            return lines.read().decode(errors="replace").strip()

    def written(self) -> int:
        """Bytes the worker has written so far, as the kernel counts them: the worker is not disturbed for it. 0 where
        the system does not count."""
        import psutil

        with contextlib.suppress(psutil.Error, AttributeError):
            return int(psutil.Process(self.process.pid).io_counters().write_chars)
        return 0

    def processes(self) -> set[int]:
        """The worker and whatever it has started, by id."""
        import psutil

        with contextlib.suppress(psutil.Error):
            worker = psutil.Process(self.process.pid)
            return {worker.pid, *(child.pid for child in worker.children(recursive=True))}
        return set()

    def cpu_s(self) -> float:
        """Seconds of CPU time that the worker and its descendants have taken."""
        return machine.cpu_s(self.processes())

    def kill(self) -> None:
        """End the whole process group now, and what the worker has started in groups of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        orphans.end(self.mark)

    def close(self) -> None:
        """Let the worker end by itself, then make sure of its group, and of what it held on a GPU: turns beside what is
        left of it there are flagged, as those beside any other process."""
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


def _structured(record: type[Record], values: Json, job: str) -> Record:
    """What a worker said. Raises WorkerFailed for what is not such a record: a plug-in may return anything."""
    try:
        return structured(record, values, job)
    except BadInput as error:
        hint = f"peftopt/jobs.py says what each job answers, here with {record.__name__}"
        raise WorkerFailed("not understood", f"the worker's reply: {error.message}", hint) from error


def _environment(threads: int, cache: Path | None) -> dict[str, str]:
    """Threads are set per process, and so is how they wait."""
    redaction.engine_key()  # before the worker starts: it and this process ask the same servers
    own = {
        **machine.waiting(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's: what computes are torch's threads or ours, and its own get in their way
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
    # a worker in another environment's Python finds this very peftopt, which need not be installed there
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, path))}
