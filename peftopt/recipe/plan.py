"""Recipe -> Plan: which artifacts to build, shared prefixes once, and which one each variant opens. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from peftopt import identity
from peftopt.errors import BadInput
from peftopt.records import Build, Plan, Recipe, Step

SOURCE = ""
"""The id of the starting point: the adapter on its base, as the user gave them."""


def plan(recipe: Recipe, sources: Mapping[str, str], versions: Mapping[str, Mapping[str, str]]) -> Plan:
    """The plan of a recipe.

    `sources` holds the content hashes of what shapes an artifact: "base", "adapter" and "calibration" ("" when
    there is none); `versions` those of the libraries that do, by environment.
    """
    builds: dict[str, Build] = {}
    models = {}
    for variant in recipe.variants.values():
        parent = SOURCE
        for step in variant.steps:
            build = Build(artifact_id(step, parent, sources, versions, recipe.seed), parent, step)
            builds.setdefault(build.id, build)
            parent = build.id
        models[variant.name] = parent
    return Plan(recipe, tuple(builds.values()), models)


def elsewhere(recipe: Recipe) -> Plan:
    """The plan of a recipe whose variants were all measured by other tools: nothing is known of what they are made of,
    so artifacts are named by their chains alone."""
    return plan(recipe, dict.fromkeys(("base", "adapter", "calibration"), ""), {})


def rejudged(plan: Plan, recipe: Recipe) -> Plan:
    """The plan with the thresholds of `recipe`, over what was measured. Variants may be left out: they are not judged
    again, but parents and error rates stay those of the run, or leaving one out would change verdicts on the others.

    Raises BadInput for a recipe that asks for what the plan's run did not measure.
    """
    old = plan.recipe
    hint = "run the recipe: this takes measuring"
    for name, variant in recipe.variants.items():
        if old.variants.get(name) != variant:
            raise BadInput(f"that run did not measure {name} as the recipe has it now", hint)
    if recipe.baseline != old.baseline:
        raise BadInput(f"that run was measured against {old.baseline}, not {recipe.baseline}", hint)
    for metric in (recipe.minimize, *(threshold.metric for threshold in recipe.require)):
        if metric.workload and recipe.workloads[metric.workload].name not in old.workloads:
            raise BadInput(f"that run did not measure {metric}", hint)
    judged = replace(
        old,
        rules=recipe.rules,
        require=recipe.require,
        minimize=recipe.minimize,
        measure=replace(old.measure, clock=recipe.measure.clock),
    )
    return replace(plan, recipe=judged, left_out=tuple(name for name in old.variants if name not in recipe.variants))


def changes(old: Recipe, new: Recipe) -> list[str]:
    """Which thresholds differ, in words: a limit that was chosen after the values were known does not test them."""
    limits = [{f"{r.technique}.{r.name}": r.limit for r in recipe.rules} for recipe in (old, new)]
    lines = [
        f"{name} {_shown(limits[0].get(name))} -> {_shown(limits[1].get(name))}"
        for name in sorted(limits[0].keys() | limits[1].keys())
        if limits[0].get(name) != limits[1].get(name)
    ]
    texts = [{t.text for t in recipe.require} for recipe in (old, new)]
    lines += [f"no longer {text}" for text in sorted(texts[0] - texts[1])]
    lines += [f"now {text}" for text in sorted(texts[1] - texts[0])]
    lines += [f"leaves out {name}" for name in old.variants if name not in new.variants]
    others = (("minimize", old.minimize, new.minimize), ("clock", old.measure.clock, new.measure.clock))
    return lines + [f"{name} {was} -> {is_}" for name, was, is_ in others if was != is_]


def _shown(limit: float | None) -> str:
    return "off" if limit is None else f"{limit:g}"


def artifact_id(
    step: Step, parent: str, sources: Mapping[str, str], versions: Mapping[str, Mapping[str, str]], seed: int
) -> str:
    """An artifact is the hash of its inputs: the chain behind it, its step, and what shapes the output."""
    inputs = {
        "step": asdict(step),
        "parent": parent or [sources["base"], sources["adapter"]],
        "calibration": sources["calibration"] if step.calibrates else "",
        "seed": seed,
        "versions": dict(versions.get(step.environment, {})),
    }
    return identity.of_value(inputs)
