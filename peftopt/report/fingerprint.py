"""Facts on a run's inputs and machine, as topics of names and texts, for the comparison of runs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath

from peftopt import identity
from peftopt.decision.comparing import Facts
from peftopt.measurements import Answer, Built, EngineFacts, Launch, Measured
from peftopt.metrics import counted
from peftopt.recipe.plan import by_name
from peftopt.records import Decision, JsonValue, Plan, Recipe, Step, Variant
from peftopt.report.words import flat

HASH = 12
"""Digits of a hash in a report."""

VARIANT = "variant "
"""The prefix of a variant's topic."""

Topic = dict[str, str]


def facts(decision: Decision, plan: Plan | None, records: Sequence[Measured], hashes: Mapping[str, JsonValue]) -> Facts:
    """The facts on a run: from its machine and decision, and from its plan, its measurements and the hashes of its
    files, if there are any."""
    topics = {**_machine(decision.machine), "decision": _decision(decision)}
    if hashes:
        topics["contents"] = dict(_contents(hashes))
    if plan:
        topics |= {
            "model": _model(plan.recipe, records),
            "prompts": _prompts(plan.recipe, records),
            "recipe": _recipe(plan.recipe),
            **{VARIANT + v.name: _variant(plan, v, records) for v in plan.recipe.variants.values()},
        }
    return {topic: {name: text for name, text in known.items() if text} for topic, known in topics.items()}


def _machine(machine: Mapping[str, object]) -> dict[str, Topic]:
    """The machine and its packages; empty if the machine is not known."""
    if not machine:
        return {}
    rest = {name: flat(value) or "none" for name, value in machine.items() if name not in ("python", "versions")}
    versions = machine.get("versions")
    packages = {str(name): str(version) for name, version in versions.items()} if isinstance(versions, Mapping) else {}
    return {"machine": rest, "packages": {"python": flat(machine.get("python")), **packages}}


def _contents(hashes: Mapping[str, JsonValue]) -> Iterator[tuple[str, str]]:
    """The first digits of each hash; of a workload's under its name."""
    for name, value in hashes.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", text) for inner, text in _contents(value))
        else:
            yield name, str(value)[:HASH] or "none"


def _decision(decision: Decision) -> Topic:
    return {"baseline": decision.baseline, "minimize": decision.minimize, "clock": decision.clock}


def _model(recipe: Recipe, records: Sequence[Measured]) -> Topic:
    """Folders by name, since paths are those of one machine."""
    source = next((r.values for r in records if isinstance(r.values, Built) and not r.values.id), None)
    return {
        "base": PurePath(recipe.base).name,
        "adapter": PurePath(recipe.adapter).name,
        "base and adapter": f"{source.size_bytes:,} bytes" if source else "",
        "calibration": PurePath(recipe.calibration).name if recipe.calibration else "none",
    }


def _prompts(recipe: Recipe, records: Sequence[Measured]) -> Topic:
    files = {f"of {name}": PurePath(each.prompts).name for name, each in recipe.workloads.items()}
    if recipe.quality:
        files["of answers"] = PurePath(recipe.quality.prompts).name
    mine = [r.values for r in records if r.variant == recipe.baseline and r.launch != 2]
    asked = sorted((a.row, a.prompt) for a in mine if isinstance(a, Answer))
    return files | {"answered": f"{counted(len(asked), 'prompt')}, {_hash(asked)}" if asked else ""}


def _hash(rows: Sequence[tuple[str, str]]) -> str:
    return identity.of_value([list(row) for row in rows])[:HASH]


def _recipe(recipe: Recipe) -> Topic:
    """All settings for measuring and judging, without the variants and the files."""
    rules = {f"{rule.technique}.{rule.name}": _text(rule.limit) for rule in recipe.rules}
    quality = _settings("quality", asdict(recipe.quality)) if recipe.quality else {"quality": "none"}
    workloads = [_settings(name, asdict(each)) for name, each in recipe.workloads.items()]
    return {
        "require": "; ".join(threshold.text for threshold in recipe.require) or "nothing",
        **{name: text for each in workloads for name, text in each.items()},
        **quality,
        **_settings("measure", asdict(recipe.measure)),
        **rules,
        "seed": str(recipe.seed),
    }


def _settings(section: str, values: Mapping[str, object]) -> Topic:
    left_out = ("name", "prompts")
    named = {**values, "schema": PurePath(str(values["schema"])).name} if values.get("schema") else values
    return {f"{section}.{name}": _text(value) for name, value in named.items() if name not in left_out}


def _text(value: object) -> str:
    return "off" if value is None else flat(value) or "none"


def _variant(plan: Plan, variant: Variant, records: Sequence[Measured]) -> Topic:
    """The steps of a variant, and its engine's own facts."""
    steps = [*variant.steps, variant.engine, *variant.policies]
    artifact = plan.models.get(variant.name, "")
    built = next((r.values for r in records if isinstance(r.values, Built) and r.values.id == artifact), None)
    launches = [r.values for r in records if isinstance(r.values, Launch) and r.variant == variant.name]
    return {
        "chain": " → ".join(step.plugin for step in steps),
        **{name: text for step in steps for name, text in _params(step)},
        "artifact": artifact[:HASH],
        "built with": built.quantization.partition(";")[0] if built else "",
        "engine": ", ".join(dict.fromkeys(_engines(variant.name, records))),
        "device": _distinct(launch.device for launch in launches),
        "threads": _distinct(launch.threads for launch in launches),
    }


def _params(step: Step) -> Iterator[tuple[str, str]]:
    for name, value in by_name(step).params.items():
        yield f"{step.plugin}.{name}", _text(value)


READY = ": ready after"
"""The text after the name and the version of a server in its log."""


def _engines(variant: str, records: Sequence[Measured]) -> Iterator[str]:
    for record in records:
        if isinstance(record.values, EngineFacts) and record.variant == variant:
            yield from (line.partition(READY)[0] for line in record.values.log if READY in line)


def _distinct(values: Iterator[str | int | None]) -> str:
    return ", ".join(sorted({str(value) for value in values if value not in (None, "")}))
