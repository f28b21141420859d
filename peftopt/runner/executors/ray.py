"""A Ray cluster: each cell takes one whole machine of its class.

A class is a custom resource of which each of its machines has one: `ray start --resources '{"l4": 1}'`. A cell asks for
that one and for all processors and GPUs of such a machine, so that nothing of Ray's runs beside it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

from peftopt.errors import BadInput, MissingEnvironment
from peftopt.recipe.grid import MachineClass
from peftopt.runner.cells import Attempt, Job
from peftopt.runner.executors import alike
from peftopt.runner.executors.ahead import Ahead
from peftopt.runner.executors.attempt import attempt, lost

RETRIES = 3
"""So often a cell begins again whose machine, or whose process of Ray, was lost. An error of the cell's is final."""

LOOK_S = 10.0
"""Between two looks at whether anything has ended."""

REACHED_S = 10.0
"""A cluster answers in this time."""

GONE_S = 120.0
"""So long a sweep waits for a machine where the last that it could use is gone."""


class Ray:
    """Runs jobs as tasks of a cluster."""

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingEnvironment("--on ray needs Ray", "pip install 'peftopt[ray]'") from error
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a task without GPUs is not told of none
        self.ray: Any = ray
        before = signal.getsignal(signal.SIGTERM)
        try:
            _reach(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, OverflowError) as error:
            hint = """start one: ray start --head --resources '{"CLASS": 1}'"""
            raise MissingEnvironment(f"there is no Ray cluster at {address}: {error}", hint) from error
        signal.signal(signal.SIGTERM, before)  # Ray's own ends this process at once
        self.waiting = Ahead()
        self.running: dict[Any, Job] = {}
        self.ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.alive: dict[str, int] = {}
        self.sizes: dict[str, dict[str, float]] = {}
        self.task = ray.remote(attempt)

    def machines(self, needs: MachineClass) -> int:
        """The machines that are alive and have the class's resource. Raises BadInput for machines that differ, or that
        have more than one of it."""
        nodes = self._nodes(needs)
        sizes = {(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes}
        alike(needs, sizes)
        if any(node[needs.name] != 1 for node in nodes):
            hint = f"""give each machine one: ray start --resources '{{"{needs.name}": 1}}'"""
            raise BadInput(f"a machine of the class {needs.name} offers more than one cell at a time", hint)
        return len(nodes)

    def _nodes(self, needs: MachineClass) -> list[dict[str, float]]:
        """What each machine of the class has. It is kept, since the cluster is not asked for each cell."""
        alive = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        nodes = [resources for resources in alive if resources.get(needs.name, 0)]
        self.alive[needs.name] = len(nodes)
        if nodes:
            self.sizes[needs.name] = nodes[0]
        return nodes

    def found(self, folder: Path) -> bool:
        """No: Ray ends the tasks of a sweep that ends."""
        return False

    def submit(self, job: Job) -> None:
        """Ray starts it as soon as a machine of its class has nothing else to do, and those before it have begun."""
        if job.needs.name not in self.alive:
            self._nodes(job.needs)
        self.waiting.add(job)
        self._hand_over(job.needs)

    def _hand_over(self, needs: MachineClass) -> None:
        for job in self.waiting.due(needs, self.alive[needs.name]):
            node = self.sizes[needs.name]
            options = self.task.options(
                name=job.name,
                num_cpus=node.get("CPU", 0),
                num_gpus=node.get("GPU", 0),
                resources={needs.name: 1},
                max_retries=RETRIES,
                retry_exceptions=False,
            )
            task = options.remote(job)
            self.running[task] = job
            task.future().add_done_callback(partial(self._put, task))  # ray.wait would look at all that wait

    def _put(self, task: Any, _: Any) -> None:
        self.ended.put(task)

    def wait(self) -> tuple[Job, Attempt]:
        """The next job that ends. One whose machine was lost again and again has failed."""
        task = self._ended()
        job = self.running.pop(task)
        self.waiting.ended(job)
        self._nodes(job.needs)
        self._hand_over(job.needs)
        try:
            ended: Attempt = self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            ended = lost(job, f"the task failed: {error.cause}")
        except self.ray.exceptions.RayError as error:
            ended = lost(job, f"its machine was lost {RETRIES + 1} times: {str(error).splitlines()[0]}")
        return job, ended

    def _ended(self) -> Any:
        """The task that ends next. Raises MissingEnvironment once no machine is left for any of them."""
        gone_s = 0.0
        while gone_s < GONE_S:
            with contextlib.suppress(queue.Empty):
                return self.ended.get(timeout=LOOK_S)
            needed = {job.needs.name: job.needs for job in self.running.values()}
            gone_s = 0.0 if any([self._nodes(needs) for needs in needed.values()]) else gone_s + LOOK_S
            for needs in needed.values():
                self._hand_over(needs)
        lost = f"the cluster has no machine of the classes {', '.join(sorted(needed))} any more"
        raise MissingEnvironment(lost, "start one; the same sweep goes on")

    def close(self) -> str:
        """End what runs, with its measurements up to now, and leave the cluster: Ray interrupts no task that waits."""
        self.waiting = Ahead()
        for task in self.running:
            self.ray.cancel(task, force=True)
        self.running.clear()
        self.ray.shutdown()
        return ""


def _reach(address: str) -> None:
    """Raises OSError, ValueError where nobody listens at HOST:PORT: Ray would wait there for many minutes."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), REACHED_S).close()
