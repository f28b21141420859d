"""Where the cells of a sweep run. One file an executor.

What is placed on a machine is a whole cell: its builds, its answers and its race are one command, on a machine that
runs nothing else meanwhile. So no block leaves a machine, and a machine that is lost takes the block with it that it
was in, and no other: the same command goes on from the run's folder.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from peftopt.errors import BadInput
from peftopt.recipe.grid import MachineClass
from peftopt.runner.cells import Attempt, Job


class Executor(Protocol):
    """Runs jobs on machines of the classes that they need, one at a time on each."""

    def machines(self, needs: MachineClass) -> int:
        """How many machines of the class there are now; 0 where its jobs cannot run here."""

    def found(self, folder: Path) -> bool:
        """Whether a job that an earlier sweep submitted for the cell of this folder still waits or runs. `submit` takes
        it over."""

    def submit(self, job: Job) -> None:
        """Have a job run as soon as a machine of its class is free."""

    def wait(self) -> tuple[Job, Attempt]:
        """The next job that ends, and how it did. Only where one is submitted and has not ended yet."""

    def close(self) -> str:
        """End what runs, and start nothing more. What was measured is kept. What runs on nevertheless is returned in
        words; "" for nothing."""


def alike(needs: MachineClass, sizes: Collection[tuple[float, float]]) -> None:
    """Raises BadInput where machines of a class differ in their processors or GPUs."""
    if len(sizes) > 1:
        told = ", ".join(f"{cpus:g} processors and {gpus:g} GPUs" for cpus, gpus in sorted(sizes))
        hint = "make two classes: blocks are never compared"
        raise BadInput(f"machines of the class {needs.name} differ: {told}", hint)


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
    if name == "slurm" or on == "submitit:local":
        from peftopt.runner.executors.slurm import Slurm

        return Slurm("slurm", address) if name == "slurm" else Slurm("local", here)
    raise BadInput(f"--on {on} is not known", "known: local, ray, ray:HOST:PORT, slurm, slurm:PARTITION")
