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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from peftopt import building, corpus, environments, machine, plugins, preflight, stats, store
from peftopt.building import Progress
from peftopt.child import Child
from peftopt.errors import BadInput, MissingEnvironment, Rejected, WorkerFailed
from peftopt.evidence import exp
from peftopt.records import GENERIC, Interval, Json, Model

DEADLINE_S = 3600.0


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
    rows = [row.as_json() for row in corpus.read(str(corpus.calibration_file(texts)))] if texts else []
    temporary = _beside(out)
    log = Path(tempfile.mkdtemp(prefix="peftopt-")) / f"{plugin}.log"
    try:
        with building.bars(progress) as hear:
            facts = building.transform(
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
def _watched(child: Child, plugin: str, model: Model, progress: Progress | None) -> Iterator[None]:
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
        with Child(log, machine.cores()) as child:
            found = child.ask("preview", DEADLINE_S, plugin=plugin, params=dict(params), model=asdict(_absolute(model)))
            return list(found["tensors"])
    except WorkerFailed as error:
        raise as_input(error) from error


def _check(plugin: str, model: Model) -> None:
    merges = plugin == "merge"  # which knows more of quantized bases, and says more of what cannot be merged
    preflight.check_base(Path(model.path), quantized=merges)
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


def as_input(error: WorkerFailed) -> Exception:
    """A worker that refused its input met a mistake of the user's, not a fault of the machine."""
    kinds = {"refused": BadInput, "missing environment": MissingEnvironment, "unusable": Rejected}
    return kinds[error.reason](error.detail, error.hint) if error.reason in kinds else error


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


def bench(
    arms: Sequence[Arm], prompts: str, new_tokens: int, batch: int, blocks: int, threads: int, seed: int = 0
) -> list[dict[str, Json]]:
    """Time the arms in blocks of random order; one dict of figures each, ratios against the first arm.

    Returns per arm: name, launch facts, memory, `requests` (raw), `problem` (of a checkpoint that another tool
    quantized: what is wrong with its answers, "" for nothing), and Intervals under "p50_ms", "p95_ms",
    "ttft_ms", "tpot_ms", "throughput", "ratio" (None for the first).
    """
    rows = corpus.read(prompts)
    known = plugins.catalogue()
    for arm in arms:
        preflight.check_base(Path(arm.model.path), quantized=True, weights=known[arm.engine].format)
    folder = Path(tempfile.mkdtemp(prefix="peftopt-"))
    found: dict[str, dict[str, Json]] = {arm.name: {"name": arm.name, "turns": []} for arm in arms}
    with ExitStack() as stack:
        children = {}
        for arm in arms:
            cache = compile_cache(arm.model) if arm.engine == "compiled" else None
            python = environments.interpreter(known[arm.engine])
            log = folder / f"{arm.name}.log"
            child = stack.enter_context(Child(log, threads or machine.cores(), cache, python))
            model = asdict(_absolute(arm.model))
            child.ask("prepare", DEADLINE_S, plugin=arm.engine)
            found[arm.name] |= child.ask("open", DEADLINE_S, plugin=arm.engine, params={}, model=model)
            if arm.engine == "eager" and preflight.quantized_elsewhere(Path(arm.model.path)):
                found[arm.name] |= child.ask("alive", DEADLINE_S, rows=building.PROMPTS)
            children[arm.name] = child
        dice = random.Random(seed)
        for _ in range(blocks):
            picks = [[dice.choice(rows).as_json() for _ in range(batch)] for _ in range(3)]
            for name in dice.sample(sorted(children), len(children)):
                answer = children[name].ask("speed", DEADLINE_S, batches=picks, new_tokens=new_tokens, warmup=1)
                found[name]["turns"].append([r for r in answer["requests"] if not r["warmup"]])
        for name, child in children.items():
            found[name] |= child.ask("memory", 30)
    return [_figures(values, found[arms[0].name]["turns"]) for values in found.values()]


def _absolute(model: Model) -> Model:
    """Workers run in a folder of their own."""
    return Model(str(Path(model.path).resolve()), tuple(str(Path(a).resolve()) for a in model.adapters))


def compile_cache(model: Model) -> Path:
    """Where `peftopt compile` left its cache: beside the model, so the model's own files stay as they are."""
    folder = Path(model.path).resolve()
    return folder.with_name(folder.name + ".compiled")


def _figures(values: dict[str, Json], reference: list[list[dict[str, Json]]]) -> dict[str, Json]:
    requests = [r for turn in values["turns"] for r in turn]
    found: dict[str, Interval | None] = {
        "p50_ms": stats.quantile([r["request_duration_ms"] for r in requests], 0.5),
        "p95_ms": stats.quantile([r["request_duration_ms"] for r in requests], 0.95),
        "ttft_ms": stats.quantile([r["ttft_ms"] for r in requests], 0.5),
        "tpot_ms": stats.quantile([r["tpot_ms"] for r in requests if r["tpot_ms"]] or [math.nan], 0.5),
        "throughput": stats.quantile([1e3 * r["new_tokens"] / r["request_duration_ms"] for r in requests], 0.5),
        "ratio": None,
    }
    if values["turns"] is not reference:

        def middle(turn: list[dict[str, Json]]) -> float:
            return stats.median([r["request_duration_ms"] for r in turn])

        logs = [math.log(middle(a) / middle(b)) for a, b in zip(values["turns"], reference, strict=True)]
        found["ratio"] = exp(stats.hodges_lehmann(logs, 0.95))
    return {**values, **found}


def compile_model(model: Model, params: Mapping[str, Json], batches: Sequence[int], new_tokens: int) -> dict[str, Json]:
    """Compile once cold, then open again warm; the cache stays beside the model. Times in seconds."""
    cache = compile_cache(model)
    found: dict[str, Json] = {"cache": str(cache)}
    row = corpus.Row("compile", ({"role": "user", "content": "Say hello."},))
    for pass_ in ("cold", "warm"):
        log = Path(tempfile.mkdtemp(prefix="peftopt-")) / "compile.log"
        with Child(log, machine.cores(), cache) as child:
            launch = child.ask(
                "open", DEADLINE_S, plugin="compiled", params=dict(params), model=asdict(_absolute(model))
            )
            first = 0.0
            for batch in batches:
                prompts = [[row.as_json()] * batch] * 3
                answer = child.ask("speed", DEADLINE_S, batches=prompts, new_tokens=new_tokens, warmup=1)
                first += answer["requests"][0]["request_duration_ms"] / 1e3
                found[f"tpot_ms@{batch}"] = answer["requests"][-1]["tpot_ms"]
        found[f"{pass_}_s"] = launch["model_loading_time"] + first
    return {**found, "cache_bytes": store.size(Path(found["cache"]))}
