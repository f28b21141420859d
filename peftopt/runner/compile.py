"""Compile a model outside a recipe, and measure its cost and its gain: the work of `peftopt compile`."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftopt import machine, scratch, stats, store
from peftopt.corpus import Row
from peftopt.engines import _graphs
from peftopt.errors import WorkerFailed, as_input
from peftopt.jobs import FactsJob, OpenJob, PrepareJob, QualityJob, SpeedJob, SwitchJob, WarmJob
from peftopt.measurements import Answer, EngineFacts, Request
from peftopt.models import template
from peftopt.models.hf import tokenizer_home
from peftopt.records import Json, Model
from peftopt.runner.bench import duration_ms, middle_ms
from peftopt.runner.process import WorkerProcess
from peftopt.runner.single import DEADLINE_S, absolute, compile_cache

ASKED = 8
"""Prompts on which a compiled model's answers are compared with the eager one's."""


@dataclass(frozen=True)
class Traffic:
    """Requests of one shape, to compile for: `rows` are the prompts, `batch` of them in a request."""

    rows: Sequence[Row]
    batch: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Switch:
    """The cost of a change to another adapter."""

    adapter: str
    adapter_switch_time: float
    """Seconds."""
    first_answers_s: float
    """Seconds from then to an answer in every shape."""
    recompiles: int | None
    """Graphs that were compiled again until then."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One process from its start to its first answer in every shape, in seconds; then times for each shape."""

    total: float
    imports: float
    load: float
    graphs: float
    """Seconds to compile graphs, or to load them from the cache."""
    answers: float
    facts: EngineFacts
    tpot_ms: tuple[float, ...]
    """Mean gap between tokens after the first."""
    request_s: tuple[float, ...]
    """A whole request, in seconds."""
    switches: tuple[Switch, ...]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The gain of compiling for one shape of requests."""

    batch: int
    new_tokens: int
    tpot_ms: float
    eager_tpot_ms: float
    break_even: float | None
    """Requests after which compiling has paid; None where it never does."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The cost and the gain of compiling a model."""

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
    """The share of answers that equal the eager engine's."""
    prompts: int
    """The number of compared prompts."""
    traffic: tuple[Shape, ...]


def compile_model(
    model: Model,
    params: Mapping[str, Json],
    traffic: Sequence[Traffic],
    threads: int = 0,
    others: Sequence[str] = (),
) -> Compiled:
    """Compile once cold, start again warm, and compare with the eager engine. Then switch to each of the `others`
    (adapters) in turn. The cache stays beside the model. Its graphs for other shapes and adapters stay too, unless they
    are of another version of peftopt or a library, or of another processor.
    """
    for each in traffic:
        template.check(Path(tokenizer_home(model)), each.rows)
    cache = compile_cache(model)
    store.remove_orphans(cache)
    _graphs.drop_outdated(cache)
    fresh = Path(tempfile.mkdtemp(prefix=f".{cache.name}.{os.getpid()}.", dir=cache.parent))
    folder = scratch.folder()
    least = min(traffic, key=lambda each: each.batch)
    asked = QualityJob(
        rows=tuple(replace(row, expected="") for row in least.rows[:ASKED]),
        new_tokens=least.new_tokens,
        batch=least.batch,
    )
    reference = str(folder / "reference.npz")
    opened = OpenJob(plugin="compiled", params=params, model=absolute(model))
    eager = replace(opened, plugin="eager", params={})

    def start(name: str, job: OpenJob, asked: QualityJob, cache: Path, others: Sequence[str] = ()) -> _Answered:
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
        Path(reference).unlink(missing_ok=True)  # the logs beside it stay
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
    """Requests until the saved seconds exceed the spent ones; None where no seconds are saved."""
    return spent / (before - after) if before > after else None


@dataclass(frozen=True)
class _Answered:
    """A start, and the answers after it, by row."""

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
) -> _Answered:
    """Run one process from its start to an answer in every shape, then time requests, ask for answers and switch."""
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
    answered = sum(map(duration_ms, first)) / 1e3
    start = Start(
        total=total,
        imports=total - launch.model_loading_time - graphs - answered,
        load=launch.model_loading_time,
        graphs=graphs,
        answers=answered,
        facts=facts,
        tpot_ms=tuple(stats.median([r.tpot_ms or math.nan for r in turn]) for turn in timed),
        request_s=tuple(middle_ms(turn) / 1e3 for turn in timed),
        switches=switches,
    )
    return _Answered(start, answers)


def _switched(child: WorkerProcess, adapter: str, traffic: Sequence[Traffic]) -> Switch:
    """Replace the served adapter by another, and ask for an answer in every shape."""
    switched = child.ask(SwitchJob(str(Path(adapter).resolve())), DEADLINE_S)
    again = sum(duration_ms(_speed(child, each, 1)[0]) for each in traffic) / 1e3
    return Switch(
        adapter=adapter,
        adapter_switch_time=switched.adapter_switch_time,
        first_answers_s=again,
        recompiles=child.ask(FactsJob(), 30).recompiles,
    )


def _speed(child: WorkerProcess, each: Traffic, requests: int) -> tuple[Request, ...]:
    """Time requests, the longest prompts first, since they determine the length of the cache."""
    rows = sorted(each.rows, key=lambda row: -sum(len(m["content"]) for m in row.messages))
    picks = [rows[n % len(rows)] for n in range(each.batch * requests)]
    batches = tuple(tuple(picks[n : n + each.batch]) for n in range(0, len(picks), each.batch))
    return child.ask(SpeedJob(batches=batches, new_tokens=each.new_tokens, warmup=0), DEADLINE_S).requests
