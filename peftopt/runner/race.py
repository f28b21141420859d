"""The race: blocks in random order, each variant launched afresh every few of them."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from peftopt import corpus, machine, plugins
from peftopt.corpus import draw
from peftopt.decision import stopping
from peftopt.errors import WorkerFailed
from peftopt.jobs import MemoryJob, SpeedJob
from peftopt.measurements import Disturbance, Turn
from peftopt.records import TWIN, Variant, Workload
from peftopt.runner import trace
from peftopt.runner.process import WorkerProcess, fork_server, interrupt
from peftopt.runner.run import Run, load, try_twice, warm, worker


def race(run: Run, workload: Workload, ahead: Field | None = None) -> None:
    """Measure blocks in random order until every variant is decided, together with its references and the A/A arm. The
    workers of the first blocks may have been started `ahead`."""
    recipe = run.recipe
    started = time.perf_counter()
    first = _next_block(run, workload)
    with run.listener.progress(f"race {workload.name}", run.evidence.budget, "blocks") as show:
        wants = _undecided(run, workload)
        while wants:
            show(_next_block(run, workload), f"{len(wants)} variants")
            with ahead or Field(run, workload) as field_:
                ahead = None
                for _ in range(recipe.measure.relaunch):
                    if not wants:
                        break
                    field_.block(_next_block(run, workload), wants)
                    show(_next_block(run, workload), f"{len(wants)} variants")
                    wants = _undecided(run, workload)
            wants = _undecided(run, workload)  # now the workers' memory is known
    blocks = _next_block(run, workload) - first
    run.listener.done("race", f"{workload.name}, {blocks} blocks", time.perf_counter() - started)


def _undecided(run: Run, workload: Workload) -> frozenset[str]:
    """The variants that need another block."""
    with trace.span(trace.PARENT, "judge"):
        return stopping.blocks(run.evidence, workload.name)


def _next_block(run: Run, workload: Workload) -> int:
    turns = run.evidence.turns.get((run.recipe.baseline, workload.name), {})
    return max(turns, default=-1) + 1


ROOM = 2 * 2**30
"""Bytes that must be free for each worker that is started ahead, while other workers run."""

CORES = 4
"""Processors that a starting server keeps busy: several of its processes import, and a compiler runs."""


class Field:
    """The workers of some consecutive blocks. Each variant is launched once, then its worker stays."""

    def __init__(self, run: Run, workload: Workload) -> None:
        self.run = run
        self.workload = workload
        self.rows = corpus.read(workload.prompts, workload.slice)
        self.stack = contextlib.ExitStack()
        # lives as long as its workers: the kernel ends a worker with the thread that started it
        self.pool = self.stack.enter_context(ThreadPoolExecutor(len(run.recipe.variants) + 1))
        # one for each launch: what is equal in all its copies, as the addresses of libraries, differs between launches
        self.forks = self.stack.enter_context(fork_server(run.folder / "logs" / "forks-speed.log", self._threads))
        self.started: dict[str, WorkerProcess] = {}
        self.children: dict[str, WorkerProcess] = {}
        self.broken: dict[str, WorkerFailed] = {}
        """Why a server did not start. The error is raised at its turn."""

    def __enter__(self) -> Field:
        return self

    def start(self) -> None:
        """Start the workers of the first block now, if there is memory: their imports take longer than loading."""
        wants = stopping.blocks(self.run.evidence, self.workload.name)
        arms = self._arms(wants)
        if wants and machine.free_memory() > ROOM * len(arms):
            self._start(arms)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            interrupt()  # an interrupted run does not wait for its workers
            self.stack.__exit__(kind, error, trace_)
            return
        for arm, child in self.children.items():
            with contextlib.suppress(WorkerFailed):
                self.run.log(child.ask(MemoryJob(), 30), arm, self.workload.name)
        self.close()

    def close(self) -> None:
        """End the workers, if they have not ended yet."""
        self.stack.close()

    def block(self, number: int, wants: frozenset[str]) -> None:
        """Measure one block: each arm once, in a random order, which is kept with its turns. The order does not depend
        on the recipe's seed: the same order in every run would be a bias."""
        arms = self._arms(wants)
        random.SystemRandom().shuffle(arms)
        job = self._job(number)
        self._start([arm for arm in arms if arm not in self.children.keys() | self.started.keys()])
        self._serve([arm for arm in arms if arm not in self.children and self._is_server(arm)])
        for order, arm in enumerate(arms):
            if self._variant(arm).name not in self.run.evidence.failures:
                self._turn(arm, number, order, job)

    def _arms(self, wants: frozenset[str]) -> list[str]:
        recipe = self.run.recipe
        timed = self.workload.name == recipe.minimize.workload or any(v.policies for v in recipe.variants.values())
        return sorted(wants) + ([recipe.baseline + TWIN] if timed else [])

    def _turn(self, arm: str, number: int, order: int, job: SpeedJob) -> None:
        def attempt() -> None:
            child = self._child(arm)
            pids = {pid for c in self.children.values() for pid in c.processes()}
            before = machine.moment()
            cpu_before = child.cpu_s()
            try:
                timed = child.ask(job, self.run.recipe.measure.deadline_s)
            except WorkerFailed:
                self.children.pop(arm, None)
                raise
            after = machine.moment()
            cpu = child.cpu_s() - cpu_before
            disturbance = Disturbance(**machine.disturbance(before, after, cpu, pids))
            turn = Turn(block=number, order=order, requests=timed.requests, engine=timed.engine, machine=disturbance)
            self.run.log(turn, arm, self.workload.name)
            # vLLM's workers poll for work for another second, on the processors of the next turn
            with trace.span(trace.PARENT, "rest"):
                machine.rest(child.processes())

        try_twice(self.run, arm.removesuffix(TWIN), f"speed ({self.workload.name})", attempt)

    def _job(self, number: int) -> SpeedJob:
        """The job of a block, the same for every variant."""
        recipe = self.run.recipe
        workload = self.workload
        generator = random.Random(f"{recipe.seed}/{workload.name}/{number}/arrivals")
        return SpeedJob(
            batches=draw(self.rows, workload, number, recipe),
            new_tokens=workload.new_tokens,
            warmup=recipe.measure.warmup,
            stop=workload.lengths == "natural",
            users=workload.users,
            rate=workload.rate,
            seed=generator.getrandbits(32) if workload.loaded else 0,
        )

    def _start(self, arms: Sequence[str]) -> None:
        """Start these workers side by side. A worker that cannot start is tried again, and recorded, at its turn."""

        def start(arm: str) -> None:
            with contextlib.suppress(WorkerFailed):
                self.started[arm] = self._worker(arm)

        list(self.pool.map(start, arms))

    def _serve(self, arms: Sequence[str]) -> None:
        """Start these servers side by side, as many as the processors allow: each takes a minute or more. A model in a
        worker loads alone, at its turn, since its loading time is a metric."""
        lanes = machine.cores() // CORES
        if lanes < 2:
            return

        def open_(arm: str) -> None:
            try:
                self._child(arm)
            except WorkerFailed as error:
                self.broken[arm] = error

        for first in range(0, len(arms), lanes):
            list(self.pool.map(open_, arms[first : first + lanes]))

    def _is_server(self, arm: str) -> bool:
        return plugins.catalogue()[self._variant(arm).engine.plugin].serves

    def _worker(self, arm: str) -> WorkerProcess:
        fresh = worker(self.run, self._variant(arm), f"speed-{self.workload.name}", self._threads, self.forks)
        return self.stack.enter_context(fresh)

    @property
    def _threads(self) -> int:
        return self.run.recipe.measure.threads or machine.cores()

    def _child(self, arm: str) -> WorkerProcess:
        """The arm's worker. Its model is loaded at its first turn."""
        error = self.broken.pop(arm, None)
        if error:
            raise error
        if arm not in self.children:
            child = self.started.pop(arm, None) or self._worker(arm)
            self.run.log(load(self.run, self._variant(arm), child), arm, self.workload.name)
            if self._variant(arm).engine.technique:  # a timed request must not compile or load anything
                warm(self.run, child, self.rows, self.workload.batch, self.workload.new_tokens)
            self.children[arm] = child
        return self.children[arm]

    def _variant(self, arm: str) -> Variant:
        return self.run.recipe.variants[arm.removesuffix(TWIN)]
