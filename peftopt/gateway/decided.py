"""What a finished run says to serve: its model, its adapters, its engine, and the limits that users were promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peftopt import report, store
from peftopt.errors import BadInput
from peftopt.recipe import plan as planning
from peftopt.records import Json, Model, Plan

SERVED_BY = {"llamacpp": "llamacpp_server"}
"""Engines of one process, and the server that runs the same files."""

TIMES = ("latency", "ttft", "tpot")


@dataclass(frozen=True)
class Decided:
    """`variant` to serve; `model` with the adapters that stay apart; `name` that users know it by, the adapter's;
    `engine` and its `params`; `slos_s`: every limit on a time in the recipe, in seconds."""

    variant: str
    model: Model
    name: str
    engine: str
    params: Mapping[str, Json]
    slos_s: tuple[float, ...]


def of_run(folder: Path, variant: str = "") -> Decided:
    """The chosen variant of a run, or another one that is named. Raises BadInput for a folder that is no finished run,
    a run that chose nothing, and an artifact that is gone or damaged."""
    if not (folder / "decision.json").is_file():
        raise BadInput(f"{folder} is no finished run", "give a folder below results/runs: peftopt run RECIPE makes one")
    decision = report.as_json.decision_from_json((folder / "decision.json").read_text(encoding="utf-8"))
    plan = store.read_plan(folder / "plan.json")
    name = variant or decision.chosen
    if not name:
        known = ", ".join(plan.recipe.variants)
        raise BadInput(f"{folder.name} chose no variant: {decision.sentence}", f"name one: --variant, of {known}")
    if name not in plan.recipe.variants:
        raise BadInput(f"{folder.name} has no variant {name!r}", f"known: {', '.join(plan.recipe.variants)}")
    engine = plan.recipe.variants[name].engine
    limits = {
        threshold.limit / 1e3
        for threshold in plan.recipe.require
        if threshold.metric.name.partition(".")[0] in TIMES and not threshold.relative
    }
    return Decided(
        variant=name,
        model=_model(folder, plan, name),
        name=Path(plan.recipe.adapter).name,
        engine=SERVED_BY.get(engine.plugin, engine.plugin),
        params=engine.params,
        slos_s=tuple(sorted(limits)),
    )


def _model(folder: Path, plan: Plan, variant: str) -> Model:
    if (id_ := plan.models[variant]) == planning.SOURCE:
        return Model(plan.recipe.base, (plan.recipe.adapter,))
    home = store.Store(folder.resolve().parent.parent)
    build = next(build for build in plan.builds if build.id == id_)
    artifact = home.find(build)
    if artifact is None:
        raise BadInput(f"the model of {variant} is not in {home.folder(id_)}", "run the recipe again: it builds it")
    return artifact.model
