"""Recipe -> Plan: which artifacts to build, each shared prefix of chains once, and which each variant opens. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import PurePath

from peftopt import identity
from peftopt.errors import BadInput
from peftopt.records import Build, JsonValue, Measure, Plan, Plugin, Quality, Recipe, Step, Variant, Workload

SOURCE = ""
"""The id of the starting point: the adapter on its base, as the user gave them."""

FOLDER = "folder:"
"""Before the path of a folder that a parameter names: its name among the content hashes of a plan's inputs."""


def plan(recipe: Recipe, sources: Mapping[str, str], versions: Mapping[str, Mapping[str, str]]) -> Plan:
    """The plan of a recipe.

    `sources` holds the content hashes of an artifact's inputs: "base", "adapter" and "calibration" ("" for none), and
    FOLDER with the path of each folder that a parameter names.
    `versions` holds the versions of its libraries, by environment.
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
    """The plan of a recipe whose variants were all measured by other tools. Their files are not known, so the ids of
    artifacts are hashes of their chains alone."""
    return plan(recipe, dict.fromkeys(("base", "adapter", "calibration"), ""), {})


def completed(plan: Plan, catalogue: Mapping[str, Plugin]) -> Plan:
    """The plan of an older peftopt, with the defaults of parameters that are newer than the plan: its variants ran as
    these defaults say."""

    def whole(step: Step) -> Step:
        plugin = catalogue.get(step.plugin)
        return replace(step, params={**vars(plugin.params()), **step.params}) if plugin else step

    def filled(variant: Variant) -> Variant:
        steps, policies = (tuple(map(whole, chain)) for chain in (variant.steps, variant.policies))
        return replace(variant, steps=steps, engine=whole(variant.engine), policies=policies)

    variants = {name: filled(variant) for name, variant in plan.recipe.variants.items()}
    return replace(plan, recipe=replace(plan.recipe, variants=variants))


def rejudged(plan: Plan, recipe: Recipe) -> Plan:
    """The plan with the thresholds of `recipe`, to judge a run again. The recipe may leave out variants: they are not
    judged again. Parents and error rates stay the run's, so leaving one out changes no verdict on the others.

    Raises BadInput for a recipe that needs something the run did not measure.
    """
    old = plan.recipe
    hint = "run the recipe: this needs new measurements"
    for name, variant in recipe.variants.items():
        if name not in old.variants:
            raise BadInput(f"that run did not measure {name}: its variants are {', '.join(old.variants)}", hint)
        if _measured(old.variants[name]) != _measured(variant):
            now = f"{_chain(variant, old.variants[name])}, not {_chain(old.variants[name], variant)}"
            raise BadInput(f"that run did not measure {name} as the recipe has it now: {now}", hint)
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
        price_per_hour=recipe.price_per_hour,
        measure=replace(old.measure, clock=recipe.measure.clock),
    )
    return replace(plan, recipe=judged, left_out=tuple(name for name in old.variants if name not in recipe.variants))


def changes(old: Recipe, new: Recipe) -> list[str]:
    """The thresholds that differ, in words. A limit chosen after the values are known does not test them."""
    steps = [step for variant in old.variants.values() for step in variant.techniques]
    used = {"variant", *(step.plugin for step in steps), *(step.technique for step in steps)}
    limits = [
        {f"{rule.technique}.{rule.name}": rule.limit for rule in recipe.rules if rule.technique in used}
        for recipe in (old, new)
    ]
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


def kept(old: Recipe, new: Recipe) -> list[str]:
    """The settings in which a recipe differs from the run that it judges, and which stay the run's, in words. Paths of
    files are not compared: the measurements alone tell what the files contained."""
    lines = []
    for name in old.workloads.keys() & new.workloads.keys():
        lines += _differ(f"workloads.{name}", old.workloads[name], new.workloads[name])
    if old.quality and new.quality:
        lines += _differ("quality", old.quality, new.quality)
    lines += _differ("measure", replace(old.measure, clock=new.measure.clock), new.measure)
    return sorted(lines)


def _measured(variant: Variant) -> Variant:
    """The variant wherever its folders lie."""
    steps, policies = (tuple(map(by_name, chain)) for chain in (variant.steps, variant.policies))
    return replace(variant, steps=steps, engine=by_name(variant.engine), policies=policies)


def by_name(step: Step) -> Step:
    """The step with the names alone of the folders that its parameters name: a path is one of one machine."""
    params = {key: PurePath(value).name if _is_place(value) else value for key, value in step.params.items()}
    return replace(step, params=params)


def _is_place(value: JsonValue) -> bool:
    return isinstance(value, str) and PurePath(value).is_absolute()


FILES = ("prompts", "schema", "tasks")
"""Settings that name files."""


def _differ(where: str, old: Workload | Quality | Measure, new: Workload | Quality | Measure) -> list[str]:
    was, is_ = asdict(old), asdict(new)
    return [f"{where}.{key} {was[key]}, not {is_[key]}" for key in was if key not in FILES and was[key] != is_[key]]


def _chain(variant: Variant, other: Variant) -> str:
    """The steps of a variant, with the parameters that differ from the other variant's step in the same place."""
    theirs = [*other.steps, *other.policies, other.engine]
    words = []
    for n, step in enumerate([*variant.steps, *variant.policies, variant.engine]):
        same = theirs[n].params if n < len(theirs) and theirs[n].plugin == step.plugin else step.params
        chosen = [f"{key} {value}" for key, value in step.params.items() if key not in same or same[key] != value]
        words.append(f"{step.plugin} ({', '.join(chosen)})" if chosen else step.plugin)
    return " -> ".join(words)


def _shown(limit: float | None) -> str:
    return "off" if limit is None else f"{limit:g}"


def artifact_id(
    step: Step, parent: str, sources: Mapping[str, str], versions: Mapping[str, Mapping[str, str]], seed: int
) -> str:
    """The id of an artifact: the hash of its inputs, its parent, its step, the seed and the library versions. A folder
    that a parameter names counts by its content, wherever it lies."""
    params = {name: sources.get(f"{FOLDER}{value}", value) for name, value in step.params.items()}
    inputs = {
        "step": asdict(replace(step, params=params)),
        "parent": parent or [sources["base"], sources["adapter"]],
        "calibration": sources["calibration"] if step.calibrates else "",
        "seed": seed,
        "versions": dict(versions.get(step.environment, {})),
    }
    return identity.of_value(inputs)
