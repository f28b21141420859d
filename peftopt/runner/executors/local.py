"""One machine, on which one cell runs after the other: the one that this process runs on."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from peftopt.recipe.grid import MachineClass
from peftopt.runner.cells import Attempt, Job
from peftopt.runner.executors.attempt import attempt


class Local:
    """Runs jobs of one class of machines here, in the order in which they come."""

    def __init__(self, here: str) -> None:
        self.here = here
        self.waiting: deque[Job] = deque()

    def machines(self, needs: MachineClass) -> int:
        """One, where this machine is of the class."""
        return int(needs.name == self.here)

    def found(self, folder: Path) -> bool:
        """No: a cell ends with the process that started it."""
        return False

    def submit(self, job: Job) -> None:
        """It starts when it is waited for."""
        self.waiting.append(job)

    def wait(self) -> tuple[Job, Attempt]:
        """Run the next job to its end."""
        job = self.waiting.popleft()
        return job, attempt(job)

    def close(self) -> str:
        """A job runs only while it is waited for, so none runs now."""
        self.waiting.clear()
        return ""
