"""A Slurm partition: each cell is a job that takes one whole node of its class.

A class is a feature of its nodes (`Feature=l4` in slurm.conf), for which the job asks; a grid without classes takes any
node of the partition. submitit writes the job's script, hands the cell over and brings back how it ended. Slurm itself
says which jobs live: sacct, which submitit asks, is not there on every cluster.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peftopt import machine
from peftopt.errors import MissingEnvironment
from peftopt.recipe.grid import ANY, MachineClass
from peftopt.runner.cells import Attempt, Job
from peftopt.runner.executors import alike
from peftopt.runner.executors.attempt import attempt, lost

RETRIES = 3
"""So often a cell is submitted again whose job was ended from outside. An error of the cell's is final."""

RESULT_S = 1.0
"""Between two looks for a file of results."""

LOOK_S = 5.0
"""Between two questions to Slurm which jobs live."""

REACHED_S = 30.0
"""Slurm answers in this time."""

CANCELLED_S = 15.0
"""Jobs that were cancelled have so long to end, before it is said that they still run."""

FOREVER_MIN = 60 * 24 * 365
"""submitit's own cluster ends a job after these minutes."""

FOLDER = "slurm"
"""The folder of a cell in which submitit keeps the scripts, the logs and the results of its jobs, named by their
ids."""

READY = frozenset(("allocated", "completing", "idle", "mixed", "planned", "powered_down", "powering_up", "reserved"))
"""States of a node that runs jobs now or later, without the signs behind them."""

ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)
"""States of a job that does not run again."""

FINAL = {
    "CANCELLED": "its job was cancelled",
    "DEADLINE": "its job could not end before its deadline",
    "OUT_OF_MEMORY": "out of memory: Slurm ended its job",
}
"""What is not tried again, and what is said of it."""

PENDING = "PENDING"
"""The state of a job that waits for a node."""

UNKNOWN = "FORGOTTEN"
"""The state of a job that Slurm does not list any more."""


@dataclass(frozen=True)
class Node:
    """What Slurm says of a node in a partition: its `state`, its processors and GPUs, its `features`, and how long a
    job may take there (`limit`, as sbatch takes it)."""

    name: str
    partition: str
    state: str
    cpus: int
    gpus: int
    features: frozenset[str]
    limit: str

    @property
    def is_ready(self) -> bool:
        """Whether it answers, and takes jobs. A star marks one that does not answer."""
        return self.state.rstrip("~#!%$@^-+") in READY


LISTED = "%N|%P|%T|%c|%G|%b|%l"
"""The columns of sinfo from which nodes are read."""


def nodes(listed: str) -> list[Node]:
    """The nodes of sinfo's lines."""
    rows = [line.split("|") for line in listed.splitlines() if line.count("|") == LISTED.count("|")]
    return [
        Node(name, partition, state, int(cpus.rstrip("+")), _gpus(gres), frozenset(features.split(",")), limit)
        for name, partition, state, cpus, gres, features, limit in rows
    ]


def _gpus(gres: str) -> int:
    """The GPUs among generic resources: "gpu:a100:4(S:0-1),nvme:1" has 4."""
    words = [each.split("(")[0].split(":") for each in gres.split(",")]
    return sum(int(word[-1]) if word[-1].isdigit() else 1 for word in words if word[0] == "gpu")


class Cluster(Protocol):
    """Where submitit's jobs run."""

    name: str
    at_once: int
    """So many jobs are handed over at a time."""

    def nodes(self, needs: MachineClass) -> list[Node]:
        """The nodes of a class that take jobs."""

    def options(self, needs: MachineClass) -> Mapping[str, object]:
        """What submitit is told of a job of the class."""

    def states(self, handles: Iterable[Any]) -> Mapping[str, str]:
        """The state of each job by its id. A job that is not listed has ended. Raises MissingEnvironment where nobody
        answers."""


class Partition:
    """A partition of a Slurm cluster; "" is the default one."""

    name = "slurm"
    at_once = sys.maxsize

    def __init__(self, partition: str) -> None:
        self.partition = partition
        if not self._listed():
            raise MissingEnvironment(f"Slurm has no partition {partition or 'by default'}", "sinfo shows which it has")

    def _listed(self) -> list[Node]:
        of = [f"--partition={self.partition}"] if self.partition else []
        listed = nodes(_asked("sinfo", "--noheader", "--Node", *of, f"--format={LISTED}"))
        return [node for node in listed if self.partition or node.partition.endswith("*")]

    def nodes(self, needs: MachineClass) -> list[Node]:
        """Those with the class's name among their features; all of them, where the grid has no classes."""
        return [node for node in self._listed() if node.is_ready and (needs.name == ANY or needs.name in node.features)]

    def options(self, needs: MachineClass) -> Mapping[str, object]:
        """A whole node of the class with all that it has, as long as the partition allows."""
        node = self.nodes(needs)[0]
        more = {"time": node.limit, "mem": 0}
        placed = {
            "slurm_partition": self.partition or None,
            "slurm_constraint": None if needs.name == ANY else needs.name,
        }
        return {
            **placed,
            "nodes": 1,
            "tasks_per_node": 1,
            "gpus_per_node": node.gpus or None,
            "slurm_exclusive": True,
            "slurm_srun_args": ["--cpu-bind=none"],  # else the one task may be bound to one processor
            "slurm_additional_parameters": more,
        }

    def states(self, handles: Iterable[Any] = ()) -> Mapping[str, str]:
        """Of all jobs of this user, as squeue has them: some minutes after their end, too."""
        listed = _asked("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%T")
        return dict(line.split("|", 1) for line in listed.splitlines() if "|" in line)


class Here:
    """submitit's own cluster: processes of this machine, one job at a time. For trying a sweep without Slurm."""

    name = "local"
    at_once = 1

    def __init__(self, here: str) -> None:
        self.here = here

    def nodes(self, needs: MachineClass) -> list[Node]:
        """The machine of this process, where it is of the class."""
        cpus, gpus = os.cpu_count() or 1, len(machine.gpus())
        found = Node("localhost", "", "idle", cpus, gpus, frozenset([self.here]), "")
        return [found] if needs.name == self.here else []

    def options(self, needs: MachineClass) -> Mapping[str, object]:
        """All GPUs, and all the time it takes."""
        return {"timeout_min": FOREVER_MIN, "gpus_per_node": self.nodes(needs)[0].gpus}

    def states(self, handles: Iterable[Any]) -> Mapping[str, str]:
        """Of those that this process has started."""
        return {each.job_id: "RUNNING" if each.state == "RUNNING" else "FAILED" for each in handles}


class Slurm:
    """Runs jobs through submitit."""

    def __init__(self, cluster: str, name: str) -> None:
        """`cluster` is slurm, with the partition's `name`, or local, with the name of this machine's class."""
        try:
            import submitit
        except ImportError as error:
            raise MissingEnvironment("--on slurm needs submitit", "pip install 'peftopt[slurm]'") from error
        self.submitit: Any = submitit
        self.cluster: Cluster = Partition(name) if cluster == "slurm" else Here(name)
        self.earlier = {job for job, state in self.cluster.states(()).items() if state not in ENDED}
        self.options: dict[str, Mapping[str, object]] = {}
        self.waiting: deque[Job] = deque()
        self.running: dict[str, tuple[Job, Any]] = {}
        self.results: deque[str] = deque()
        self.losses: Counter[str] = Counter()
        self.looked = time.monotonic()
        self.pending: set[str] = set()
        self.ended: set[str] = set()

    def machines(self, needs: MachineClass) -> int:
        """The nodes of the class that take jobs. Raises BadInput for nodes that differ."""
        found = self.cluster.nodes(needs)
        alike(needs, {(node.cpus, node.gpus) for node in found})
        return len({node.name for node in found})

    def found(self, folder: Path) -> bool:
        """Whether a job that an earlier sweep submitted for the cell of this folder still waits or runs."""
        return self._found(folder) is not None

    def _found(self, folder: Path) -> Any:
        scripts = (folder / FOLDER).glob("*_submission.sh")
        ids = [script.name.partition("_")[0] for script in scripts]
        return next((self.submitit.SlurmJob(folder / FOLDER, each) for each in ids if each in self.earlier), None)

    def submit(self, job: Job) -> None:
        """Slurm starts it as soon as a node of its class is free. A job that an earlier sweep submitted goes on."""
        if handle := self._found(job.folder):
            self.running[job.name] = (job, handle)
        else:
            self.waiting.append(job)
            self._hand_over()

    def _hand_over(self) -> None:
        """What Slurm refuses while other jobs live waits for the end of one: there may be a limit on their number.
        Raises MissingEnvironment where it refuses the only one."""
        while self.waiting and len(self.running) < self.cluster.at_once:
            job = self.waiting.popleft()
            executor = self.submitit.AutoExecutor(job.folder / FOLDER, cluster=self.cluster.name)
            executor.update_parameters(name=job.name, **self._options(job.needs))
            try:
                self.running[job.name] = (job, executor.submit(run_cell, job))
            except RuntimeError as error:  # what sbatch says
                if not self.running:
                    raise MissingEnvironment(f"Slurm refused {job.name}: {error}", "sinfo shows what it has") from error
                self.waiting.appendleft(job)
                return

    def _options(self, needs: MachineClass) -> Mapping[str, object]:
        """What submitit is told. Slurm is asked once for all cells of a class."""
        if needs.name not in self.options:
            self.options[needs.name] = self.cluster.options(needs)
        return self.options[needs.name]

    def wait(self) -> tuple[Job, Attempt]:
        """The next job that ends. One whose job was ended from outside again and again has failed."""
        self._hand_over()
        while True:
            self.results = self.results or self._with_results()
            if self.results:
                job, handle = self.running[self.results.popleft()]
                return self._over(job, self._result(job, handle))
            if time.monotonic() - self.looked > LOOK_S:
                self.looked = time.monotonic()
                for job, state in self._gone():
                    if ended := self._lost(job, state):
                        return self._over(job, ended)
            time.sleep(RESULT_S)

    def _with_results(self) -> deque[str]:
        """The jobs that have left a result, among those that had begun when Slurm was asked last. The others may be
        many thousands."""
        begun = [(name, handle) for name, (_, handle) in self.running.items() if handle.job_id not in self.pending]
        return deque(name for name, handle in begun if handle.paths.result_pickle.exists())

    def _over(self, job: Job, ended: Attempt) -> tuple[Job, Attempt]:
        del self.running[job.name]
        return job, ended

    def _result(self, job: Job, handle: Any) -> Attempt:
        try:
            ended: Attempt = handle.result()
        except RuntimeError as error:  # submitit's FailedJobError, with the traceback between two lines of dashes
            trace = f"{error}".split("-" * 22)[1:2] or [f"{error}"]
            return lost(job, f"the job failed: {trace[0].strip().splitlines()[-1]}")
        return ended

    def _gone(self) -> list[tuple[Job, str]]:
        """The jobs that have ended without a result, and their states: at two looks, since a shared folder may show a
        file late. None while Slurm does not answer."""
        try:
            states = self.cluster.states(handle for _, handle in self.running.values())
        except MissingEnvironment:
            return []
        self.pending = {job for job, state in states.items() if state == PENDING}
        by_id = {handle.job_id: job for job, handle in self.running.values()}
        ended = {each for each in by_id if states.get(each, UNKNOWN) in (*ENDED, UNKNOWN)}
        again = ended & self.ended
        self.ended = ended
        return [(by_id[each], states.get(each, UNKNOWN)) for each in sorted(again)]

    def _lost(self, job: Job, state: str) -> Attempt | None:
        """How a cell has failed whose job left no result; None where it is submitted again."""
        if state in FINAL:
            return lost(job, FINAL[state])
        self.losses[job.name] += 1
        if self.losses[job.name] > RETRIES:
            return lost(job, f"its job was ended {RETRIES + 1} times from outside: {state}")
        del self.running[job.name]
        self.waiting.append(job)
        self._hand_over()
        return None

    def close(self) -> str:
        """Cancel what waits and what runs, with its measurements up to now; which jobs have not ended then."""
        self.waiting.clear()
        handles = [handle for _, handle in self.running.values()]
        for handle in handles:
            handle.cancel(check=False)
        until = time.monotonic() + CANCELLED_S
        while (live := self._live(handles)) and time.monotonic() < until:
            time.sleep(RESULT_S)
        self.running.clear()
        return f"cancelled, but not ended yet: jobs {', '.join(live)}; squeue shows them" if live else ""

    def _live(self, handles: list[Any]) -> list[str]:
        try:
            states = self.cluster.states(handles) if handles else {}
        except MissingEnvironment:
            return [handle.job_id for handle in handles]
        return [each.job_id for each in handles if states.get(each.job_id, UNKNOWN) not in (*ENDED, UNKNOWN)]


def run_cell(job: Job) -> Attempt:
    """What a job runs. Slurm's signals before it ends a job, for a limit of time or another job, interrupt the cell:
    its measurements are kept, and no result is left."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.default_int_handler)
    return attempt(job)


def _asked(*words: str) -> str:
    """What a command of Slurm's prints. Raises MissingEnvironment where there is none, or where it fails."""
    hint = "run the sweep where sbatch works, and look at sinfo"
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=REACHED_S, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise MissingEnvironment(f"{words[0]} failed: {error.stderr.strip()}", hint) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingEnvironment(f"there is no Slurm here: {error}", hint) from error
