"""Jobs that need one another, several at a time, each as soon as what it needs is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter

from peftopt.runner.process import calm, interrupt


@dataclass(frozen=True)
class Job:
    """What to do, and the names of the jobs that have to be over before."""

    do: Callable[[], None]
    after: frozenset[str] = frozenset()


def work(jobs: Mapping[str, Job], lanes: int) -> None:
    """Do all jobs, `lanes` at a time; of those that can be done, the first in `jobs` goes first.

    When one raises, no other is started, and its error is raised once those under way are over. An interrupt ends
    their workers at once.
    """
    order = TopologicalSorter({name: job.after for name, job in jobs.items()})
    order.prepare()
    rank = {name: place for place, name in enumerate(jobs)}
    ready: list[str] = []
    running: dict[Future[None], str] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(calm)  # when the lanes are over: a program goes on after an interrupt
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
