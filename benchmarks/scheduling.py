"""A sweep of many cells on a simulated cluster: how near its end is to the earliest possible one, and what it takes.

    python benchmarks/scheduling.py             # 10,000 cells on 152 machines
    python benchmarks/scheduling.py 1000        # so many cells

The sweep is the real one, with its folders, its decisions on disk and its order. Its executor is a cluster on a
simulated clock, which gives the first cell of a class that waits there to a machine of the class as soon as one is
free, as Ray and Slurm do. Cells take what the size of their model, their variants and chance say. Machines are lost
and come back, processes are killed, some cells fail. A cell whose machine is lost loses up to two minutes, and queues
again as the last one.

The bound is what no order can beat: of each class the seconds of all its cells by its machines, and the longest cell.
The losses are in the makespan and not in the bound.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.command_line import prompts  # type: ignore[import-not-found]

from peftopt import store
from peftopt.recipe import grid as grids
from peftopt.recipe.grid import Cell, Grid, MachineClass
from peftopt.report.swept import CellResult
from peftopt.runner import cells, sweep
from peftopt.runner.cells import Attempt, Job
from peftopt.runner.executors.ahead import Ahead
from peftopt.runner.judged import Silent

MACHINES = {"cpu": 40, "l4": 80, "a100": 24, "h100x4": 8}
"""Machines of each class."""

SPEED = {"cpu": 0.35, "l4": 1.0, "a100": 1.6, "h100x4": 1.8}
"""How fast a class is."""

RECIPE = """model: {{base: base, adapter: adapter}}
calibration: {prompts}
workloads: {{chat: {{prompts: {prompts}, new_tokens: 16, batch: 1}}}}
quality: {{prompts: {prompts}, new_tokens: 8, batch: 4}}
variants:
  {{adapter: [], merged: [merge], int8: [merge, int8], gptq4: [merge, gptq], awq4: [merge, awq],
    big: [merge, {{engine: vllm}}]}}
minimize: latency.p50@chat
"""

GROUPS = """variants: {merging: [merged], quantizing: [int8, gptq4, awq4], sharded: [big]}
machines:
  cpu: {variants: [merging]}
  l4: {gpus: 1, variants: [merging, quantizing]}
  a100: {gpus: 1, variants: [quantizing]}
  h100x4: {gpus: 4, variants: [sharded]}
"""
"""Five cells of each adapter."""

MODELS = 20
SIZES = (1e9, 70e9)
"""Bytes of the smallest and of the largest model; the others are spread evenly on a logarithmic scale."""

MEAN_S = 1200.0
"""A cell takes so long on average."""

CHANCE = 0.5
"""The standard deviation of the logarithm of what no forecast knows, such as how long a race goes on."""

LOST_EVERY_S = 24 * 3600.0
"""A machine is lost after so long, on average."""

BACK_S = 1800.0
"""And comes back after so long, on average."""

KILLED_EVERY_S = 24 * 3600.0
"""The process of a cell is killed after so long, on average."""

LOSES_S = 120.0
"""A cell that begins again loses at most so much: its start, and the block that it was in."""

FAILS = 0.01
"""This share of the cells fails, at some time."""

SEEDS = 5


@dataclass
class Cluster:
    """An executor on a simulated clock. `takes`: the seconds of each cell. With a `decision`, each cell that ends
    leaves a run with it, and how it ended. With `faults`, machines and processes are lost. `at_once`: the cluster gets
    all cells at the start; else few at a time, as Ray does."""

    takes: Mapping[str, float]
    dice: random.Random
    decision: str = ""
    faults: bool = True
    at_once: bool = False
    waiting: Ahead = field(default_factory=Ahead)
    now: float = 0.0
    own_s: float = 0.0
    waits_s: float = 0.0
    begun_s: float = field(default_factory=time.monotonic)
    losses: int = 0
    ends: dict[str, float] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=lambda: dict(MACHINES))
    queues: dict[str, deque[tuple[Job, float]]] = field(default_factory=lambda: defaultdict(deque))
    events: list[tuple[float, int, str, Job | None, float]] = field(default_factory=list)
    number: int = 0

    def machines(self, needs: MachineClass) -> int:
        """How many machines the class has."""
        return MACHINES[needs.name]

    def found(self, folder: Path) -> bool:
        """No cell was submitted before."""
        return False

    def submit(self, job: Job) -> None:
        """It queues behind the others of its class."""
        self.waiting.add(job)
        self._hand_over(job.needs)

    def _hand_over(self, needs: MachineClass) -> None:
        machines = len(self.takes) if self.at_once else MACHINES[needs.name]
        due = self.waiting.due(needs, machines)
        self.queues[needs.name].extend((job, self.takes[job.name]) for job in due)

    def wait(self) -> tuple[Job, Attempt]:
        """The next cell that ends on the simulated clock."""
        began = time.monotonic()
        self.waits_s = self.waits_s or began - self.begun_s
        while True:
            self._begin()
            self.now, _, name, job, left = heapq.heappop(self.events)
            if job is None:
                self.free[name] += 1
                continue
            if left:
                self._lost(name, job, left)
                continue
            self.free[name] += 1
            self.ends[name] = self.now
            self.waiting.ended(job)
            self._hand_over(job.needs)
            ended = self._end(job)
            self.own_s += time.monotonic() - began
            return job, ended

    def _begin(self) -> None:
        """Free machines take the first cells that wait."""
        for name, queue in self.queues.items():
            while queue and self.free[name]:
                self.free[name] -= 1
                job, left = queue.popleft()
                fault = self._fault()
                if fault < left:
                    self._at(fault, name, job, left - fault + self.dice.uniform(0, LOSES_S))
                else:
                    self._at(left, name, job)

    def _fault(self) -> float:
        """Seconds until the machine or the process of a cell is lost."""
        return self.dice.expovariate(1 / LOST_EVERY_S + 1 / KILLED_EVERY_S) if self.faults else math.inf

    def _at(self, in_s: float, name: str, job: Job | None, left: float = 0.0) -> None:
        self.number += 1
        heapq.heappush(self.events, (self.now + in_s, self.number, name, job, left))

    def _lost(self, name: str, job: Job, left: float) -> None:
        """The cell queues again, and the machine is free now or when it is back."""
        self.losses += 1
        self.queues[name].append((job, left))
        is_machine = self.dice.random() < KILLED_EVERY_S / (LOST_EVERY_S + KILLED_EVERY_S)
        self._at(self.dice.expovariate(1 / BACK_S) if is_machine else 0.0, name, None)

    def _end(self, job: Job) -> Attempt:
        """What the machine leaves on disk."""
        fails = self.dice.random() < FAILS
        ended = Attempt(cells.now(), self.takes[job.name], 4 if fails else 0, "simulated", "failed" if fails else "")
        if not self.decision:
            return ended
        if not fails:
            run = job.results / "runs" / f"20261130T120000-{job.name}-01234567"
            store.note(run, job.name)
            run.mkdir(parents=True)
            (run / store.FINISHED).touch()
            (run / "decision.json").write_text(self.decision)
        cells.keep(job.folder, ended)
        return ended

    def close(self) -> str:
        """Nothing runs."""
        return ""


def main(number: int = 10_000) -> None:
    """Print what planning takes, how near sweeps end to the bound, and the memory."""
    with tempfile.TemporaryDirectory(prefix="scheduling-") as folder:
        home = Path(folder)
        file = write_grid(home, number)
        planned(file, home)
        read = sweep.read_grid(file)
        listed = grids.cells(read)
        orders(read, listed)
        whole(read, listed, home)


def write_grid(home: Path, number: int) -> Path:
    """A grid of so many cells, its models as files without contents."""
    questions = prompts(home / "eval.jsonl", 6, "eval")
    (home / "recipe.yaml").write_text(RECIPE.format(prompts=questions))
    lines = ["recipe: recipe.yaml", "models:"]
    least, most = map(math.log, SIZES)
    adapters = number // (5 * MODELS)
    for n in range(MODELS):
        (home / f"m{n}").mkdir()
        with (home / f"m{n}" / "model.safetensors").open("wb") as weights:
            weights.truncate(round(math.exp(least + (most - least) * n / (MODELS - 1))))
        for a in range(adapters):
            (home / f"m{n}" / f"a{a}").mkdir()
        listed = ", ".join(f"a{a}: m{n}/a{a}" for a in range(adapters))
        lines.append(f"  m{n}: {{base: m{n}, adapters: {{{listed}}}}}")
    file = home / "grid.yaml"
    file.write_text("\n".join([*lines, GROUPS]))
    return file


def planned(file: Path, home: Path) -> None:
    """Print how long `peftopt sweep --dry-run` takes, with the start of its process."""
    options = ("--dry-run", "--no-forecast", "--quiet", "--machine", "cpu", "--results", home / "none")
    words = ("sweep", "run", file, *options)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "peftopt.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    print(f"peftopt sweep --dry-run: {time.monotonic() - began:.1f} s")


def drawn(read: Grid, listed: Sequence[Cell], dice: random.Random) -> dict[str, float]:
    """The seconds that each cell takes."""
    expected = sweep.lengths(read, listed)
    rough = {
        cell.name: expected[cell.name] / SPEED[cell.machine.name] * math.exp(dice.gauss(0, CHANCE)) for cell in listed
    }
    scale = MEAN_S / statistics.mean(rough.values())
    return {name: seconds * scale for name, seconds in rough.items()}


def bounds(listed: Sequence[Cell], takes: Mapping[str, float]) -> dict[str, float]:
    """The seconds that no order of a class's cells can beat."""
    by_class: dict[str, list[float]] = defaultdict(list)
    for cell in listed:
        by_class[cell.machine.name].append(takes[cell.name])
    return {name: max(sum(seconds) / MACHINES[name], *seconds) for name, seconds in by_class.items()}


def orders(read: Grid, listed: Sequence[Cell]) -> None:
    """Print the ratio of makespan to bound, of orders, with and without faults."""
    expected = sweep.lengths(read, listed)
    print("| order | the cluster has | no faults | faults | worst class, faults |\n|---|---|---|---|---|")
    for order, forecast in {"as listed": {}, "longest first": expected}.items():
        for at_once in (True, False):
            texts = []
            for faults in (False, True):
                both = [simulated(read, listed, forecast, faults, at_once, seed) for seed in range(SEEDS)]
                texts.append(spread([whole_ for whole_, _ in both]))
            texts.append(spread([worst for _, worst in both]))
            print(f"| {order} | {'all cells' if at_once else 'the next ones'} | {' | '.join(texts)} |")


def spread(ratios: Sequence[float]) -> str:
    """The median of ratios, and their range."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def simulated(
    read: Grid, listed: Sequence[Cell], forecast: Mapping[str, float], faults: bool, at_once: bool, seed: int
) -> tuple[float, float]:
    """The ratio of makespan to bound, of the whole sweep and of the worst class. Nothing is written."""
    takes = drawn(read, listed, random.Random(seed))
    cluster = Cluster(takes, random.Random(seed), faults=faults, at_once=at_once)
    for cell in sweep.ordered(listed, MACHINES, forecast):
        cluster.submit(Job(cell.name, (), cell.machine, Path(), Path()))
    for _ in listed:
        cluster.wait()
    least = bounds(listed, takes)
    worst = max(end / least[name] for name, end in cluster.ends.items())
    return max(cluster.ends.values()) / max(least.values()), worst


def whole(read: Grid, listed: Sequence[Cell], home: Path) -> None:
    """Run the real sweep on the simulated cluster, and print what it takes, also where all is decided."""
    takes = drawn(read, listed, random.Random(0))
    decision = (Path(__file__).resolve().parent.parent / "results" / "example" / "decision.json").read_text()
    cluster = Cluster(takes, random.Random(0), json.dumps(json.loads(decision)))
    results = home / "results"
    standing = timed("where all stand, at first", lambda: cells.stand(listed, results, read.name))
    cluster.begun_s = time.monotonic()
    sweep.sweep(standing, results, read.name, cluster, Silent(), takes=sweep.lengths(read, listed))
    rest = time.monotonic() - cluster.begun_s - cluster.waits_s - cluster.own_s
    least = bounds(listed, takes)
    makespan = max(cluster.ends.values())
    print(f"{len(listed)} cells, planned and submitted in {cluster.waits_s:.1f} s")
    print(f"each end of a cell: {rest / len(listed) * 1000:.1f} ms of the sweep's own")
    for name, end in cluster.ends.items():
        print(f"  {name}: {MACHINES[name]} machines, ended after {end / 3600:.1f} h, bound {least[name] / 3600:.1f} h")
    print(f"makespan {makespan / max(least.values()):.3f} of the bound, {cluster.losses} losses of cells; {memory()}")
    timed("where all stand, at last", lambda: cells.stand(listed, results, read.name))
    print(memory())


def memory() -> str:
    """The peak of this process up to now."""
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"


def timed(what: str, work: Callable[[], list[CellResult]]) -> list[CellResult]:
    """What `work` returns; how long it took is printed."""
    began = time.monotonic()
    value = work()
    print(f"{what}: {time.monotonic() - began:.1f} s")
    return value


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main(*map(int, sys.argv[1:]))
