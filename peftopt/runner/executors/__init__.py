"""Where the cells of a sweep run. One file an executor.

What is placed on a machine is a whole cell: its builds, its answers and its race are one command, on a machine that
runs nothing else meanwhile. So no block leaves a machine, and a machine that is lost takes the block with it that it
was in, and no other: the same command goes on from the run's folder.
"""

from __future__ import annotations

from typing import Protocol

from peftopt.errors import BadInput
from peftopt.recipe.grid import MachineClass
from peftopt.runner.cells import Attempt, Job


class Executor(Protocol):
    """Runs jobs on machines of the classes that they need, one at a time on each."""

    def machines(self, needs: MachineClass) -> int:
        """How many machines of the class there are now; 0 where its jobs cannot run here."""

    def submit(self, job: Job) -> None:
        """Have a job run as soon as a machine of its class is free."""

    def wait(self) -> tuple[Job, Attempt]:
        """The next job that ends, and how it did. Only where one is submitted and has not ended yet."""

    def close(self) -> None:
        """End what runs, and start nothing more. What was measured is kept."""


def opened(on: str, here: str) -> Executor:
    """The executor that `--on` names; `here` is the class of this machine. Raises BadInput for a name that is not
    known, MissingEnvironment where what it needs is not there."""
    if on == "local":
        from peftopt.runner.executors.local import Local

        return Local(here)
    name, _, address = on.partition(":")
    if name == "ray" and not address.startswith("//"):
        from peftopt.runner.executors.ray import Ray

        return Ray(address or "auto")
    raise BadInput(f"--on {on} is not known", "known: local, ray, ray:HOST:PORT")
