"""One technique on one model, outside a recipe: what `merge`, `quantize`, `compile` and `bench` do."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from peftopt import corpus, environments, machine, plugins, stats, store
from peftopt.corpus import Row
from peftopt.decision.evidence import exp
from peftopt.engines import _graphs
from peftopt.errors import BadInput, MissingEnvironment, Rejected, WorkerFailed, as_input
from peftopt.jobs import (
    AliveJob,
    Change,
    FactsJob,
    MemoryJob,
    OpenJob,
    PrepareJob,
    PreviewJob,
    QualityJob,
    SpeedJob,
    SwitchJob,
    Transformed,
    TransformJob,
    WarmJob,
)
from peftopt.measurements import Answer, EngineFacts, Launch, Memory, Request
from peftopt.models import template
from peftopt.models.hf import tokenizer_home
from peftopt.records import SAFETENSORS, Interval, Json, Model, Step
from peftopt.runner import build, preflight
from peftopt.runner.build import Progress
from peftopt.runner.process import WorkerProcess

DEADLINE_S = 3600.0

ASKED = 8
"""Prompts on which a compiled model's answers are compared with the eager one's."""


def transform(job: TransformJob, progress: Progress | None = None) -> Transformed:
    """Write the transformed model to `job.out`, whole or not at all.

    Raises Rejected for a model that was written and does not work, and when a certificate failed: the folder is then
    beside it, for inspection.
    """
    plugin = plugins.catalogue()[job.plugin]
    out = Path(job.out)
    environments.interpreter(plugin)
    _check(job.plugin, job.model)
    step = Step(job.plugin, "transform", plugin.technique, job.params)
    template.check(Path(tokenizer_home(job.model)), job.rows, answers=True)
    preflight.check_step(step, Path(job.model.path), (), job.rows)
    temporary = _beside(out)
    log = Path(tempfile.mkdtemp(prefix="peftopt-")) / f"{job.plugin}.log"
    aside = replace(job, model=_absolute(job.model), out=str(temporary))
    try:
        with build.bars(progress) as hear:
            made = build.make_artifact(
                aside, log, machine.cores(), DEADLINE_S, hear, lambda child: _watched(child, job, progress)
            )
        if made.tier0:
            raise _broken(job.plugin, made, temporary, out)
        temporary.rename(out)
    except WorkerFailed as error:
        raise as_input(error) from error
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)
    return replace(made, model=replace(made.model, path=str(out)))


@contextlib.contextmanager
def _watched(child: WorkerProcess, job: TransformJob, progress: Progress | None) -> Iterator[None]:
    """Show how much of a merge is written; what other transforms will write is not known beforehand."""
    if progress is None or job.plugin != "merge":
        yield
        return
    over = threading.Event()
    total = max(1, store.size(Path(job.model.path)) // 10**6)

    def watch(show: Callable[[int, str], None]) -> None:
        while not over.wait(0.2):
            done = min(child.written() // 10**6, total)
            show(done, "MB" if done < total else "MB; certifying")

    with progress(job.plugin, total) as show:
        watcher = threading.Thread(target=watch, args=(show,))
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def preview(job: PreviewJob) -> tuple[Change, ...]:
    """What a transform would change, tensor by tensor; nothing is written."""
    _check(job.plugin, job.model)
    log = Path(tempfile.mkdtemp(prefix="peftopt-")) / f"{job.plugin}.log"
    try:
        with WorkerProcess(log, machine.cores()) as child:
            return child.ask(replace(job, model=_absolute(job.model)), DEADLINE_S).tensors
    except WorkerFailed as error:
        raise as_input(error) from error


def _check(plugin: str, model: Model) -> None:
    merges = plugin == "merge"  # which knows more of quantized bases, and says more of what cannot be merged
    preflight.check_base(Path(model.path), quantized=merges, ours=not merges)
    for adapter in model.adapters:
        preflight.check_adapter(Path(adapter), Path(model.path), [plugin] if merges else [])


def _broken(plugin: str, transformed: Transformed, made: Path, out: Path) -> Exception:
    """The error for a folder that did not pass; one with a certificate is kept aside."""
    if transformed.certificate is None:
        return BadInput(f"{plugin} gave a broken model: {transformed.tier0[0]}", "check the adapter and the base")
    aside = out.with_name(f"{out.name}.failed")
    shutil.rmtree(aside, ignore_errors=True)
    made.rename(aside)
    return Rejected(
        f"the {plugin} did not pass its certificate: {transformed.tier0[0].removeprefix('certificate: ')}",
        f"nothing was written to {out}; the result is in {aside}, its parity.json says what was measured",
    )


def _beside(out: Path) -> Path:
    """A temporary folder on the same disk. Raises for an `out` that exists or cannot be written."""
    if out.exists():
        raise BadInput(f"{out} exists already", "choose another --out or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(out)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", dir=out.resolve().parent)) / "model"
    except OSError as error:
        raise MissingEnvironment(f"cannot write {out}: {error.strerror}", "choose another --out") from error


def _remove_orphans(out: Path) -> None:
    """What a killed process left half written under this name."""
    import psutil

    for folder in out.resolve().parent.glob(f".{glob.escape(out.name)}.*.*"):
        owner = folder.name.removeprefix(f".{out.name}.").partition(".")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Arm:
    """One model to time, under the name its line carries."""

    name: str
    model: Model
    engine: str


@dataclass(frozen=True, kw_only=True)
class Benched:
    """What was measured of one arm; intervals are of its requests."""

    name: str
    launch: Launch
    memory: Memory
    turns: tuple[tuple[Request, ...], ...]
    """The timed requests of each block."""
    problem: str
    """What is wrong with the answers of a checkpoint that another tool quantized, "" for nothing."""
    p50_ms: Interval
    """The whole request, median."""
    p95_ms: Interval
    ttft_ms: Interval
    """Time to the first token, median."""
    tpot_ms: Interval
    """Mean gap between tokens after the first, median request."""
    cpu_ms: Interval
    throughput: Interval
    """Output tokens per second, median request."""
    ratio: Interval | None
    """The whole request over the first arm's, paired by block; None for the first."""


def _check_arm(arm: Arm) -> None:
    """Raises BadInput for a model or an adapter that the arm's engine cannot open."""
    engine = plugins.catalogue()[arm.engine]
    base = Path(arm.model.path)
    ours = engine.environment == environments.MAIN
    preflight.check_base(base, quantized=True, weights=engine.format, ours=ours)
    plain = engine.format == SAFETENSORS and not preflight.quantized(base)
    for adapter in arm.model.adapters:
        preflight.check_adapter(Path(adapter), base if plain else None)


def bench(
    arms: Sequence[Arm], prompts: str, new_tokens: int, batch: int, blocks: int, threads: int, seed: int = 0
) -> list[Benched]:
    """Time the arms in blocks of random order, ratios against the first arm."""
    rows = corpus.read(prompts)
    for arm in arms:
        _check_arm(arm)
        template.check(Path(tokenizer_home(arm.model)), rows)
    dice = random.Random(seed)
    picks = [tuple(tuple(dice.choices(rows, k=batch)) for _ in range(3)) for _ in range(blocks)]
    jobs = [SpeedJob(batches=batches, new_tokens=new_tokens, warmup=1) for batches in picks]
    folder = Path(tempfile.mkdtemp(prefix="peftopt-"))
    turns: dict[str, list[tuple[Request, ...]]] = {arm.name: [] for arm in arms}
    try:
        with ExitStack() as stack:
            opened = {arm.name: _opened(arm, stack, folder / f"{arm.name}.log", threads) for arm in arms}
            for job in jobs:
                for name in random.SystemRandom().sample(sorted(opened), len(opened)):
                    timed = opened[name].child.ask(job, DEADLINE_S)
                    turns[name].append(tuple(r for r in timed.requests if not r.warmup))
            peaks = {name: each.child.ask(MemoryJob(), 30) for name, each in opened.items()}
    except WorkerFailed as error:
        raise as_input(error) from error
    first = turns[arms[0].name]
    return [
        _benched(arm.name, opened[arm.name], peaks[arm.name], turns[arm.name], None if arm == arms[0] else first)
        for arm in arms
    ]


@dataclass(frozen=True)
class Opened:
    """A worker with its model loaded; `problem` as in Benched."""

    child: WorkerProcess
    launch: Launch
    problem: str


def _opened(arm: Arm, stack: ExitStack, log: Path, threads: int) -> Opened:
    """The arm's worker, which is gone when the stack is closed."""
    cache = compile_cache(arm.model) if arm.engine == "compiled" else None
    python = environments.interpreter(plugins.catalogue()[arm.engine])
    child = stack.enter_context(WorkerProcess(log, threads or machine.cores(), cache, python))
    model = _absolute(arm.model)
    problem = ""
    child.ask(PrepareJob(plugin=arm.engine, model=model), DEADLINE_S)
    launch = child.ask(OpenJob(plugin=arm.engine, params={}, model=model), DEADLINE_S)
    if arm.engine == "eager" and preflight.quantized_elsewhere(Path(arm.model.path)):
        problem = child.ask(AliveJob(build.PROMPTS), DEADLINE_S).problem
    return Opened(child, launch, problem)


def _absolute(model: Model) -> Model:
    """Workers run in a folder of their own."""
    return Model(str(Path(model.path).resolve()), tuple(str(Path(a).resolve()) for a in model.adapters))


def compile_cache(model: Model) -> Path:
    """Where `peftopt compile` leaves its cache: beside the model, so the model's own files stay as they are. Raises
    BadInput for one that is not ours."""
    folder = Path(model.path).resolve()
    return store.claim(folder.with_name(folder.name + ".compiled"))


def _benched(
    name: str,
    opened: Opened,
    memory: Memory,
    turns: Sequence[Sequence[Request]],
    reference: Sequence[Sequence[Request]] | None,
) -> Benched:
    requests = [r for turn in turns for r in turn]
    ratio = None
    if reference is not None:
        logs = [math.log(_middle(a) / _middle(b)) for a, b in zip(turns, reference, strict=True)]
        ratio = exp(stats.hodges_lehmann(logs, 0.95))
    return Benched(
        name=name,
        launch=opened.launch,
        memory=memory,
        turns=tuple(map(tuple, turns)),
        problem=opened.problem,
        p50_ms=stats.quantile([_duration(r) for r in requests], 0.5),
        p95_ms=stats.quantile([_duration(r) for r in requests], 0.95),
        ttft_ms=stats.quantile([r.ttft_ms for r in requests if r.ttft_ms is not None], 0.5),
        tpot_ms=stats.quantile([r.tpot_ms for r in requests if r.tpot_ms], 0.5),
        cpu_ms=stats.quantile([r.cpu_ms for r in requests if r.cpu_ms is not None], 0.5),
        throughput=stats.quantile([1e3 * r.new_tokens / _duration(r) for r in requests], 0.5),
        ratio=ratio,
    )


def _middle(turn: Sequence[Request]) -> float:
    return stats.median([_duration(r) for r in turn])


def _duration(request: Request) -> float:
    """The whole request in ms, which every answered request has."""
    return math.nan if request.request_duration_ms is None else request.request_duration_ms


@dataclass(frozen=True)
class Traffic:
    """What a compiled model will be asked: the shapes to warm. `rows` are prompts, `batch` of them in a request."""

    rows: Sequence[Row]
    batch: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What changing to another adapter took."""

    adapter: str
    adapter_switch_time: float
    """Seconds."""
    first_answers_s: float
    """Then to an answer in every shape."""
    recompiles: int | None
    """Graphs that were compiled again so far."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One process from its start to its first answer in every shape, in seconds; then times for each of the traffic."""

    total: float
    imports: float
    load: float
    graphs: float
    """Compiling, or loading what was compiled."""
    answers: float
    facts: EngineFacts
    tpot_ms: tuple[float, ...]
    """Mean gap between tokens after the first."""
    request_s: tuple[float, ...]
    """A whole request, in seconds."""
    switches: tuple[Switch, ...]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What compiling gains for one shape of requests."""

    batch: int
    new_tokens: int
    tpot_ms: float
    eager_tpot_ms: float
    break_even: float | None
    """Requests after which compiling has paid; None where it never does."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What compiling a model cost and gains."""

    eager: Start
    cold: Start
    """With an empty cache."""
    warm: Start
    """With the cache that the cold start filled."""
    switches: tuple[Switch, ...]
    cache: str
    """The folder of the compile cache."""
    cache_bytes: int
    kl: float
    """KL divergence from the eager engine, in nats per token."""
    greedy_match: float
    """The share of answers that are the eager engine's."""
    prompts: int
    """How many were compared."""
    traffic: tuple[Shape, ...]


def compile_model(
    model: Model,
    params: Mapping[str, Json],
    traffic: Sequence[Traffic],
    threads: int = 0,
    others: Sequence[str] = (),
) -> Compiled:
    """Compile once cold, start again warm, and compare with the eager engine; the cache stays beside the model, with
    what it holds for other shapes and adapters, unless a changed peftopt, library or processor has no use for it. Then
    switch to each of the `others` (adapters) in turn.
    """
    for each in traffic:
        template.check(Path(tokenizer_home(model)), each.rows)
    cache = compile_cache(model)
    _remove_orphans(cache)
    _graphs.drop_outdated(cache)
    fresh = Path(tempfile.mkdtemp(prefix=f".{cache.name}.{os.getpid()}.", dir=cache.parent))
    folder = Path(tempfile.mkdtemp(prefix="peftopt-"))
    least = min(traffic, key=lambda each: each.batch)
    asked = QualityJob(
        rows=tuple(replace(row, expected="") for row in least.rows[:ASKED]),
        new_tokens=least.new_tokens,
        batch=least.batch,
    )
    reference = str(folder / "reference.npz")
    opened = OpenJob(plugin="compiled", params=params, model=_absolute(model))
    eager = replace(opened, plugin="eager", params={})

    def start(name: str, job: OpenJob, asked: QualityJob, cache: Path, others: Sequence[str] = ()) -> _Told:
        return _start(job, asked, traffic, folder / f"{name}.log", cache, threads, others)

    try:
        before = start("eager", eager, replace(asked, write_reference=reference), cache)
        # A cold start is part of the answer, so it gets an empty cache, and its graphs join the others afterwards.
        cold = start("cold", opened, asked, fresh)
        store.absorb(fresh, cache)
        warm = start("warm", opened, replace(asked, reference=reference), cache, others)
    except WorkerFailed as error:
        raise as_input(error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    pairs = [(answer, before.answers[row]) for row, answer in warm.answers.items()]
    spent = cold.start.facts.compile_time or 0.0
    return Compiled(
        eager=before.start,
        cold=cold.start,
        warm=warm.start,
        switches=warm.start.switches,
        cache=str(cache),
        cache_bytes=store.size(cache),
        kl=sum(a.kl or 0.0 for a, _ in pairs) / sum(a.scored_tokens for a, _ in pairs),
        greedy_match=sum(a.tokens == b.tokens for a, b in pairs) / len(pairs),
        prompts=len(pairs),
        traffic=tuple(
            Shape(
                batch=each.batch,
                new_tokens=each.new_tokens,
                tpot_ms=warm.start.tpot_ms[n],
                eager_tpot_ms=before.start.tpot_ms[n],
                break_even=_pays_after(spent, before.start.request_s[n], warm.start.request_s[n]),
            )
            for n, each in enumerate(traffic)
        ),
    )


def _pays_after(spent: float, before: float, after: float) -> float | None:
    """Requests whose saved seconds make up for those spent; None where none are saved."""
    return spent / (before - after) if before > after else None


@dataclass(frozen=True)
class _Told:
    """A start, and the answers that were given after it, by row."""

    start: Start
    answers: Mapping[str, Answer]


def _start(
    job: OpenJob,
    asked: QualityJob,
    traffic: Sequence[Traffic],
    log: Path,
    cache: Path,
    threads: int,
    others: Sequence[str],
) -> _Told:
    """One process from its start to an answer in every shape, and then what else is asked of it."""
    started = time.perf_counter()
    with WorkerProcess(log, threads or machine.cores(), cache) as child:
        child.ask(PrepareJob(plugin=job.plugin, model=job.model), DEADLINE_S)
        launch = child.ask(job, DEADLINE_S)
        for each in traffic:
            child.ask(WarmJob(rows=tuple(each.rows), batch=each.batch, new_tokens=each.new_tokens), DEADLINE_S)
        first = [_speed(child, each, 1)[0] for each in traffic]
        total = time.perf_counter() - started
        facts = child.ask(FactsJob(), 30)
        timed = [_speed(child, each, 3) for each in traffic]
        answers: dict[str, Answer] = {}
        child.ask(asked, DEADLINE_S, lambda answer: answers.update({answer.row: answer}))
        switches = tuple(_switched(child, adapter, traffic) for adapter in others)
    graphs = (facts.compile_time or 0.0) + (facts.warm_start or 0.0)
    answered = sum(map(_duration, first)) / 1e3
    start = Start(
        total=total,
        imports=total - launch.model_loading_time - graphs - answered,
        load=launch.model_loading_time,
        graphs=graphs,
        answers=answered,
        facts=facts,
        tpot_ms=tuple(stats.median([r.tpot_ms or math.nan for r in turn]) for turn in timed),
        request_s=tuple(_middle(turn) / 1e3 for turn in timed),
        switches=switches,
    )
    return _Told(start, answers)


def _switched(child: WorkerProcess, adapter: str, traffic: Sequence[Traffic]) -> Switch:
    """Put another adapter in the place of the one that is served, and ask for an answer in every shape."""
    switched = child.ask(SwitchJob(str(Path(adapter).resolve())), DEADLINE_S)
    again = sum(_duration(_speed(child, each, 1)[0]) for each in traffic) / 1e3
    return Switch(
        adapter=adapter,
        adapter_switch_time=switched.adapter_switch_time,
        first_answers_s=again,
        recompiles=child.ask(FactsJob(), 30).recompiles,
    )


def _speed(child: WorkerProcess, each: Traffic, requests: int) -> tuple[Request, ...]:
    """Timed requests: the longest prompts first, since they decide how long a cache has to be."""
    rows = sorted(each.rows, key=lambda row: -sum(len(m["content"]) for m in row.messages))
    picks = [rows[n % len(rows)] for n in range(each.batch * requests)]
    batches = tuple(tuple(picks[n : n + each.batch]) for n in range(0, len(picks), each.batch))
    return child.ask(SpeedJob(batches=batches, new_tokens=each.new_tokens, warmup=0), DEADLINE_S).requests
