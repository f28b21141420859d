"""What compiling a model costs and gains, outside a recipe: what `compile` does."""

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
        template.check(Path(tokenizer_home(model)), each.rows, below=Path(model.path))
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
    return _Told(start, answers)


def _switched(child: WorkerProcess, adapter: str, traffic: Sequence[Traffic]) -> Switch:
    """Put another adapter in the place of the one that is served, and ask for an answer in every shape."""
    switched = child.ask(SwitchJob(str(Path(adapter).resolve())), DEADLINE_S)
    again = sum(duration_ms(_speed(child, each, 1)[0]) for each in traffic) / 1e3
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
