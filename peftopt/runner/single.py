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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from peftopt import corpus, environments, machine, plugins, stats, store
from peftopt.corpus import Row
from peftopt.decision.evidence import exp
from peftopt.engines import _graphs
from peftopt.errors import BadInput, MissingEnvironment, Rejected, WorkerFailed, as_input
from peftopt.models import template
from peftopt.models.hf import tokenizer_home
from peftopt.records import GENERIC, SAFETENSORS, Interval, Json, Model, Step
from peftopt.runner import build, preflight
from peftopt.runner.build import Progress
from peftopt.runner.process import WorkerProcess

DEADLINE_S = 3600.0

ASKED = 8
"""Prompts on which a compiled model's answers are compared with the eager one's."""


def transform(
    plugin: str,
    params: Mapping[str, Json],
    model: Model,
    out: Path,
    texts: str | None,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Json]:
    """Write the transformed model to `out`, whole or not at all; returns what it took and what it found.

    `texts` is a file of rows to calibrate with ("generic" for ours), or for a merge to compare on. Raises Rejected for
    a model that was written and does not work, and when a certificate failed: the folder is then beside `out`, for
    inspection.
    """
    environments.interpreter(plugins.catalogue()[plugin])
    _check(plugin, model)
    given = corpus.read(str(corpus.calibration_file(texts))) if texts else []
    step = Step(plugin, "transform", plugins.catalogue()[plugin].technique, params)
    template.check(Path(tokenizer_home(model)), given, answers=True)
    preflight.check_step(step, Path(model.path), (), given)
    rows = [row.as_json() for row in given]
    temporary = _beside(out)
    log = Path(tempfile.mkdtemp(prefix="peftopt-")) / f"{plugin}.log"
    try:
        with build.bars(progress) as hear:
            facts = build.make_artifact(
                plugin,
                params,
                _absolute(model),
                temporary,
                rows,
                seed,
                log=log,
                threads=machine.cores(),
                deadline_s=DEADLINE_S,
                calibration=GENERIC if texts == GENERIC else "task",
                hear=hear,
                watch=lambda child: _watched(child, plugin, model, progress),
            )
        if facts["tier0"]:
            raise _broken(plugin, facts, temporary, out)
        temporary.rename(out)
    except WorkerFailed as error:
        raise as_input(error) from error
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)
    return {**facts, "path": str(out), "size_bytes": store.size(out)}


@contextlib.contextmanager
def _watched(child: WorkerProcess, plugin: str, model: Model, progress: Progress | None) -> Iterator[None]:
    """Show how much of a merge is written; what other transforms will write is not known beforehand."""
    if progress is None or plugin != "merge":
        yield
        return
    over, total = threading.Event(), max(1, store.size(Path(model.path)) // 10**6)

    def watch(show: Callable[[int, str], None]) -> None:
        while not over.wait(0.2):
            done = min(child.written() // 10**6, total)
            show(done, "MB" if done < total else "MB; certifying")

    with progress(plugin, total) as show:
        watcher = threading.Thread(target=watch, args=(show,))
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def preview(plugin: str, params: Mapping[str, Json], model: Model) -> list[dict[str, Json]]:
    """What a transform would change, tensor by tensor; nothing is written."""
    _check(plugin, model)
    log = Path(tempfile.mkdtemp(prefix="peftopt-")) / f"{plugin}.log"
    try:
        with WorkerProcess(log, machine.cores()) as child:
            found = child.ask("preview", DEADLINE_S, plugin=plugin, params=dict(params), model=asdict(_absolute(model)))
            return list(found["tensors"])
    except WorkerFailed as error:
        raise as_input(error) from error


def _check(plugin: str, model: Model) -> None:
    merges = plugin == "merge"  # which knows more of quantized bases, and says more of what cannot be merged
    preflight.check_base(Path(model.path), quantized=merges, ours=not merges)
    for adapter in model.adapters:
        preflight.check_adapter(Path(adapter), Path(model.path), [plugin] if merges else [])


def _broken(plugin: str, facts: dict[str, Json], made: Path, out: Path) -> Exception:
    """The error for a folder that did not pass; one with a certificate is kept aside."""
    if "certificate" not in facts:
        return BadInput(f"{plugin} gave a broken model: {facts['tier0'][0]}", "check the adapter and the base")
    aside = out.with_name(f"{out.name}.failed")
    shutil.rmtree(aside, ignore_errors=True)
    made.rename(aside)
    return Rejected(
        f"the {plugin} did not pass its certificate: {facts['tier0'][0].removeprefix('certificate: ')}",
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


def _check_arm(arm: Arm) -> None:
    """Raises BadInput for a model or an adapter that the arm's engine cannot open."""
    engine, base = plugins.catalogue()[arm.engine], Path(arm.model.path)
    ours = engine.environment == environments.MAIN
    preflight.check_base(base, quantized=True, weights=engine.format, ours=ours)
    plain = engine.format == SAFETENSORS and not preflight.quantized(base)
    for adapter in arm.model.adapters:
        preflight.check_adapter(Path(adapter), base if plain else None)


def bench(
    arms: Sequence[Arm], prompts: str, new_tokens: int, batch: int, blocks: int, threads: int, seed: int = 0
) -> list[dict[str, Json]]:
    """Time the arms in blocks of random order; one dict of metrics each, ratios against the first arm.

    Returns per arm: name, launch facts, memory, `requests` (raw), `problem` (of a checkpoint that another tool
    quantized: what is wrong with its answers, "" for nothing), and Intervals under "p50_ms", "p95_ms",
    "ttft_ms", "tpot_ms", "throughput", "ratio" (None for the first).
    """
    rows = corpus.read(prompts)
    for arm in arms:
        _check_arm(arm)
        template.check(Path(tokenizer_home(arm.model)), rows)
    try:
        return _bench(arms, rows, new_tokens, batch, blocks, threads, seed)
    except WorkerFailed as error:
        raise as_input(error) from error


def _bench(
    arms: Sequence[Arm], rows: Sequence[Row], new_tokens: int, batch: int, blocks: int, threads: int, seed: int
) -> list[dict[str, Json]]:
    known = plugins.catalogue()
    folder = Path(tempfile.mkdtemp(prefix="peftopt-"))
    found: dict[str, dict[str, Json]] = {arm.name: {"name": arm.name, "turns": []} for arm in arms}
    with ExitStack() as stack:
        children = {}
        for arm in arms:
            cache = compile_cache(arm.model) if arm.engine == "compiled" else None
            python = environments.interpreter(known[arm.engine])
            log = folder / f"{arm.name}.log"
            child = stack.enter_context(WorkerProcess(log, threads or machine.cores(), cache, python))
            model = asdict(_absolute(arm.model))
            child.ask("prepare", DEADLINE_S, plugin=arm.engine, model=model)
            found[arm.name] |= child.ask("open", DEADLINE_S, plugin=arm.engine, params={}, model=model)
            if arm.engine == "eager" and preflight.quantized_elsewhere(Path(arm.model.path)):
                found[arm.name] |= child.ask("alive", DEADLINE_S, rows=build.PROMPTS)
            children[arm.name] = child
        dice = random.Random(seed)
        for _ in range(blocks):
            picks = [[dice.choice(rows).as_json() for _ in range(batch)] for _ in range(3)]
            for name in random.SystemRandom().sample(sorted(children), len(children)):
                answer = children[name].ask("speed", DEADLINE_S, batches=picks, new_tokens=new_tokens, warmup=1)
                found[name]["turns"].append([r for r in answer["requests"] if not r["warmup"]])
        for name, child in children.items():
            found[name] |= child.ask("memory", 30)
    return [_metrics(values, found[arms[0].name]["turns"]) for values in found.values()]


def _absolute(model: Model) -> Model:
    """Workers run in a folder of their own."""
    return Model(str(Path(model.path).resolve()), tuple(str(Path(a).resolve()) for a in model.adapters))


def compile_cache(model: Model) -> Path:
    """Where `peftopt compile` leaves its cache: beside the model, so the model's own files stay as they are. Raises
    BadInput for one that is not ours."""
    folder = Path(model.path).resolve()
    return store.claim(folder.with_name(folder.name + ".compiled"))


def _metrics(values: dict[str, Json], reference: list[list[dict[str, Json]]]) -> dict[str, Json]:
    requests = [r for turn in values["turns"] for r in turn]
    found: dict[str, Interval | None] = {
        "p50_ms": stats.quantile([r["request_duration_ms"] for r in requests], 0.5),
        "p95_ms": stats.quantile([r["request_duration_ms"] for r in requests], 0.95),
        "ttft_ms": stats.quantile([r["ttft_ms"] for r in requests], 0.5),
        "tpot_ms": stats.quantile([r["tpot_ms"] for r in requests if r["tpot_ms"]], 0.5),
        "cpu_ms": stats.quantile([r["cpu_ms"] for r in requests], 0.5),
        "throughput": stats.quantile([1e3 * r["new_tokens"] / r["request_duration_ms"] for r in requests], 0.5),
        "ratio": None,
    }
    if values["turns"] is not reference:

        def middle(turn: list[dict[str, Json]]) -> float:
            return stats.median([r["request_duration_ms"] for r in turn])

        logs = [math.log(middle(a) / middle(b)) for a, b in zip(values["turns"], reference, strict=True)]
        found["ratio"] = exp(stats.hodges_lehmann(logs, 0.95))
    return {**values, **found}


@dataclass(frozen=True)
class Traffic:
    """What a compiled model will be asked: the shapes to warm. `rows` are prompts, `batch` of them in a request."""

    rows: Sequence[Row]
    batch: int
    new_tokens: int


def compile_model(
    model: Model,
    params: Mapping[str, Json],
    traffic: Sequence[Traffic],
    threads: int = 0,
    others: Sequence[str] = (),
) -> dict[str, Json]:
    """Compile once cold, start again warm, and compare with the eager engine; the cache stays beside the model, with
    what it holds for other shapes and adapters, unless a changed peftopt, library or processor has no use for it.

    Times in seconds, from the start of a process to its first answer in every shape: `cold`, `warm` and `eager` each
    hold `total`, `imports`, `load`, `graphs`, `answers`. Also what the engine says of itself (graphs, breaks,
    recompiles, log), `kl` in nats per token and `greedy_match` against eager, and for each of `traffic` the time per
    token and the requests after which compiling has paid. `switches`: to each of the `others` (adapters) in turn, with
    what it took and what was compiled again for it.
    """
    for each in traffic:
        template.check(Path(tokenizer_home(model)), each.rows)
    cache = compile_cache(model)
    _remove_orphans(cache)
    _graphs.drop_outdated(cache)
    fresh = Path(tempfile.mkdtemp(prefix=f".{cache.name}.{os.getpid()}.", dir=cache.parent))
    folder = Path(tempfile.mkdtemp(prefix="peftopt-"))
    reference = str(folder / "reference.npz")
    starts = {
        "eager": ("eager", {}, {"write_reference": reference}),
        "cold": ("compiled", params, {}),
        "warm": ("compiled", params, {"reference": reference}),
    }
    found = {}
    try:
        for name, start in starts.items():
            # A cold start is part of the answer, so it gets an empty cache, and its graphs join the others afterwards.
            where = fresh if name == "cold" else cache
            switched = others if name == "warm" else ()
            found[name] = _start(model, *start, traffic, folder / f"{name}.log", where, threads, switched)
            if name == "cold":
                store.absorb(fresh, cache)
    except WorkerFailed as error:
        raise as_input(error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    eager, cold, warm = found["eager"], found["cold"], found["warm"]
    ours, theirs = warm.pop("given"), eager.pop("given")
    cold.pop("given")
    pairs = [(ours[row], theirs[row]) for row in ours]
    return {
        **found,
        "switches": warm["switches"],
        "cache": str(cache),
        "cache_bytes": store.size(cache),
        "kl": sum(a["kl"] for a, _ in pairs) / sum(a["scored_tokens"] for a, _ in pairs),
        "greedy_match": sum(a["tokens"] == b["tokens"] for a, b in pairs) / len(pairs),
        "prompts": len(pairs),
        "traffic": [
            {
                "batch": each.batch,
                "new_tokens": each.new_tokens,
                "tpot_ms": warm["tpot_ms"][n],
                "eager_tpot_ms": eager["tpot_ms"][n],
                "break_even": _pays_after(
                    cold["facts"].get("compile_time", 0.0), eager["request_s"][n], warm["request_s"][n]
                ),
            }
            for n, each in enumerate(traffic)
        ],
    }


def _pays_after(spent: float, before: float, after: float) -> float | None:
    """Requests whose saved seconds make up for those spent; None where none are saved."""
    return spent / (before - after) if before > after else None


def _start(
    model: Model,
    engine: str,
    params: Mapping[str, Json],
    references: Mapping[str, Json],
    traffic: Sequence[Traffic],
    log: Path,
    cache: Path,
    threads: int,
    others: Sequence[str],
) -> dict[str, Json]:
    """One process from its start to an answer in every shape, and then what else is asked of it."""
    started = time.perf_counter()
    with WorkerProcess(log, threads or machine.cores(), cache) as child:
        child.ask("prepare", DEADLINE_S, plugin=engine, model=asdict(_absolute(model)))
        launch = child.ask("open", DEADLINE_S, plugin=engine, params=dict(params), model=asdict(_absolute(model)))
        for each in traffic:
            rows = [row.as_json() for row in each.rows]
            child.ask("warm", DEADLINE_S, rows=rows, batch=each.batch, new_tokens=each.new_tokens)
        first = [_speed(child, each, 1)[0] for each in traffic]
        total = time.perf_counter() - started
        facts = child.ask("facts", 30)
        timed = [_speed(child, each, 3) for each in traffic]
        answered: dict[str, Json] = {}
        least = min(traffic, key=lambda each: each.batch)
        child.ask(
            "quality",
            DEADLINE_S,
            lambda record: answered.update({record["row"]: record}),
            rows=[replace(row, expected="").as_json() for row in least.rows[:ASKED]],
            schema=None,
            new_tokens=least.new_tokens,
            batch=least.batch,
            **references,
        )
        switches = []
        for adapter in others:
            took = child.ask("switch", DEADLINE_S, adapter=str(Path(adapter).resolve()))
            again = sum(_speed(child, each, 1)[0]["request_duration_ms"] for each in traffic) / 1e3
            after = child.ask("facts", 30)
            switches.append({"adapter": adapter, **took, "first_answers_s": again, "recompiles": after["recompiles"]})
    graphs = facts.get("compile_time", 0.0) + facts.get("warm_start", 0.0)
    answers = sum(r["request_duration_ms"] for r in first) / 1e3
    parts = {"load": launch["model_loading_time"], "graphs": graphs, "answers": answers}
    return {
        "total": total,
        "imports": total - sum(parts.values()),
        **parts,
        "facts": facts,
        "tpot_ms": [stats.median([r["tpot_ms"] or math.nan for r in turn]) for turn in timed],
        "request_s": [stats.median([r["request_duration_ms"] for r in turn]) / 1e3 for turn in timed],
        "given": answered,
        "switches": switches,
    }


def _speed(child: WorkerProcess, each: Traffic, requests: int) -> list[dict[str, Json]]:
    """Timed requests: the longest prompts first, since they decide how long a cache has to be."""
    rows = sorted(each.rows, key=lambda row: -sum(len(m["content"]) for m in row.messages))
    picks = [rows[n % len(rows)] for n in range(each.batch * requests)]
    batches = [[row.as_json() for row in picks[n : n + each.batch]] for n in range(0, len(picks), each.batch)]
    answer = child.ask("speed", DEADLINE_S, batches=batches, new_tokens=each.new_tokens, warmup=0)
    return list(answer["requests"])
