"""Walk the plan: build, check answers, race. What the store has is not done again; what fails is a record.

    artifacts -> answers -> blocks -> decision

Nothing here judges: which variants still need blocks or answers is asked of `need`, on the records so far.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

from peftopt import (
    building,
    corpus,
    environments,
    identity,
    machine,
    need,
    plugins,
    preflight,
    provenance,
    stats,
    store,
)
from peftopt import plan as planning
from peftopt.child import Child, interrupt
from peftopt.corpus import Row
from peftopt.errors import BadInput, WorkerFailed
from peftopt.evidence import TWIN, Evidence
from peftopt.merging import certificate
from peftopt.records import GENERIC, Build, Json, Measurement, Model, Plan, Recipe, Variant, Workload

CHUNK = 96
"""Prompts answered between two looks at whether a variant has already failed."""

PERCENT = 100
"""Steps of a build on the bar that several of them share."""

RETRIED = ("killed", "died")
"""Deaths that are retried once in a clean process: a neighbour or a driver may have caused them."""


class Listener(Protocol):
    """Who hears how the run goes: the console, or nobody."""

    def done(self, step: str, what: str, seconds: float | None, note: str = "") -> None:
        """One step is over; seconds None means that it was cached."""

    def warn(self, text: str) -> None: ...

    def tell(self, text: str) -> None:
        """Something worth knowing that is no warning."""

    def progress(self, title: str, total: int) -> contextlib.AbstractContextManager[Callable[[int, str], None]]:
        """A bar; the function it gives sets how many of `total` are done and what is going on."""


@dataclass
class Run:
    """One run's folder and what it knows so far. `log` is the only way in for a measurement."""

    plan: Plan
    store: store.Store
    folder: Path
    listener: Listener
    measurements: list[Measurement] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def log(self, probe: str, variant: str, values: Json, workload: str = "", launch: int = 0) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        measurement = Measurement(probe, variant, workload, launch, values, at)
        with self.lock:
            store.append(self.folder / "measurements.jsonl", measurement)
            self.measurements.append(measurement)

    def fail(self, variant: str, stage: str, error: WorkerFailed) -> None:
        values = {"stage": stage, "reason": error.reason, "detail": error.detail, "hint": error.hint}
        self.log("failure", variant, values)
        self.listener.warn(f"{variant}: {stage} failed, {error}")

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def evidence(self) -> Evidence:
        with self.lock:
            return Evidence(self.plan, self.measurements)

    def model(self, variant: Variant) -> Model:
        """What the variant's engine opens."""
        return self.artifact_model(self.plan.models[variant.name])

    def artifact_model(self, artifact_id: str) -> Model:
        if artifact_id == planning.SOURCE:
            return Model(self.recipe.base, (self.recipe.adapter,))
        found = json.loads((self.store.folder(artifact_id) / store.MANIFEST).read_text())
        return Model(str(self.store.folder(artifact_id) / store.MODEL), tuple(found["adapters"]))

    def alive(self) -> list[Variant]:
        failed = self.evidence.failures
        return [v for v in self.recipe.variants.values() if v.name not in failed]


def prepare(
    recipe: Recipe, text: str, results: Path, listener: Listener, fresh: bool = False, more: bool = False
) -> Run:
    """Check the recipe's files, make the plan and open its run folder: an unfinished run of the same plan goes on, and
    with `more` a finished one too."""
    home = store.Store(results.resolve(), listener.warn)
    plan, key = _planned(recipe)
    home.check_writable()
    runs = home.root / "runs"
    mine = sorted(runs.glob(f"*-{recipe.name}-{key}"))
    unfinished = [f for f in mine if not (f / "decision.json").exists()]
    if (unfinished or (more and mine)) and not fresh:
        folder = (unfinished or mine)[-1]
        if more and not unfinished:
            return reopen(folder, listener)
        listener.warn(f"going on with the unfinished run {folder.name}")
    else:
        folder = runs / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{recipe.name}-{key}"
        folder.mkdir(parents=True)
        store.write(folder / "recipe.yaml", text)
        store.write(folder / "plan.json", json.dumps(asdict(plan), indent=1))
        store.write(folder / "machine.json", json.dumps(machine.describe(), indent=1))
    return Run(plan, home, folder, listener, store.read(folder / "measurements.jsonl", listener.warn))


def _planned(recipe: Recipe) -> tuple[Plan, str]:
    """The recipe's plan on its files as they are now, and the hash that names what it measures."""
    preflight.check(recipe)
    sources = {
        "base": identity.of_folder(Path(recipe.base)),
        "adapter": identity.of_folder(Path(recipe.adapter)),
        "calibration": identity.of_file(corpus.calibration_file(recipe.calibration)) if recipe.calibration else "",
    }
    plan = planning.plan(recipe, sources, environments.versions())
    return plan, identity.of_value([asdict(plan), sources, _content(recipe)])[:8]


def reopen(folder: Path, listener: Listener) -> Run:
    """A run that may get more blocks. Raises BadInput where they would measure something else than its first ones."""
    plan = store.read_plan(folder / "plan.json")
    now, key = _planned(plan.recipe)
    if [b.id for b in now.builds] != [b.id for b in plan.builds] or not folder.resolve().name.endswith(f"-{key}"):
        hint = "run the recipe again: a new run measures everything as it is now"
        raise BadInput(f"the models, prompts or libraries of {folder} have changed since it ran", hint)
    was, is_ = json.loads((folder / "machine.json").read_text()), json.loads(json.dumps(machine.describe()))
    if changed := [key for key in ("cpu", "cores", "gpu") if was.get(key) != is_.get(key)]:
        hint = "blocks of two machines are not of one race: go on there, or run the recipe here"
        raise BadInput(f"{folder} was measured on another machine: its {', '.join(changed)} differ", hint)
    home = store.Store(folder.resolve().parents[1], listener.warn)
    return Run(plan, home, folder, listener, store.read(folder / "measurements.jsonl", listener.warn))


def add_blocks(run: Run, blocks: int | None = None, minutes: float | None = None) -> None:
    """Let the undecided races of a run go on: until the nearest to a decision should have one, as the planner says, or
    for so many blocks or minutes at most.

    What was spent of the error budget stays spent (stats.race). Where that can hardly decide any, nothing is measured.
    """
    evidence = run.evidence
    races = need.open_races(evidence)
    if not races:
        run.listener.tell("no race is open: more blocks would change no verdict")
        return
    nearest = min(races, key=lambda v: v.blocks_needed or 0)
    have = evidence.blocks(run.recipe.baseline, nearest.workload)
    each = evidence.minutes_per_block(nearest.workload)
    if minutes is not None and not each:
        raise BadInput("this run does not tell how long a block takes", "say how many with --blocks")
    limits = [n for n in (blocks, None if minutes is None else int(minutes / (each or 1))) if n is not None]
    needed = nearest.blocks_needed or 0
    total = have + min(limits) if limits else needed
    granted = Measurement("more", "", values={"max_blocks": total})
    still = need.open_races(Evidence(run.plan, [*run.measurements, granted]))
    if total >= stats.MOST_BLOCKS or total <= have or all(v.hopeless for v in still):
        asked = f"about {needed - have} more" if needed < stats.MOST_BLOCKS else "too many"
        offered = f"; {total - have} can hardly suffice" if limits else ""
        run.listener.warn(f"{nearest.rule} would take {asked} blocks{_about(needed - have, each)}{offered}")
        run.listener.warn("nothing was measured")
        return
    run.log("more", "", granted.values)
    run.listener.tell(f"up to {total - have} more blocks{_about(total - have, each)}")
    for workload in run.recipe.workloads.values():
        race(run, workload)
        _check_baseline(run)


def _about(blocks: int, each: float | None) -> str:
    return f", about {max(blocks * each, 1):.0f} minutes" if each and blocks < stats.MOST_BLOCKS // 2 else ""


def execute(run: Run) -> None:
    """Everything that leaves measurements, in the order of time."""
    survey(run)
    build(run)
    answer(run)
    for workload in run.recipe.workloads.values():
        race(run, workload)
        _check_baseline(run)


def survey(run: Run) -> None:
    """How fast this machine reads memory: once per run, with the threads of the measured, while nothing else runs."""
    if any(m.probe == "machine" for m in run.measurements):
        return
    threads = run.recipe.measure.threads or machine.cores()
    try:
        with Child(run.folder / "logs" / "bandwidth.log", threads) as child:
            run.log("machine", "", child.ask("bandwidth", 60))
    except WorkerFailed as error:
        run.listener.warn(f"memory bandwidth is not known: {error}")


def _check_baseline(run: Run) -> None:
    """Without the baseline there is nothing to compare with, so the run ends here."""
    if failure := run.evidence.failures.get(run.recipe.baseline):
        raise WorkerFailed(
            f"the baseline {run.recipe.baseline} could not be measured",
            f"{failure['stage']} failed, {failure['reason']}: {failure['detail']}",
            failure["hint"],
        )


def _content(recipe: Recipe) -> list[str]:
    """Hashes of the prompts: the same recipe over other rows is another run."""
    files = {w.prompts for w in recipe.workloads.values()}
    files |= {recipe.quality.prompts} if recipe.quality else set()
    return [identity.of_file(Path(f)) for f in sorted(files)]


# ---- artifacts -----------------------------------------------------------------------------------


def build(run: Run) -> None:
    """Every artifact of the plan, parents first; independent ones side by side where the machine has room."""
    source = store.size(Path(run.recipe.base)) + store.size(Path(run.recipe.adapter))
    run.log("build", "", {"id": planning.SOURCE, "size_bytes": source, "tier0": [], "seconds": 0, "cached": True})
    named = run.recipe.calibration
    calibration = corpus.read(str(corpus.calibration_file(named))) if named else []
    waiting = list(run.plan.builds)
    ready = {planning.SOURCE}
    while batch := [b for b in waiting if b.parent in ready]:
        with _lanes(run, len(batch)) as (pool, threads), run.listener.progress("build", PERCENT * len(batch)) as show:
            made = pool.map(partial(_build, run, calibration, threads, _joint(show)), batch)
            ready = {b.id for b, ok in zip(batch, made, strict=True) if ok}
        waiting = [b for b in waiting if b not in batch]


def _joint(show: Callable[[int, str], None]) -> Callable[[Build, dict[str, Json]], None]:
    """One bar for builds that go on side by side, in percent of each: what their workers report, added up."""
    percent: dict[str, int] = {}
    lock = threading.Lock()

    def hear(build: Build, at: dict[str, Json]) -> None:
        with lock:
            percent[build.id] = PERCENT * at["done"] // max(1, at["total"])
            show(sum(percent.values()), f"{build.step.plugin}: {at['phase']} {at['what']}")

    return hear


def _build(
    run: Run, calibration: Sequence[Row], threads: int, hear: Callable[[Build, dict[str, Json]], None], build: Build
) -> bool:
    """Build or reuse one artifact; a failure is recorded for every variant that needs it."""
    name = _users(run, build)[0]
    # A merge needs no texts, but its certificate compares predictions, and does so better on the user's own prompts.
    texts = calibration if build.step.calibrates or build.step.technique == "merge" else []
    rows = [row.as_json() for row in texts]

    def make(out: Path) -> tuple[Model, dict[str, Json]]:
        log = run.folder / "logs" / f"build-{build.step.plugin}-{build.id[:8]}.log"
        facts = building.transform(
            build.step.plugin,
            build.step.params,
            run.artifact_model(build.parent),
            out,
            rows,
            run.recipe.seed,
            log=log,
            threads=threads,
            deadline_s=run.recipe.measure.deadline_s,
            calibration=GENERIC if run.recipe.calibration == GENERIC else "task",
            hear=partial(hear, build),
        )
        return Model(str(out), tuple(facts.pop("model")["adapters"])), facts

    try:
        with run.store.locked(build):
            artifact = run.store.find(build) or run.store.build(build, make)
    except WorkerFailed as error:
        for variant in _users(run, build):
            run.fail(variant, f"build ({build.step.plugin})", error)
        return False
    facts = {k: artifact.facts.get(k) for k in ("seconds", "tier0", "peak_memory_bytes", "size_bytes", "content")}
    if found := artifact.facts.get("certificate"):
        facts["certificate"] = certificate.summary(found)
    if found := artifact.facts.get("quantization"):
        facts["quantization"] = provenance.summary(found)
    run.log("build", name, {"id": build.id, "plugin": build.step.plugin, "cached": artifact.cached, **facts})
    note = facts.get("quantization") or ""
    run.listener.done("build", build.step.plugin, None if artifact.cached else artifact.seconds, note)
    return True


def _users(run: Run, build: Build) -> list[str]:
    """The variants whose chain holds this artifact."""
    parents = {b.id: b.parent for b in run.plan.builds}
    users = []
    for variant, at in run.plan.models.items():
        while at and at != build.id:
            at = parents[at]
        if at:
            users.append(variant)
    return users


@contextlib.contextmanager
def _lanes(run: Run, jobs: int) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """A pool for work whose time is not measured, and the threads each of its workers gets.

    One thread each is the best use of CPU cores; on a GPU, or short of memory, one worker at a time.
    """
    each = 6 * store.size(Path(run.recipe.base)) + 2**30
    lanes = 1 if machine.gpus() else max(1, min(jobs, machine.cores(), machine.free_memory() // each))
    with ThreadPoolExecutor(lanes) as pool:
        try:
            yield pool, max(1, machine.cores() // lanes)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            interrupt()
            raise


# ---- answers -------------------------------------------------------------------------------------


def answer(run: Run) -> None:
    """Every variant answers the quality prompts: the baseline first, and twice, so that its null is known."""
    quality = run.recipe.quality
    if quality is None:
        return
    rows = _exam(corpus.read(quality.prompts), quality.rows)
    baseline = run.recipe.variants[run.recipe.baseline]
    parts = {v.name: rows[: _whole_batches(need.answers(run.recipe, v), quality.batch)] for v in run.alive()}
    null = rows[: _whole_batches(need.FEWEST_ANSWERS, quality.batch)]
    with run.listener.progress("answers", sum(map(len, parts.values())) + len(null)) as show:
        counts: dict[str, int] = {}

        def count(name: str, n: int) -> None:
            counts[name] = n
            show(sum(counts.values()), name)

        _answer(run, baseline, rows, 1, quality.batch, machine.cores(), count)
        _check_baseline(run)
        # The null first, since errors that it shares are not a variant's; then what only generates and takes longest.
        others = sorted((v for v in run.alive() if v != baseline), key=lambda v: v.engine == baseline.engine)
        with _lanes(run, len(others) + 1) as (pool, threads):
            jobs = [pool.submit(_answer, run, baseline, null, 2, max(1, quality.batch // 2), threads, count)]
            jobs += [pool.submit(_answer, run, v, parts[v.name], 1, quality.batch, threads, count) for v in others]
            for job in jobs:
                job.result()


def _whole_batches(rows: int | None, batch: int) -> int | None:
    return None if rows is None else -(-rows // batch) * batch


def _exam(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most` rows (0 = all): those tagged critical and an even choice of the others. The decisive come first,
    the long ones last: whoever stops early has answered what is cheap and telling."""

    def length(row: Row) -> int:
        return sum(len(m["content"]) for m in row.messages)

    tagged, others = [r for r in rows if r.critical], [r for r in rows if not r.critical]
    room = max(0, (most or len(rows)) - len(tagged))
    if room < len(others):
        others = [others[n * len(others) // room] for n in range(room)]
    chosen = [*tagged, *others][: most or None]
    longest = 4 * sorted(map(length, chosen))[len(chosen) // 2]
    return sorted(chosen, key=lambda row: (not row.critical, length(row) > longest))


def _answer(
    run: Run,
    variant: Variant,
    rows: Sequence[Row],
    launch: int,
    batch: int,
    threads: int,
    count: Callable[[str, int], None],
) -> None:
    """One variant's answers, chunk by chunk; a variant that has failed for good stops early."""
    quality = run.recipe.quality
    assert quality is not None
    label = f"{variant.name} again" if launch == 2 else variant.name
    reference = run.folder / "logs" / "reference.npz"
    is_reference = variant.name == run.recipe.baseline and launch == 1
    answered = run.evidence.rows(variant.name, launch)
    if is_reference and not reference.exists():
        answered = {}
    left = [row for row in rows if row.id not in answered]
    chunks = [left] if is_reference else [left[i : i + CHUNK] for i in range(0, len(left), CHUNK)]
    started = time.perf_counter()
    n = len(answered)

    def tell(values: dict[str, Json]) -> None:
        nonlocal n
        n += 1
        run.log("quality", variant.name, values, launch=launch)
        count(label, n)

    def attempt() -> None:
        with _opened(run, variant, f"quality-{launch}", threads) as (child, _):
            for chunk in chunks:
                evidence = run.evidence
                have = {} if is_reference else evidence.rows(variant.name, launch)
                todo = [row for row in chunk if row.id not in have]
                if not todo or (launch == 1 and need.hopeless(evidence, variant.name)):
                    continue
                child.ask(
                    "quality",
                    run.recipe.measure.deadline_s,
                    tell,
                    rows=[row.as_json() for row in todo],
                    schema=preflight.schema(quality.schema) if quality.schema else None,
                    new_tokens=quality.new_tokens,
                    batch=batch,
                    reference=None if is_reference else str(reference),
                    write_reference=str(reference) if is_reference else None,
                    invariants=asdict(quality.invariants),
                )
            if variant.engine.technique:
                _compile(run, variant, child)

    if left and _try_twice(run, variant.name, "quality", attempt):
        stopped = f", stopped after {n} prompts" if n < len(rows) else ""
        run.listener.done("answer", label + stopped, time.perf_counter() - started)
    count(label, len(rows))


def _compile(run: Run, variant: Variant, child: Child) -> None:
    """One request of each workload's shape, untimed: what the race's workers will need is in the compile cache then,
    and was compiled while others answered, not while they waited."""
    for workload in run.recipe.workloads.values():
        rows = corpus.read(workload.prompts, workload.slice)
        batches = _batches(rows, workload, 0, run.recipe)[:1]
        deadline = run.recipe.measure.deadline_s
        child.ask("speed", deadline, batches=batches, new_tokens=workload.new_tokens, warmup=1)


def _try_twice(run: Run, variant: str, stage: str, attempt: Callable[[], None]) -> bool:
    """A worker that was killed gets one more try in a clean process; then it is a failure on record."""
    for last in (False, True):
        try:
            attempt()
            return True
        except WorkerFailed as error:
            if last or not error.reason.startswith(RETRIED):
                run.fail(variant, stage, error)
                return False
            run.listener.warn(f"{variant}: {error}; trying once more")
    return False


@contextlib.contextmanager
def _opened(run: Run, variant: Variant, why: str, threads: int) -> Iterator[tuple[Child, dict[str, Json]]]:
    """A fresh worker with the variant's model loaded."""
    with _started(run, variant, why, threads) as child:
        yield child, _open(run, variant, child)


@contextlib.contextmanager
def _started(run: Run, variant: Variant, why: str, threads: int) -> Iterator[Child]:
    """A fresh worker that has imported what the variant's engine needs."""
    cache = run.store.cache(run.plan.models[variant.name])
    log = run.folder / "logs" / f"{why}-{variant.name}.log"
    with Child(log, threads, cache, environments.interpreter(plugins.catalogue()[variant.engine.plugin])) as child:
        child.ask("prepare", run.recipe.measure.deadline_s, plugin=variant.engine.plugin)
        yield child
        with contextlib.suppress(WorkerFailed):  # a worker that is gone has been recorded as what it died of
            if facts := child.ask("facts", 30):
                run.log("engine", variant.name, {"why": why, **facts})


def _open(run: Run, variant: Variant, child: Child) -> dict[str, Json]:
    """Load the variant's model into a worker; returns the facts of the launch."""
    return child.ask(
        "open",
        run.recipe.measure.deadline_s,
        plugin=variant.engine.plugin,
        params=dict(variant.engine.params),
        model=asdict(run.model(variant)),
        policies=[{"plugin": p.plugin, "params": dict(p.params)} for p in variant.policies],
    )


# ---- the race ------------------------------------------------------------------------------------


def race(run: Run, workload: Workload) -> None:
    """Blocks in random order until every variant is decided, its references and the A/A arm alongside."""
    recipe, rows = run.recipe, corpus.read(workload.prompts, workload.slice)
    started, first = time.perf_counter(), _next_block(run, workload)
    with run.listener.progress(f"race {workload.name}", run.evidence.budget) as show:
        while wants := need.blocks(run.evidence, workload.name):
            show(_next_block(run, workload), f"{len(wants)} variants")
            with _Field(run, workload) as field_:
                for _ in range(recipe.measure.relaunch):
                    if not (wants := need.blocks(run.evidence, workload.name)):
                        break
                    field_.block(_next_block(run, workload), wants, rows)
                    show(_next_block(run, workload), f"{len(wants)} variants")
    blocks = _next_block(run, workload) - first
    run.listener.done("race", f"{workload.name}, {blocks} blocks", time.perf_counter() - started)


def _next_block(run: Run, workload: Workload) -> int:
    turns = run.evidence.turns.get((run.recipe.baseline, workload.name), {})
    return max(turns, default=-1) + 1


class _Field:
    """The workers of some consecutive blocks: each variant launched fresh once, then resident."""

    def __init__(self, run: Run, workload: Workload) -> None:
        self.run, self.workload = run, workload
        self.stack = contextlib.ExitStack()
        # kept for as long as its workers: the kernel ends a worker with the thread that started it
        self.pool = self.stack.enter_context(ThreadPoolExecutor(len(run.recipe.variants) + 1))
        self.started: dict[str, Child] = {}
        self.children: dict[str, Child] = {}

    def __enter__(self) -> _Field:
        return self

    def __exit__(self, *error: object) -> None:
        for arm, child in self.children.items():
            with contextlib.suppress(WorkerFailed):
                self.run.log("memory", arm, child.ask("memory", 30), self.workload.name)
        self.stack.close()

    def block(self, number: int, wants: frozenset[str], rows: Sequence[Row]) -> None:
        """One block: each arm once, in an order drawn from the seed and the block's number."""
        recipe = self.run.recipe
        arms = sorted(wants)
        if self.workload.name == recipe.minimize.workload or any(v.policies for v in recipe.variants.values()):
            arms.append(recipe.baseline + TWIN)
        random.Random(f"{recipe.seed}/{self.workload.name}/{number}").shuffle(arms)
        batches = _batches(rows, self.workload, number, recipe)
        self._start([arm for arm in arms if arm not in self.children])
        for order, arm in enumerate(arms):
            if self._variant(arm).name not in self.run.evidence.failures:
                self._turn(arm, number, order, batches)

    def _turn(self, arm: str, number: int, order: int, batches: list[list[Json]]) -> None:
        measure = self.run.recipe.measure

        def attempt() -> None:
            child = self._child(arm)
            pids = {pid for c in self.children.values() for pid in c.processes()}
            before, cpu = machine.moment(), child.cpu_s()
            try:
                answer = child.ask(
                    "speed",
                    measure.deadline_s,
                    batches=batches,
                    new_tokens=self.workload.new_tokens,
                    warmup=measure.warmup,
                    stop=self.workload.lengths == "natural",
                )
            except WorkerFailed:
                self.children.pop(arm, None)
                raise
            after, cpu = machine.moment(), child.cpu_s() - cpu
            disturbance = machine.disturbance(before, after, cpu, pids)
            values = {"block": number, "order": order, "machine": disturbance, **answer}
            self.run.log("speed", arm, values, self.workload.name)

        _try_twice(self.run, arm.removesuffix(TWIN), f"speed ({self.workload.name})", attempt)

    def _start(self, arms: Sequence[str]) -> None:
        """Start these workers side by side: they import for longer than they load. One that cannot start is tried
        again, and put on record, at its turn."""

        def start(arm: str) -> None:
            with contextlib.suppress(WorkerFailed):
                self.started[arm] = self._worker(arm)

        list(self.pool.map(start, arms))

    def _worker(self, arm: str) -> Child:
        threads = self.run.recipe.measure.threads or machine.cores()
        started = _started(self.run, self._variant(arm), f"speed-{self.workload.name}", threads)
        return self.stack.enter_context(started)

    def _child(self, arm: str) -> Child:
        """The arm's worker; its model is loaded when it first runs."""
        if arm not in self.children:
            child = self.started.pop(arm, None) or self._worker(arm)
            self.run.log("launch", arm, _open(self.run, self._variant(arm), child), self.workload.name)
            self.children[arm] = child
        return self.children[arm]

    def _variant(self, arm: str) -> Variant:
        return self.run.recipe.variants[arm.removesuffix(TWIN)]


def _batches(rows: Sequence[Row], workload: Workload, block: int, recipe: Recipe) -> list[list[Json]]:
    """The block's requests: the same prompts for every variant, others in the next block."""
    count = recipe.measure.warmup + recipe.measure.requests
    deck = list(rows)
    random.Random(f"{recipe.seed}/{workload.name}/prompts").shuffle(deck)
    start = block * count * workload.batch
    picks = [deck[(start + i) % len(deck)] for i in range(count * workload.batch)]
    return [[r.as_json() for r in picks[i : i + workload.batch]] for i in range(0, len(picks), workload.batch)]
