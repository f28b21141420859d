"""The sections of a recipe as they were read, and the checks between them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftopt.metrics import TASK
from peftopt.metrics import known as known_metric
from peftopt.recipe.reader import Reading, Value, Wrong, nearest, show
from peftopt.records import (
    SAFETENSORS,
    Measure,
    Metric,
    Plugin,
    Quality,
    Recipe,
    Rule,
    Step,
    Threshold,
    Variant,
    Workload,
    task_name,
)

DEFAULT_BASELINE = "adapter"

Limit = float | str | None
"""A limit of the trade-off table. None switches the rule off; a word gives the purpose of a quantizer."""

Rows = Mapping[str, Mapping[str, Limit] | None]
"""A trade-off table: the name of a row -> the parts of its rule -> their limits."""

_AS_USUAL = Measure()

_JUDGED_ON_ANSWERS = ("ratio", "share", "nats")
"""The units of the metrics that need a `quality` section."""


@dataclass(frozen=True)
class Sources:
    """The section `model`."""

    base: str
    """The folder of the base model (safetensors)."""
    adapter: str
    """The folder of the trained adapter, as PEFT saves it."""


@dataclass(frozen=True)
class Sections:
    """Which variants of a model to build, how to measure them, and what they must prove."""

    # None for a section that was left out, or that has a mistake, which is noted
    model: Sources | None = None
    """The base model and its adapter."""
    seed: int | None = 0
    """The seed of random choices."""
    calibration: str | None = None
    """A file of texts for the calibration of GPTQ, AWQ and W8A8, never the rows of `quality`; or generic, for texts
    that come with peftopt."""
    workloads: Mapping[str, Workload | None] | None = None
    """What is timed: name -> requests."""
    quality: Quality | None = None
    """Which answers are checked."""
    measure: Measure | None = _AS_USUAL
    """How much to measure."""
    variants: Mapping[str, Variant | None] | None = None
    """What to build: name -> steps in order, the engine last. [] is the base with the adapter on top."""
    baseline: str | None = DEFAULT_BASELINE
    """The variant that the others are compared with: the adapter as it is served today."""
    tradeoffs: Rows | None = None
    """When a technique is worth it: default, limits of your own, or the path of a file with such limits."""
    require: tuple[Threshold | None, ...] | None = ()
    """What the whole variant must meet: your SLA."""
    minimize: Metric | None = None
    """The time that ranks the variants: latency.p50@WORKLOAD, ttft.p50@WORKLOAD, …"""
    price_per_hour: str | None = ""
    """The machine's price per hour: 2.10 USD. Reports then give the price of tokens."""

    def recipe(self, name: str, path: str, rules: tuple[Rule, ...]) -> Recipe:
        """The recipe. Raises Wrong where a section has a mistake."""
        model = _whole(self.model)
        return Recipe(
            name=name,
            path=path,
            base=model.base,
            adapter=model.adapter,
            variants=_readable(_whole(self.variants)),
            baseline=_whole(self.baseline),
            workloads=_readable(_whole(self.workloads)),
            quality=self.quality,
            calibration=self.calibration,
            rules=rules,
            require=tuple(map(_whole, _whole(self.require))),
            minimize=_whole(self.minimize),
            measure=_whole(self.measure),
            seed=_whole(self.seed),
            price_per_hour=_whole(self.price_per_hour),
        )


def _whole(section: Value | None) -> Value:
    if section is None:
        raise Wrong
    return section


def _readable(values: Mapping[str, Value | None] | None) -> dict[str, Value]:
    """The values without a mistake."""
    return {name: value for name, value in (values or {}).items() if value is not None}


def check(sections: Sections, reading: Reading, catalogue: Mapping[str, Plugin]) -> None:
    """Note every mistake between sections."""
    _check_baseline(sections, reading)
    _check_chains(sections, reading)
    _check_calibration(sections, reading)
    _check_speculation(sections, reading, catalogue)
    _check_prefixes(sections, reading, catalogue)
    _check_packing(sections, reading, catalogue)
    _check_loads(sections, reading, catalogue)
    _check_minimize(sections, reading)
    _check_metrics(sections, reading)
    _check_blocks(sections, reading)


def _check_blocks(sections: Sections, reading: Reading) -> None:
    measure = sections.measure
    if measure and measure.min_blocks > measure.max_blocks:
        reading.note("measure.min_blocks", "is more than max_blocks", "more than max_blocks are never run")


def _check_baseline(sections: Sections, reading: Reading) -> None:
    name = sections.baseline
    variants = sections.variants
    if not variants or not name:
        return
    at = "baseline" if "baseline" in reading.lines else "variants"
    if name not in variants:
        reading.note(at, f"no variant named {show(name)} as baseline", nearest(name, variants))
    baseline = variants.get(name)
    if baseline and (baseline.steps or baseline.policies):
        hint = "the baseline is the adapter as it is served today: write []"
        reading.note(at, f"the baseline {name} has transforms or policies", hint)


def _check_chains(sections: Sections, reading: Reading) -> None:
    first: dict[str, str] = {}
    for name, variant in _readable(sections.variants).items():
        chain = repr((variant.steps, variant.engine, variant.policies))
        same = first.setdefault(chain, name)
        if same != name:
            reading.note(f"variants.{name}", f"is the same chain as {same}", "remove one of them")


def _check_calibration(sections: Sections, reading: Reading) -> None:
    if "calibration" in reading.lines:
        return
    hint = "add calibration: the path of a JSONL file of prompts and answers, or generic"
    for name, variant in _readable(sections.variants).items():
        for step in (*variant.steps, *variant.policies):
            if step.calibrates or step.params.get("answers"):
                reading.note(f"variants.{name}", f"{step.plugin} needs calibration texts", hint)


def _check_speculation(sections: Sections, reading: Reading, catalogue: Mapping[str, Plugin]) -> None:
    """Note a variant whose engine cannot speculate as its policy says, or not in the workloads' batches."""
    batches = [name for name, workload in _readable(sections.workloads).items() if workload.batch > 1]
    for name, variant in _readable(sections.variants).items():
        for step in (step for step in variant.policies if step.technique == "speculate"):
            able = catalogue[variant.engine.plugin].speculates
            asked = {
                "prompts": "does not speculate",
                "draft": "takes no draft model" if step.params.get("draft") else "",
                "answers": "proposes nothing of other answers" if step.params.get("answers") else "",
                "shortest": f"looks up n-grams down to one token, not {step.params.get('shortest')}"
                if step.params.get("shortest", 1) != 1
                else "",
                "batches": f"speculates for one prompt at a time, and {batches[0]} has a batch" if batches else "",
            }
            needed = [word for word, says in asked.items() if says]
            if lacks := next((word for word in needed if word not in able), ""):
                others = [p.name for p in catalogue.values() if {*needed} <= {*p.speculates}]
                hint = f"give it an engine that does: {', '.join(others)}" if others else "remove the step"
                reading.note(f"variants.{name}", f"its engine {variant.engine.plugin} {asked[lacks]}", hint)


def _check_prefixes(sections: Sections, reading: Reading, catalogue: Mapping[str, Plugin]) -> None:
    """Note a variant whose engine cannot reuse prefixes. Only servers do so while they speculate."""
    for name, variant in _readable(sections.variants).items():
        techniques = {step.technique for step in variant.policies}
        engine = catalogue[variant.engine.plugin]
        if "prefix" not in techniques:
            continue
        others = [p.name for p in catalogue.values() if p.reuses]
        if not engine.reuses:
            hint = f"give it an engine that does: {', '.join(others)}"
            reading.note(f"variants.{name}", f"its engine {engine.name} does not reuse prefixes", hint)
        elif "speculate" in techniques and not engine.serves:
            message = f"its engine {engine.name} does not speculate and reuse prefixes together"
            reading.note(f"variants.{name}", message, "remove one of the steps")


def _check_packing(sections: Sections, reading: Reading, catalogue: Mapping[str, Plugin]) -> None:
    """There is a batch to pack, and an engine that pads it."""
    largest = max((workload.batch for workload in _readable(sections.workloads).values()), default=0)
    for name, variant in _readable(sections.variants).items():
        if all(step.technique != "pack" for step in variant.policies):
            continue
        if not catalogue[variant.engine.plugin].pads:
            others = [plugin.name for plugin in catalogue.values() if plugin.pads]
            message = f"its engine {variant.engine.plugin} makes its own batches, or has them of fixed sizes"
            reading.note(f"variants.{name}", message, f"pack needs one of: {', '.join(others)}")
        elif largest < 2:
            reading.note(f"variants.{name}", "packs batches, and no workload has one", "give a workload a batch: 32")


def check_formats(steps: Sequence[Step], at: str, reading: Reading, catalogue: Mapping[str, Plugin]) -> None:
    """Note a step that cannot read the previous step's output: transforms read safetensors, engines their format."""
    written = SAFETENSORS
    for step in steps:
        plugin = catalogue[step.plugin]
        if step.kind == "transform" and written != SAFETENSORS:
            reading.note(
                at, f"{step.plugin} cannot read the output of the step before it ({written})", "put it earlier"
            )
        elif step.kind == "engine" and written != plugin.format:
            message = f"engine {step.plugin} opens {plugin.format}, and gets {written}"
            reading.note(at, message, _fitting_step(plugin, written, catalogue))
        written = plugin.format


def _fitting_step(engine: Plugin, written: str, catalogue: Mapping[str, Plugin]) -> str:
    """A hint: the engines that open the written format, or the transforms that write this engine's format."""
    if written == SAFETENSORS:
        kind, wanted, written_as = "transform", engine.format, "a step before the engine"
    else:
        kind, wanted, written_as = "engine", written, "{engine: …}"
    fitting = [plugin.name for plugin in catalogue.values() if plugin.kind == kind and plugin.format == wanted]
    return f"{' or '.join(fitting)}, as {written_as}"


def _check_loads(sections: Sections, reading: Reading, catalogue: Mapping[str, Plugin]) -> None:
    """Note a load on an engine that is not a server, and load options without a load."""
    for name, workload in _readable(sections.workloads).items():
        at = f"workloads.{name}"
        if workload.loaded:
            _check_load(workload, at, sections, reading, catalogue)
        elif f"{at}.requests" in reading.lines:
            reading.note(at, "requests is only for a load", "add users or rate, or write measure: {requests: …}")


def _check_load(load: Workload, at: str, sections: Sections, reading: Reading, catalogue: Mapping[str, Plugin]) -> None:
    if load.users and load.rate:
        hint = "keep users for a closed loop, or rate for an open one"
        reading.note(at, "has users and a rate: a load has one of them", hint)
    if load.batch > 1:
        hint = f"write users: {load.batch} and remove batch"
        reading.note(at, "has a batch under load, where the server makes the batches", hint)
    variants = _readable(sections.variants).values()
    unserved = [variant.name for variant in variants if not catalogue[variant.engine.plugin].serves]
    if unserved:
        servers = " or ".join(plugin.name for plugin in catalogue.values() if plugin.serves)
        message = f"a load needs servers, and the engine of {', '.join(unserved)} is not one"
        hint = f"give every variant an engine that serves ({servers}), or leave users and rate out"
        reading.note(at, message, hint)


def _check_minimize(sections: Sections, reading: Reading) -> None:
    metric = sections.minimize
    if metric and not (metric.workload and known_metric(metric).better == "lower"):
        reading.note("minimize", f"{metric.name} is not a time of a workload", "write one, such as latency.p50@chat")


def _check_metrics(sections: Sections, reading: Reading) -> None:
    """Note a metric without its workload, its answers or its task."""
    if sections.minimize:
        _check_metric(sections.minimize, "minimize", sections, reading)
    for number, threshold in enumerate(sections.require or (), 1):
        if threshold:
            _check_metric(threshold.metric, f"require[{number}]", sections, reading)


def _check_metric(metric: Metric, at: str, sections: Sections, reading: Reading) -> None:
    workloads = sections.workloads or {}
    if workloads and metric.workload and metric.workload not in workloads:
        reading.note(at, f"no workload named {show(metric.workload)}", nearest(metric.workload, workloads))
    workload = workloads.get(metric.workload)
    if metric.name == "throughput" and workload and workload.lengths == "natural":
        hint = f"write lengths: fixed in the workload {metric.workload}"
        reading.note(at, "throughput compares only answers of one length", hint)
    if known_metric(metric).unit in _JUDGED_ON_ANSWERS and "quality" not in reading.lines:
        reading.note(at, f"{metric.name} needs checked answers", "add quality: {prompts: …}")
    elif metric.name.startswith(TASK) and sections.quality:
        _check_task(metric.name.removeprefix(TASK), sections.quality.tasks, at, reading)


def _check_task(name: str, tasks: Sequence[str], at: str, reading: Reading) -> None:
    known = [task_name(task) for task in tasks]
    if name not in known:
        hint = nearest(name, known) if known else f"add quality: {{tasks: [{name}]}}"
        reading.note(at, f"no task named {show(name)} in quality.tasks", hint)
