"""How long a run will take: the inputs of decision/duration.py, from a recipe, its files, the times of the first
layers, and what exists already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from statistics import mean, quantiles

from peftopt import environments, machine, plugins, stats, store
from peftopt.decision import stopping
from peftopt.decision.duration import Answering, Duration, Pace, Racing, Span, Work, parts, total
from peftopt.decision.evidence import FEWEST, Evidence
from peftopt.decision.rules.parents import family
from peftopt.engines import _shapes, compiled
from peftopt.probes.layers import APART, PLAIN, Few, typical
from peftopt.progress import Hear
from peftopt.recipe import plan as planning
from peftopt.records import Build, Plan, Quality, Recipe, Variant, Workload
from peftopt.runner import forecast
from peftopt.runner.forecast import Outlook
from peftopt.runner.prepare import lanes_for
from peftopt.runner.run import hashed

SCALED = (0.9, 1.2)
"""The time of a whole model over the sum of its layers' times: least and most. The most allows for a busier machine."""

START = (0.8, 1.5)
"""A process's starting time over the time that was measured for one alone: least and most."""

AT_ONCE = 1.5
"""The starting time of processes side by side, over their total time divided by the cores."""

LOADED = (400e6, 120e6)
"""Bytes per second at which a model loads: from memory, and from a slow disk."""

WRITTEN = (200e6, 30e6)
"""Bytes per second at which a transform reads, computes and writes a model: most and least."""

CALIBRATING = (2.0, 10.0)
"""How many times a quantizer reads its calibration tokens: least and most."""

GRAPH_S, GRAPH_OF_REGIONS_S, GRAPH_CACHED_S = Span(25.0, 120.0), Span(10.0, 60.0), Span(1.0, 5.0)
"""Seconds to compile a graph of the whole model, to compile a graph of one layer, and to load one from the cache."""

SERVER_S = Span(8.0, 90.0)
"""Seconds from the start of a server to its first answer."""

SAME_WEIGHTS, OTHER_ENGINE, CHANGED_REQUESTS, ADAPTED = Span(0.2, 0.8), Span(0.1, 1.0), Span(0.3, 1.0), Span(1.0, 1.5)
"""Assumed ratios of times that are not tried: a compiled variant over the same weights on eager, another engine over
eager, requests that a policy changes over the plain ones, and an adapter that is not cut over its base."""

READ_WRONG = (0.05, 0.2)
"""The share of answers that differ from the expected ones and have to be generated: least and most."""

ONE_BATCH = (8.0, 4.0)
"""The speed of a full batch over the speed of single rows: most and least."""


def foreseen(recipe: Recipe, home: store.Store, hear: Hear) -> tuple[Outlook, Duration]:
    """The forecast of each variant's time per token, and how long a run of the recipe will take in the results folder
    `home`: by the times of the first layers. Raises BadInput for a base or an adapter that cannot be."""
    sources = hashed(recipe)
    outlook = forecast.outlook(recipe, sources, home.root, hear)
    return outlook, expected(planning.plan(recipe, sources, environments.versions()), outlook, home)


def expected(plan: Plan, outlook: Outlook, home: store.Store, evidence: Evidence | None = None) -> Duration:
    """How long a plan's run will still take after its `evidence` so far. Artifacts that `home` has are not built."""
    recipe, few = plan.recipe, outlook.few
    if few is None:
        return Duration(unknown=outlook.unknown)
    if recipe.variants[recipe.baseline].engine.plugin == "endpoint":
        return Duration(unknown="the baseline is a server that runs elsewhere")
    speeds = _Speeds(recipe, few)
    if not speeds.reference:
        return Duration(unknown=f"{recipe.baseline} could not be timed on a few layers")
    built = {build.id for build in plan.builds if home.folder(build.id).exists()}
    work = Work(
        builds=[_build(each, recipe, speeds) for each in plan.builds if each.id not in built],
        compiling=[*_compiling(recipe, plan, few, built)],
        answers=[*_answers(recipe, speeds, evidence)],
        races={name: _race(recipe, workload, speeds, evidence) for name, workload in recipe.workloads.items()},
        lanes=lanes_for(Path(recipe.base)),
    )
    busy = any(forecast.by_cpu(few, workload) for workload in few.lengths)
    return Duration(parts(work), [*_not_counted(recipe)], busy=busy)


def _not_counted(recipe: Recipe) -> Iterator[str]:
    for variant in recipe.variants.values():
        if variant.engine.plugin == "endpoint":
            yield f"{variant.name}, a server that runs elsewhere"
    if recipe.quality and recipe.quality.tasks:
        yield "tasks of lm-evaluation-harness"


class _Speeds:
    """Times of variants from their first layers. A variant that was not tried takes those of the most similar one."""

    def __init__(self, recipe: Recipe, few: Few) -> None:
        self.recipe = recipe
        self.few = few
        self.bytes = store.size(Path(recipe.base))
        self.start = Span(few.start_s, few.start_s) * Span(*START)
        self.load = Span(self.bytes / LOADED[0], self.bytes / LOADED[1] + 1)
        self.tried = frozenset(name for name in {each.variant for each in few.tried} if self._everywhere(name))
        self.reference = next((name for name in (recipe.baseline, APART, PLAIN) if name in self.tried), "")

    def _everywhere(self, name: str) -> bool:
        """Whether its times are known on every workload that was tried."""
        return all(forecast.whole_passes(self.few, name, workload, wall=True) for workload in self.few.lengths)

    def like(self, variant: Variant) -> tuple[str, Span]:
        """The most similar variant or model with known times, and the ratio of this variant's time to it."""
        if variant.name in self.tried:
            return variant.name, Span(1.0, 1.0)
        alike = [v for v in self.recipe.variants.values() if v.steps == variant.steps and v.name in self.tried]
        merged = [v for v in self.recipe.variants.values() if v.steps[:1] == variant.steps[:1] and v.name in self.tried]
        name = next((v.name for v in [*alike, *merged]), self.reference)
        if variant.engine.plugin == "compiled":
            return name, SAME_WEIGHTS
        if variant.engine.plugin != "eager":
            return self.reference, OTHER_ENGINE
        return name, ADAPTED if name == PLAIN and not variant.policies else CHANGED_REQUESTS

    def request(self, variant: Variant, workload: Workload) -> Span:
        """Seconds of a request (a whole batch), or of a whole turn under load."""
        natural = workload.lengths == "natural"
        tokens = Span(max(workload.new_tokens / 4, 1) if natural else workload.new_tokens, workload.new_tokens)
        if workload.loaded:
            pace = self.pace(variant)
            prompts = self.few.prompt_tokens or next(iter(self.few.lengths.values()))
            each = pace.prompt_token * mean(prompts) + pace.token * tokens
            turn = each * Span(workload.requests / max(workload.users, 1), workload.requests)
            sent_s = workload.requests / workload.rate if workload.rate else 0.0
            return Span(max(turn.least, sent_s), max(turn.most, sent_s))
        name, times = self.like(variant)
        passes = forecast.whole_passes(self.few, name, workload.name, wall=True)
        least = [p.prompt_ms + (tokens.least - 1) * p.step_ms for p in passes]
        most = [p.prompt_ms + (tokens.most - 1) * p.step_ms for p in passes]
        return Span(_range(least).least, _range(most).most) * Span(*SCALED) * times * 1e-3

    def pace(self, variant: Variant) -> Pace:
        """Seconds of single tokens, over all workloads that were tried."""
        name, times = self.like(variant)
        scale = Span(*SCALED) * times * 1e-3
        together = self.recipe.quality.batch if self.recipe.quality else 1
        prompts, tokens = [], []
        for workload in (self.recipe.workloads[each] for each in self.few.lengths):
            passes = forecast.whole_passes(self.few, name, workload.name, wall=True)
            size = typical(self.few.lengths[workload.name], workload.batch) * workload.batch
            more = max(together / workload.batch, 1.0)
            faster = Span(*(1 / min(more, most) for most in ONE_BATCH))
            prompts.append(_range([p.prompt_ms / size for p in passes]))
            tokens.append(_range([p.step_ms / workload.batch for p in passes]) * faster)
        return Pace(_widest(prompts) * scale, _widest(tokens) * scale)

    def started(self, variants: Sequence[Variant]) -> Span:
        """Seconds until models answer: their processes start side by side, and load one after the other."""
        lanes = min(machine.cores(), max(len(variants), 1))
        side_by_side = Span(1 / lanes, min(1.0, AT_ONCE / lanes))
        serve = [SERVER_S for v in variants if plugins.catalogue()[v.engine.plugin].serves]
        ready = [GRAPH_CACHED_S for v in variants if v.engine.technique]
        ours = len(variants) - len(serve)
        return (self.start * ours + total(serve)) * side_by_side + self.load * ours + total(ready)


def _range(times: Sequence[float]) -> Span:
    """The least of some times, and their third quartile."""
    return Span(min(times), quantiles(times, n=4)[2] if len(times) > 1 else times[0])


def _widest(spans: Sequence[Span]) -> Span:
    return Span(min(span.least for span in spans), max(span.most for span in spans))


# ---- what there is to do -------------------------------------------------------------------------


def _build(build: Build, recipe: Recipe, speeds: _Speeds) -> Span:
    """Seconds to build an artifact: a process writes it; for a quantizer, another process opens it."""
    written = Span(speeds.bytes / WRITTEN[0], speeds.bytes / WRITTEN[1])
    made = speeds.start * Span(1.0, 2.0) + written
    if not build.step.calibrates:
        return made
    asked = build.step.params
    tokens = float(asked.get("samples", 64)) * float(asked.get("max_tokens", 256))
    reading = speeds.pace(recipe.variants[recipe.baseline]).prompt_token * tokens
    return made + reading * Span(*CALIBRATING)


def _compiling(recipe: Recipe, plan: Plan, few: Few, built: Set[str]) -> Iterator[Span]:
    """Seconds to compile each compiled variant's graphs: those of the workloads, and one for the answers. If its
    artifact exists, its graphs may be in the cache."""
    for variant in (v for v in recipe.variants.values() if v.engine.plugin == "compiled"):
        params = compiled.Params(**variant.engine.params)
        each = GRAPH_OF_REGIONS_S if params.regions else GRAPH_S
        graphs = 1 if recipe.quality else 0
        for workload in (recipe.workloads[name] for name in few.lengths):
            lengths = few.lengths[workload.name]
            ahead = forecast.ahead(variant)
            graphs += _shapes.wanted(lengths, workload.batch, workload.new_tokens, params, ahead).graphs
        least = GRAPH_CACHED_S if plan.models[variant.name] in built else each
        yield Span(least.least, each.most) * graphs


def _answers(recipe: Recipe, speeds: _Speeds, evidence: Evidence | None) -> Iterator[Answering]:
    """The baseline's answers, twice, and every other variant's answers."""
    quality, few = recipe.quality, speeds.few
    if quality is None:
        return
    for variant in recipe.variants.values():
        if variant.engine.plugin == "endpoint":
            continue
        most = stopping.answers(recipe, variant)
        rows = len(few.prompt_tokens) if most is None else min(most, len(few.prompt_tokens))
        for launch in (1, 2) if variant.name == recipe.baseline else (1,):
            left = rows - (len(evidence.rows(variant.name, launch)) if evidence else 0)
            if left > 0:
                yield Answering(
                    rows=left,
                    prompt_tokens=mean(few.prompt_tokens),
                    new_tokens=_new_tokens(quality, few),
                    generated=_generated(recipe, variant, launch, few),
                    pace=speeds.pace(variant),
                    start=speeds.started([variant]),
                )


def _new_tokens(quality: Quality, few: Few) -> Span:
    """Mean tokens of an answer: those of the expected answers, or a fifth more; without expected answers, up to the
    maximum."""
    if not few.answer_tokens:
        return Span(quality.new_tokens / 8, quality.new_tokens)
    usual = mean(few.answer_tokens)
    return Span(min(usual, quality.new_tokens), min(1.2 * usual, quality.new_tokens))


def _generated(recipe: Recipe, variant: Variant, launch: int, few: Few) -> Span:
    """The share of answers that have to be generated: all of engines that only generate, the baseline's without an
    expected answer, and wrong answers. Other answers are checked by scoring the expected text."""
    if variant.engine.plugin != "eager":
        return Span(1.0, 1.0)
    first = variant.name == recipe.baseline and launch == 1
    alone = 1 - len(few.answer_tokens) / len(few.prompt_tokens) if first else 0.0
    return Span(*(alone + (1 - alone) * wrong for wrong in READ_WRONG))


def _race(recipe: Recipe, workload: Workload, speeds: _Speeds, evidence: Evidence | None) -> Racing:
    """A workload's blocks. The minimized workload takes blocks from the first look to the last; a workload with a
    required time takes up to the last. Others take as few as an interval needs."""
    minimized = workload.name == recipe.minimize.workload
    required = any(threshold.metric.workload == workload.name for threshold in recipe.require)
    most = recipe.measure.max_blocks if minimized or required else FEWEST
    least = max(stats.looks(family(recipe))[0], recipe.measure.min_blocks) if minimized else FEWEST
    there = evidence.blocks(recipe.baseline, workload.name) if evidence else 0
    blocks = Span(*(max(n - there, 0) for n in (min(least, most), most)))
    racing = [v for v in recipe.variants.values() if v.engine.plugin != "endpoint"]
    if minimized or any(v.policies for v in recipe.variants.values()):  # the second copy of the baseline
        racing.append(recipe.variants[recipe.baseline])
    return Racing(
        blocks=blocks,
        requests=1 if workload.loaded else recipe.measure.warmup + recipe.measure.requests,
        relaunch=recipe.measure.relaunch,
        arms=[speeds.request(variant, workload) for variant in racing],
        launch=speeds.started(racing),
    )
