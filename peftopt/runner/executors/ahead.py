"""Jobs that wait in the sweep and not in the cluster, which has few of them at a time."""

from __future__ import annotations

from collections import Counter, defaultdict, deque

from peftopt.recipe.grid import MachineClass
from peftopt.runner.cells import Job

EACH = 2
"""A cluster has so many jobs for each machine of a class: the one that runs, and the next one."""


class Ahead:
    """Jobs in their order, by class. A cluster that has the next job of each machine leaves no machine idle. A job that
    it begins again, after a loss, is behind few others there."""

    def __init__(self) -> None:
        self.waiting: dict[str, deque[Job]] = defaultdict(deque)
        self.handed: Counter[str] = Counter()

    def add(self, job: Job) -> None:
        """It waits behind the others of its class."""
        self.waiting[job.needs.name].append(job)

    def due(self, needs: MachineClass, machines: int) -> list[Job]:
        """The jobs of a class that the cluster gets now, where it has so many machines of it."""
        waiting = self.waiting[needs.name]
        room = max(machines, 1) * EACH - self.handed[needs.name]
        jobs = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        self.handed[needs.name] += len(jobs)
        return jobs

    def ended(self, job: Job) -> None:
        """The cluster has it no longer."""
        self.handed[job.needs.name] -= 1
