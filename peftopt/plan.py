"""Recipe -> Plan: which artifacts to build, shared prefixes once, and which one each variant opens. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from peftopt import identity
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
