"""Forecast the times of a recipe's variants from their first layers and from the prompts, before a long run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt import corpus, environments, identity, machine, plugins, scratch, stats, store
from peftopt.decision import forecast as judging
from peftopt.engines import _shapes, compiled
from peftopt.errors import BadInput, WorkerFailed
from peftopt.jobs import LayersJob
from peftopt.measurements import Forecast, Measured, Pass, as_json, structured
from peftopt.metrics import counted
from peftopt.models.adapter import highest_rank, open_adapter
from peftopt.models.baked import is_baked
from peftopt.models.checkpoint import open_model
from peftopt.models.cut import layer_of, layers_of
from peftopt.probes.layers import APART, APART_ONE, FEW, PADDED, PLAIN, PLAIN_ONE, Asked, Few
from peftopt.progress import Hear
from peftopt.records import GENERIC, SAFETENSORS, Interval, Model, Recipe, Variant, Workload
from peftopt.runner import hashes
from peftopt.runner.process import WorkerProcess

SECONDS = 1.0
"""Seconds for which a variant is timed on a workload."""

DEADLINE_S = 600.0

FOLDER = "forecasts"
"""Where a results folder keeps the times of first layers."""

KEPT_S = 24 * 3600.0
"""Seconds for which kept times of layers are reused: their key does not cover other load on the machine."""


@dataclass(frozen=True)
class Outlook:
    """The forecasts for a recipe, each for a variant and a workload; why other variants have none (`left_out`); the
    seconds it took, None for kept times; and the times of the first layers (`few`), or why there are none
    (`unknown`)."""

    forecasts: tuple[Measured, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: float | None = 0.0
    few: Few | None = None
    unknown: str = ""

    @property
    def variants(self) -> frozenset[str]:
        """The variants with a forecast."""
        return frozenset(each.variant for each in self.forecasts)

    @property
    def warnings(self) -> list[str]:
        """A sentence for each forecast that warns; only the first for a variant on a workload."""
        sentences: dict[tuple[str, str, str], str] = {}
        for each in self.forecasts:
            forecast = each.values
            if isinstance(forecast, Forecast) and forecast.warns:
                key = (each.variant, each.workload, forecast.kind)
                sentences.setdefault(key, judging.sentence(each.variant, each.workload, forecast))
        return list(sentences.values())


def outlook(recipe: Recipe, sources: Mapping[str, str], home: Path, hear: Hear = lambda _: None) -> Outlook:
    """Let a worker time the first layers, and make forecasts of the times. No worker starts for a recipe without a
    possible forecast, for a model of only a few layers, and where the results folder `home` keeps times of the same
    layers on the same machine. `sources`: the hashes of base and adapter."""
    kind = _kind(Path(recipe.adapter))
    possible = [variant for variant in recipe.variants.values() if _can_be_tried(variant)]
    variants = possible if kind == "LORA" else []
    graphs = [variant for variant in recipe.variants.values() if variant.engine.plugin == "compiled"]
    own, padded = _ranks(recipe)
    left_out = {name: _elsewhere(v) for name, v in recipe.variants.items() if v not in (*possible, *graphs)}
    if not variants:
        left_out |= {v.name: f"only LoRA is tried on a few layers, and the adapter is {kind}" for v in possible}
    workloads = [workload for workload in recipe.workloads.values() if not workload.loaded]
    if not workloads:
        return Outlook(left_out=left_out, unknown="every workload is a load on a server")
    if not (possible or graphs or padded > own):
        return Outlook(left_out=left_out, unknown=f"{recipe.baseline} is {left_out[recipe.baseline]}")
    started = time.perf_counter()
    try:
        if (layers := layers_of(Path(recipe.base))) <= FEW:
            why = f"a model of {counted(layers, 'layer')} is measured as soon as it is tried"
            return Outlook(left_out=left_out, unknown=why)
        room = _room(Path(recipe.base))
        left_out |= {variant.name: "too little memory to open it beside the others" for variant in variants[room:]}
        job = _job(recipe, kind, variants[:room], workloads, padded if padded > own else 0)
        place = home / FOLDER / f"{_key(job, recipe, sources)[:16]}.json"
        few = _kept(place)
        took = None if few else started
        few = few or _asked(job, recipe, place, hear)
    except (BadInput, WorkerFailed) as error:
        reason = error.message if isinstance(error, BadInput) else error.detail or error.reason
        left_out = dict.fromkeys(recipe.variants, reason)
        return Outlook(left_out=left_out, seconds=time.perf_counter() - started, unknown=reason)
    forecasts = [
        *_speeds(recipe, variants, workloads, few),
        *_overheads(recipe, variants, workloads, few),
        *_paddings(recipe, workloads, few, own, padded),
        *_graphs(graphs, workloads, few),
    ]
    seconds = None if took is None else time.perf_counter() - took
    return Outlook(tuple(forecasts), {**left_out, **few.left_out}, seconds, few)


def _can_be_tried(variant: Variant) -> bool:
    """Whether a variant runs on eager in this environment, with unchanged requests. Compiled variants are not tried:
    compiling a few layers takes as long as compiling for a run."""
    steps = [plugins.catalogue()[step.plugin] for step in variant.steps]
    here = all(plugin.environment == environments.MAIN and plugin.format == SAFETENSORS for plugin in steps)
    here = here and not any(environments.lacking(plugin)[0] for plugin in steps)
    return variant.engine.plugin == "eager" and here and not variant.policies


def _room(base: Path) -> int:
    """How many cut models fit into half of the free memory, beside those of the base."""
    each = sum(e.nbytes for e in open_model(base).entries.values() if layer_of(e.name) < FEW)
    return max(0, machine.free_memory() // (2 * each) - 2)


def _elsewhere(variant: Variant) -> str:
    if variant.policies:
        return "it changes the requests, or how they are answered"
    return f"on {variant.engine.plugin}, which is not tried on a few layers"


def _ranks(recipe: Recipe) -> tuple[int, int]:
    """The adapter's rank, and the rank to which the recipe's vLLM pads it; 0 and 0 if no vLLM serves it unmerged."""
    from peftopt.engines import vllm

    apart = [v for v in recipe.variants.values() if v.engine.plugin == "vllm" and not _merges(v)]
    own = highest_rank(open_adapter(Path(recipe.adapter)).config) if apart else 0
    return (own, vllm.padded(own)) if 0 < own <= vllm.RANKS[-1] else (0, 0)


def _merges(variant: Variant) -> bool:
    return any(step.technique == "merge" for step in variant.steps)


def _kind(adapter: Path) -> str:
    """An adapter's type in PEFT's words, or "a baked prompt"."""
    return "a baked prompt" if is_baked(adapter) else open_adapter(adapter).kind


def _job(recipe: Recipe, kind: str, variants: Sequence[Variant], workloads: Sequence[Workload], rank: int) -> LayersJob:
    """The worker's job, still without the folder that it may write in. An adapter that cannot be cut is left out."""
    calibrates = any(step.calibrates for variant in variants for step in variant.steps)
    quality = recipe.quality
    return LayersJob(
        model=Model(recipe.base, (recipe.adapter,) if kind == "LORA" else ()),
        variants=tuple(variants),
        asked=tuple(Asked(w.name, w.batch, tuple(corpus.read(w.prompts, w.slice))) for w in workloads),
        folder="",
        seconds=SECONDS,
        rows=tuple(corpus.calibration(recipe.calibration or GENERIC)) if calibrates else (),
        rank=rank,
        seed=recipe.seed,
        answers=tuple(corpus.asked_of(corpus.read(quality.prompts, quality.slice), quality.rows)) if quality else (),
    )


def _asked(job: LayersJob, recipe: Recipe, place: Path, hear: Hear) -> Few:
    """Let a worker measure, and keep its times if all variants could be tried."""
    threads = recipe.measure.threads or machine.cores()
    with scratch.temporary() as folder, WorkerProcess(folder / "worker.log", threads) as child:
        few = child.ask(dataclasses.replace(job, folder=f"{folder}/cut"), DEADLINE_S, hear=hear)
    if not few.left_out:
        place.parent.mkdir(parents=True, exist_ok=True)
        for old in place.parent.glob("*.json"):
            if _age_s(old) > KEPT_S:
                old.unlink(missing_ok=True)
        store.write(place, json.dumps(as_json(few)))
    return few


# ---- kept, for the next verb that asks ---------------------------------------------------------


def _key(job: LayersJob, recipe: Recipe, sources: Mapping[str, str]) -> str:
    """The hash of everything known that the times depend on: the machine with its libraries, base and adapter, the
    variants with the code of their plug-ins and the folders that they name, prompts and calibration rows."""
    steps = {step.plugin: step.kind for variant in job.variants for step in (*variant.steps, variant.engine)}
    code = {name: plugins.module(kind, name).__file__ for name, kind in steps.items()}
    folders = {str(folder) for variant in job.variants for folder in hashes.folders(variant).values()}
    return identity.of_value(
        {
            "asked": as_json(dataclasses.replace(job, model=Model(""))),
            "base": sources["base"],
            "adapter": sources["adapter"],
            "machine": machine.describe(),
            "threads": recipe.measure.threads or machine.cores(),
            "versions": environments.versions(),
            "code": {name: identity.of_file(Path(file)) for name, file in code.items() if file},
            "folders": {folder: identity.of_folder(Path(folder)) for folder in folders},
        }
    )


def _kept(place: Path) -> Few | None:
    """The kept times; None where there are none, where they are too old, or where their file is damaged."""
    if not place.exists() or _age_s(place) > KEPT_S:
        return None
    with contextlib.suppress(BadInput):
        return structured(Few, store.read_object(place), "forecast")
    return None


def _age_s(file: Path) -> float:
    return time.time() - file.stat().st_mtime


# ---- what is said of it ------------------------------------------------------------------------


def _passes(few: Few, name: str, workload: str, wall: bool = False) -> Sequence[Pass]:
    """The passes of a variant on a workload, the least of each group, by the more precise clock. With `wall`, all
    passes, by the wall clock. () where the variant was not tried."""
    tried = {each.variant: each for each in few.tried if each.workload == workload}
    if not {name, PLAIN} <= tried.keys():
        return ()
    if wall:
        return tried[name].passes
    return judging.least(tried[name].cpu if by_cpu(few, workload) else tried[name].passes)


def by_cpu(few: Few, workload: str) -> bool:
    """Whether CPU time is more precise than the wall clock on a workload: other processes keep the machine busy."""
    plain = next(each for each in few.tried if (each.variant, each.workload) == (PLAIN, workload))
    return judging.by_cpu(plain.passes, plain.cpu)


def whole_passes(few: Few, name: str, workload: str, wall: bool = False) -> list[Pass]:
    """The times of a variant on a workload with all layers, pass by pass, by the more precise clock: the least of each
    group. With `wall`, every pass, by the wall clock. Empty where the variant was not tried."""
    apart = any(each.apart for each in few.tried if (each.variant, each.workload) == (name, workload))
    names = (APART_ONE, APART, name) if apart else (PLAIN_ONE, PLAIN, name)
    one, several, passes = (_passes(few, each, workload, wall) for each in names)
    if not one or not several:
        return []
    fixed = judging.beside(one, several, few.few)
    return [judging.whole(each, fixed, few.few, few.layers) for each in passes]


def _ratio(ours: Sequence[Pass], theirs: Sequence[Pass], new_tokens: int) -> Interval:
    return judging.ratio([p.request_ms(new_tokens) for p in ours], [p.request_ms(new_tokens) for p in theirs])


def _speeds(recipe: Recipe, variants: Sequence[Variant], workloads: Sequence[Workload], few: Few) -> Iterator[Measured]:
    for workload in workloads:
        wholes = {variant.name: whole_passes(few, variant.name, workload.name) for variant in variants}
        tried = [name for name, passes in wholes.items() if passes]
        for variant in [variant for variant in variants if variant.name in tried]:
            for other in judging.against(recipe, variant, tried):
                ours, theirs = wholes[variant.name], wholes[other]
                interval = _ratio(ours, theirs, workload.new_tokens)
                prompt = _medians([p.prompt_ms for p in ours], [p.prompt_ms for p in theirs])
                step = _medians([p.step_ms for p in ours], [p.step_ms for p in theirs])
                clock = ", in CPU time" if by_cpu(few, workload.name) else ""
                how = f"on {few.few} of {few.layers} layers{clock}"
                speed = judging.speed(variant, other, interval, prompt, step, how)
                yield Measured(speed, variant.name, workload.name)


def _medians(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return stats.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def _overheads(
    recipe: Recipe, variants: Sequence[Variant], workloads: Sequence[Workload], few: Few
) -> Iterator[Measured]:
    """The share of a token's time that is not arithmetic, for the first merged variant on eager."""
    merged = next((variant for variant in variants if _merges(variant)), None)
    elsewhere = any(variant.engine.plugin != "eager" for variant in recipe.variants.values())
    products = {each.workload: each.ms for each in few.products}
    for workload in workloads if merged else ():
        steps = [each.step_ms for each in whole_passes(few, PLAIN, workload.name)]
        if steps and merged and not by_cpu(few, workload.name):  # the products are timed by the wall clock
            interval = judging.ratio(steps, [products[workload.name]] * len(steps))
            yield Measured(judging.eager(interval, elsewhere), merged.name, workload.name)


def _paddings(recipe: Recipe, workloads: Sequence[Workload], few: Few, own: int, padded: int) -> Iterator[Measured]:
    """The time with the adapter padded to a server's rank, against the adapter as it is."""
    apart = [v.name for v in recipe.variants.values() if v.engine.plugin == "vllm" and not _merges(v)]
    for workload in workloads if padded > own else ():
        wide, narrow = (whole_passes(few, name, workload.name) for name in (PADDED, recipe.baseline))
        if wide and narrow:
            rank = judging.rank(_ratio(wide, narrow, workload.new_tokens), own, padded)
            yield from (Measured(rank, name, workload.name) for name in apart)


def ahead(variant: Variant) -> int:
    """How many tokens a variant proposes at a time, 0 where it does not speculate."""
    return next((int(step.params["tokens"]) for step in variant.policies if step.technique == "speculate"), 0)


def _graphs(variants: Sequence[Variant], workloads: Sequence[Workload], few: Few) -> Iterator[Measured]:
    """The graphs that a compiled engine compiles, and the requests that it runs uncompiled."""
    for variant in variants:
        params = compiled.Params(**variant.engine.params)
        for workload in workloads:
            lengths = few.lengths[workload.name]
            wanted = _shapes.wanted(lengths, workload.batch, workload.new_tokens, params, ahead(variant))
            shapes = judging.shapes(wanted.uncompiled, wanted.eager, wanted.graphs, wanted.padding, wanted.longest)
            yield Measured(shapes, variant.name, workload.name)
