"""Prepare a race: build the artifacts and ask for the answers. Nothing here is timed, so jobs run side by side as far
as the machine's memory allows."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from peftopt import corpus, machine, store
from peftopt.corpus import Row, draw
from peftopt.decision import stopping
from peftopt.errors import WorkerFailed
from peftopt.forking import ForkServer
from peftopt.jobs import KernelsJob, QualityJob, TaskJob, TransformJob
from peftopt.measurements import NO_FACTS, Answer, Built, as_json
from peftopt.merging import certificate
from peftopt.metrics import TASK
from peftopt.models import provenance
from peftopt.probes.quality import Reference
from peftopt.progress import Reached
from peftopt.recipe import plan as planning
from peftopt.records import GENERIC, YAML, Build, Json, Model, Quality, Variant, task_name
from peftopt.runner import preflight
from peftopt.runner.build import make_artifact
from peftopt.runner.process import WorkerProcess, fork_server, interrupted
from peftopt.runner.run import Run, check_baseline, load, try_twice, warm, worker
from peftopt.runner.schedule import Job, work

CHUNK = 96
"""Prompts that a variant answers between two checks whether it has failed already."""

CHECKED = "baseline checked"
AHEAD = "ahead of the race"

Hear = Callable[[float, str], None]
"""Receives the share of a job that is done, and what is going on."""


def make_ready(run: Run, ahead: Callable[[], None]) -> None:
    """Build or reuse every artifact, and have every variant answer the quality prompts.

    Jobs that others depend on go first: builds, the baseline's answers (the reference of all others) and its second
    run, since errors that both runs have are not a variant's. `ahead` runs once all is built, when no other job waits.
    Raises WorkerFailed when there is no baseline to compare with.
    """
    source = store.size(Path(run.recipe.base)) + store.size(Path(run.recipe.adapter))
    run.log(Built(id=planning.SOURCE, size_bytes=source, tier0=(), seconds=0, cached=True))
    lanes = lanes_for(Path(run.recipe.base))
    threads = max(1, machine.cores() // lanes)
    with contextlib.ExitStack() as stack, run.listener.progress("prepare", 100, "%") as show:
        forks = stack.enter_context(fork_server(run.folder / "logs" / "forks-quality.log", threads))
        hearers = _Hearers(show)
        jobs = dict([*_builds(run, threads, hearers), *_answers(run, threads, hearers, stack, forks)])
        work({**jobs, AHEAD: Job(ahead, frozenset({build.id for build in run.plan.builds} & jobs.keys()))}, lanes)


def lanes_for(base: Path) -> int:
    """How many jobs run at a time: one per CPU core, with a GPU too, as far as memory allows."""
    each = 6 * store.size(base) + 2**30
    return max(1, min(machine.cores(), machine.free_memory() // each))


class _Hearers:
    """One progress bar for jobs that run side by side: it shows the mean of their shares."""

    def __init__(self, show: Callable[[int, str], None]) -> None:
        self.show = show
        self.shares: dict[str, float] = {}
        self.lock = threading.Lock()

    def of(self, job: str) -> Hear:
        self.shares[job] = 0.0

        def hear(share: float, what: str) -> None:
            with self.lock:
                self.shares[job] = share
                self.show(int(100 * sum(self.shares.values()) / len(self.shares)), what)

        return hear


# ---- artifacts -----------------------------------------------------------------------------------


def _builds(run: Run, threads: int, hearers: _Hearers) -> Iterator[tuple[str, Job]]:
    calibration = corpus.calibration(run.recipe.calibration)
    for build in run.plan.builds:
        do = partial(_build, run, calibration, threads, build, hearers.of(build.id))
        yield build.id, Job(do, frozenset({build.parent} - {planning.SOURCE}))


def _build(run: Run, calibration: Sequence[Row], threads: int, build: Build, hear: Hear) -> None:
    """Build or reuse one artifact; a failure is recorded for every variant that needs it."""
    users = _users(run, build)
    if all(name in run.evidence.failures for name in users):
        return  # the parent's build failed
    # They need no texts, but their certificates compare predictions, better on the user's own prompts.
    certified = build.step.technique in ("merge", "bake")
    rows = tuple(calibration) if build.step.calibrates or certified else ()

    def show(at: Reached) -> None:
        hear(at.share, f"{build.step.plugin}: {at.phase} {at.what}")

    def make(out: Path) -> tuple[Model, Mapping[str, Json]]:
        job = TransformJob(
            plugin=build.step.plugin,
            params=build.step.params,
            model=run.artifact_model(build.parent),
            out=str(out),
            rows=rows,
            seed=run.recipe.seed,
            calibration=GENERIC if run.recipe.calibration == GENERIC else "task",
        )
        log = run.folder / "logs" / f"build-{build.step.plugin}-{build.id[:8]}.log"
        transformed = make_artifact(job, log, threads, run.recipe.measure.deadline_s, show)
        facts = as_json(transformed)
        del facts["model"]  # an artifact's manifest has its adapters, and no paths
        return transformed.model, facts

    try:
        with run.store.locked(build, interrupted):
            if run.remote:
                artifact = run.remote.obtain(run.store, build, make, Path(run.artifact_model(build.parent).path), show)
            else:
                artifact = run.store.find(build) or run.store.build(build, make)
    except WorkerFailed as error:
        for variant in users:
            run.fail(variant, f"build ({build.step.plugin})", error)
        return
    parity = artifact.facts.get("certificate")
    quantized = artifact.facts.get("quantization")
    built = Built(
        id=build.id,
        plugin=build.step.plugin,
        cached=artifact.cached,
        seconds=artifact.seconds,
        tier0=tuple(artifact.facts["tier0"]),
        peak_memory_bytes=artifact.facts.get("peak_memory_bytes"),
        size_bytes=artifact.size_bytes,
        content=artifact.content,
        certificate=certificate.summary(parity) if parity else "",
        quantization=provenance.summary(quantized) if quantized else "",
    )
    run.log(built, users[0])
    run.listener.done("build", build.step.plugin, None if artifact.cached else artifact.seconds, built.quantization)


def build_alone(run: Run, build: Build, threads: int) -> None:
    """Build or reuse one artifact, with a bar of its own. Raises WorkerFailed when the build fails."""
    calibration = corpus.calibration(run.recipe.calibration)
    with run.listener.progress(f"build {build.step.plugin}", 100, "%") as show:
        _build(run, calibration, threads, build, lambda share, what: show(int(100 * share), what))
    for variant in _users(run, build):
        failure = run.evidence.failures.get(variant)
        if failure:
            raise WorkerFailed(failure.reason, failure.detail, failure.hint)


def _users(run: Run, build: Build) -> list[str]:
    """The variants that are built from this artifact."""
    parents = {b.id: b.parent for b in run.plan.builds}
    users = []
    for variant, at in run.plan.models.items():
        while at and at != build.id:
            at = parents[at]
        if at:
            users.append(variant)
    return users


# ---- answers -------------------------------------------------------------------------------------


def _answers(
    run: Run, threads: int, hearers: _Hearers, stack: contextlib.ExitStack, forks: ForkServer | None
) -> Iterator[tuple[str, Job]]:
    """Jobs for the answers: the baseline's twice, to know how often it differs from itself, and every variant's once.
    Engines that compile go first, since they take longest; they compile before the baseline has answered."""
    quality = run.recipe.quality
    if quality is None:
        return
    rows = corpus.asked_of(corpus.read(quality.prompts, quality.slice), quality.rows)
    baseline = run.recipe.variants[run.recipe.baseline]
    builds = {name: frozenset({at} - {planning.SOURCE}) for name, at in run.plan.models.items()}

    def exam(variant: Variant, most: int | None, launch: int = 1) -> _Exam:
        batch = quality.batch if launch == 1 else max(1, quality.batch // 2)
        part = rows if most is None else rows[: -(-most // quality.batch) * quality.batch]
        name = f"{variant.name} again" if launch == 2 else variant.name
        answering = _Exam(run, quality, variant, name, part, launch, batch, threads, forks, hearers.of(name))
        stack.callback(answering.close)
        return answering

    yield baseline.name, Job(exam(baseline, None).answer, builds[baseline.name])
    yield CHECKED, Job(partial(check_baseline, run), frozenset({baseline.name}))
    yield f"{baseline.name} again", Job(exam(baseline, None, 2).answer, frozenset({CHECKED}))
    others = [v for v in run.recipe.variants.values() if v != baseline]
    for variant in sorted(others, key=lambda v: v.engine == baseline.engine):
        answering = exam(variant, stopping.answers(run.recipe, variant))
        after = builds[variant.name]
        if variant.engine.technique:
            yield f"{variant.name} ahead", Job(answering.compile, after)
            after = frozenset({f"{variant.name} ahead"})
        yield variant.name, Job(answering.answer, after | {CHECKED})


class _Exam:
    """One variant answers the quality prompts, chunk by chunk. It stops early once it cannot be accepted any more."""

    def __init__(
        self,
        run: Run,
        quality: Quality,
        variant: Variant,
        name: str,
        rows: Sequence[Row],
        launch: int,
        batch: int,
        threads: int,
        forks: ForkServer | None,
        hear: Hear,
    ) -> None:
        self.run = run
        self.quality = quality
        self.variant = variant
        self.name = name
        self.rows = rows
        self.launch = launch
        self.batch = batch
        self.threads = threads
        self.forks = forks
        self.hear = hear
        self.reference = run.folder / "logs" / "reference.npz"
        self.is_reference = variant.name == run.recipe.baseline and launch == 1
        self.child: WorkerProcess | None = None
        self.held = contextlib.ExitStack()

    def left(self) -> list[Row]:
        """The rows without an answer yet; none for a variant that failed."""
        evidence = self.run.evidence
        if self.variant.name in evidence.failures:
            return []
        answered = evidence.rows(self.variant.name, self.launch)
        without = {row.id for row in Reference.lacks(self.reference, self.rows)} if self.is_reference else set()
        return [row for row in self.rows if row.id not in answered or row.id in without]

    def tasks(self) -> list[str]:
        """The tasks without a result yet; none for a variant that failed or cannot be accepted any more."""
        evidence = self.run.evidence
        name = self.variant.name
        if not self.quality.tasks or self.launch != 1:
            return []
        if name in evidence.failures or stopping.hopeless(evidence, name):
            return []
        return [task for task in self.quality.tasks if TASK + task_name(task) not in evidence.tasks[name]]

    def compile(self) -> None:
        """Load the model, and compile for the race, into the compile cache, while other variants answer. The worker
        stays for the answers."""
        if self.left():
            try_twice(self.run, self.variant.name, "compile", self._compile)

    def answer(self) -> None:
        """Ask for the missing answers and tasks, and log them."""
        left = self.left()
        if left:
            started = time.perf_counter()
            n = len(self.rows) - len(left)

            def tell(answer: Answer) -> None:
                nonlocal n
                n += 1
                self.run.log(answer, self.variant.name, launch=self.launch)
                self.hear(n / len(self.rows), self.name)

            if try_twice(self.run, self.variant.name, "quality", partial(self._ask, tell)):
                rule = stopping.turned_down_by(self.run.evidence, self.variant.name)
                stopped = f", stopped after {n} prompts by {rule}" if n < len(self.rows) and rule else ""
                self.run.listener.done("answer", self.name + stopped, time.perf_counter() - started)
        for task in self.tasks():
            if self.variant.name in self.run.evidence.failures:
                break
            started = time.perf_counter()
            if try_twice(self.run, self.variant.name, f"task {task_name(task)}", partial(self._ask_task, task)):
                self.run.listener.done("task", f"{task_name(task)}, {self.name}", time.perf_counter() - started)
        self.close()
        self.hear(1, self.name)

    def _ask_task(self, task: str) -> None:
        def hear(at: Reached) -> None:
            self.hear(at.share, f"{self.name}: {task_name(task)}")

        deadline = self.run.recipe.measure.deadline_s
        task = str(Path(task).resolve()) if task.endswith(YAML) else task  # a worker's working directory is another
        with self._opened() as child:
            task_answers = child.ask(TaskJob(task, self.quality.task_rows), deadline, hear=hear)
            self.run.log(task_answers, self.variant.name)

    def _ask(self, tell: Callable[[Answer], None]) -> None:
        quality = self.quality
        left = self.left()
        chunks = [left] if self.is_reference else [left[i : i + CHUNK] for i in range(0, len(left), CHUNK)]
        with self._opened() as child:
            for chunk in chunks:
                if self.launch == 1 and stopping.hopeless(self.run.evidence, self.variant.name):
                    break
                job = QualityJob(
                    rows=tuple(chunk),
                    schema=preflight.schema(quality.schema) if quality.schema else None,
                    new_tokens=quality.new_tokens,
                    batch=self.batch,
                    reference=None if self.is_reference else str(self.reference),
                    write_reference=str(self.reference) if self.is_reference else None,
                    invariants=quality.invariants,
                )
                child.ask(job, self.run.recipe.measure.deadline_s, tell)
            if self.launch == 1:
                self._name_kernels(child)

    def _name_kernels(self, child: WorkerProcess) -> None:
        """On a machine with a GPU, log which kernels a request of the race runs, for the report."""
        recipe = self.run.recipe
        if not machine.gpus():
            return
        asked = recipe.workloads[recipe.minimize.workload]
        batch = draw(corpus.read(asked.prompts, asked.slice), asked, 0, recipe)[0]
        kernels = child.ask(KernelsJob(batch, asked.new_tokens), recipe.measure.deadline_s)
        if kernels != NO_FACTS:
            self.run.log(kernels, self.variant.name)

    def _compile(self) -> None:
        """Compile every shape of the workloads, and one shape for the answers."""
        recipe = self.run.recipe
        with self._opened() as child:
            for workload in recipe.workloads.values():
                rows = corpus.read(workload.prompts, workload.slice)
                warm(self.run, child, rows, workload.batch, workload.new_tokens)
            warm(self.run, child, self.rows, self.batch, self.quality.new_tokens, timed=False)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[WorkerProcess]:
        """The variant's worker with its model loaded, a fresh one if there is none. A worker that fails is ended."""
        try:
            if self.child is None:
                started = worker(self.run, self.variant, f"quality-{self.launch}", self.threads, self.forks)
                child = self.held.enter_context(started)
                load(self.run, self.variant, child)
                self.child = child
            yield self.child
        except WorkerFailed:
            self.close()
            raise

    def close(self) -> None:
        """End the worker, if there is one."""
        self.child = None
        self.held.close()
