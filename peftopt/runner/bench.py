"""Time models in turns on this machine, outside a recipe: the work of `peftopt bench`."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from peftopt import corpus, environments, machine, plugins, scratch, stats
from peftopt.decision.evidence import exp
from peftopt.errors import WorkerFailed, as_input
from peftopt.jobs import AliveJob, MemoryJob, OpenJob, PrepareJob, SpeedJob
from peftopt.measurements import Launch, Memory, Request
from peftopt.models import template
from peftopt.models.hf import tokenizer_home
from peftopt.records import SAFETENSORS, Interval, Model
from peftopt.runner import build, preflight
from peftopt.runner.process import WorkerProcess
from peftopt.runner.single import DEADLINE_S, absolute, compile_cache


@dataclass(frozen=True)
class Arm:
    """A model to time, with its name in the table."""

    name: str
    model: Model
    engine: str


@dataclass(frozen=True, kw_only=True)
class Benched:
    """The measurements of one arm. The intervals are over its requests."""

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


def time_in_turns(
    arms: Sequence[Arm], prompts: str, new_tokens: int, batch: int, blocks: int, threads: int, seed: int = 0
) -> list[Benched]:
    """Time the arms in blocks of random order, ratios against the first arm."""
    rows = corpus.read(prompts)
    for arm in arms:
        _check_arm(arm)
        template.check(Path(tokenizer_home(arm.model)), rows)
    generator = random.Random(seed)
    picks = [tuple(tuple(generator.choices(rows, k=batch)) for _ in range(3)) for _ in range(blocks)]
    jobs = [SpeedJob(batches=batches, new_tokens=new_tokens, warmup=1) for batches in picks]
    folder = scratch.folder()
    turns: dict[str, list[tuple[Request, ...]]] = {arm.name: [] for arm in arms}
    try:
        with ExitStack() as stack:
            opened = {arm.name: _opened(arm, stack, folder / f"{arm.name}.log", threads) for arm in arms}
            for job in jobs:
                for name in random.SystemRandom().sample(sorted(opened), len(opened)):
                    timed = opened[name].child.ask(job, DEADLINE_S)
                    turns[name].append(tuple(r for r in timed.requests if not r.warmup))
            peaks = {name: arm_.child.ask(MemoryJob(), 30) for name, arm_ in opened.items()}
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
    """The arm's worker. It ends when the stack is closed."""
    cache = compile_cache(arm.model) if arm.engine == "compiled" else None
    python = environments.interpreter(plugins.catalogue()[arm.engine])
    child = stack.enter_context(WorkerProcess(log, threads or machine.cores(), cache, python))
    model = absolute(arm.model)
    problem = ""
    child.ask(PrepareJob(plugin=arm.engine, model=model), DEADLINE_S)
    launch = child.ask(OpenJob(plugin=arm.engine, params={}, model=model), DEADLINE_S)
    if arm.engine == "eager" and preflight.quantized_elsewhere(Path(arm.model.path)):
        problem = child.ask(AliveJob(build.PROMPTS), DEADLINE_S).problem
    return Opened(child, launch, problem)


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
        logs = [math.log(middle_ms(a) / middle_ms(b)) for a, b in zip(turns, reference, strict=True)]
        ratio = exp(stats.hodges_lehmann(logs, 0.95))
    return Benched(
        name=name,
        launch=opened.launch,
        memory=memory,
        turns=tuple(map(tuple, turns)),
        problem=opened.problem,
        p50_ms=stats.quantile([duration_ms(r) for r in requests], 0.5),
        p95_ms=stats.quantile([duration_ms(r) for r in requests], 0.95),
        ttft_ms=stats.quantile([r.ttft_ms for r in requests if r.ttft_ms is not None], 0.5),
        tpot_ms=stats.quantile([r.tpot_ms for r in requests if r.tpot_ms], 0.5),
        cpu_ms=stats.quantile([r.cpu_ms for r in requests if r.cpu_ms is not None], 0.5),
        throughput=stats.quantile([1e3 * r.new_tokens / duration_ms(r) for r in requests], 0.5),
        ratio=ratio,
    )


def middle_ms(turn: Sequence[Request]) -> float:
    """The median duration of a turn's requests, in ms."""
    return stats.median([duration_ms(r) for r in turn])


def duration_ms(request: Request) -> float:
    """The duration of a whole request in ms; NaN for a request without an answer."""
    return math.nan if request.request_duration_ms is None else request.request_duration_ms
