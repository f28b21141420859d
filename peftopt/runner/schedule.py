"""Run jobs that depend on one another, several at a time, each as soon as the jobs it depends on are over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter

from peftopt.runner.process import calm, interrupt


@dataclass(frozen=True)
class Job:
    """What to do, and the names of the jobs that must be over before."""

    do: Callable[[], None]
    after: frozenset[str] = frozenset()


def work(jobs: Mapping[str, Job], lanes: int) -> None:
    """Do all jobs, `lanes` at a time. Of the jobs that can start, the first in `jobs` starts first.

    When a job raises, no other job starts; the error is raised once the running jobs are over. An interrupt ends their
    workers at once.
    """
    order = TopologicalSorter({name: job.after for name, job in jobs.items()})
    order.prepare()
    rank = {name: place for place, name in enumerate(jobs)}
    ready: list[str] = []
    running: dict[Future[None], str] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(calm)  # after the lanes: the program may continue after an interrupt
        pool = stack.enter_context(ThreadPoolExecutor(lanes))
        try:
            while order.is_active():
                ready = sorted([*ready, *order.get_ready()], key=rank.__getitem__)
                while ready and len(running) < lanes:
                    name = ready.pop(0)
                    running[pool.submit(jobs[name].do)] = name
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    done.result()
                    order.done(running.pop(done))
        except KeyboardInterrupt:
            interrupt()
            raise
