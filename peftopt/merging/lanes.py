"""Work for several threads, by the file that it writes to.

Two threads that write to one file wait for each other (Linux locks it for each write), so each keeps to a file of its
own for as long as there are files enough, and only then helps with another's.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any


class Lanes:
    """Threads that take jobs, until they are closed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._left: dict[Path, deque[tuple[Future[Any], Callable[[], Any]]]] = {}
        self._taken: Counter[Path] = Counter()
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(threads)

    def close(self) -> None:
        """Wait for the jobs that are being done, and cancel the others."""
        with self._lock:
            for future, _ in itertools.chain.from_iterable(self._left.values()):
                future.cancel()
            self._left.clear()
        self._pool.shutdown()

    def submit(self, jobs: Iterable[tuple[Path, Callable[[], Any]]]) -> list[Future[Any]]:
        """Start them, those of a file one after the other; their results, in the order given here."""
        futures = []
        with self._lock:
            for file, job in jobs:
                futures.append(future := Future[Any]())
                self._left.setdefault(file, deque()).append((future, job))
        for _ in range(self.threads):
            self._pool.submit(self._work)
        return futures

    def _work(self) -> None:
        file: Path | None = None
        while True:
            with self._lock:
                file = self._choose(file)
                if file is None:
                    return
                future, job = self._left[file].popleft()
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 (raised where the result is asked for)
                future.set_exception(error)

    def _choose(self, now: Path | None) -> Path | None:
        """Which file a thread goes on with that is at work on `now`."""
        if now is not None:
            if self._left.get(now):
                return now
            self._taken[now] -= 1
        open_ = [file for file, jobs in self._left.items() if jobs]
        free = [file for file in open_ if not self._taken[file]]
        chosen = free[0] if free else max(open_, key=lambda file: len(self._left[file]), default=None)
        if chosen is not None:
            self._taken[chosen] += 1
        return chosen
