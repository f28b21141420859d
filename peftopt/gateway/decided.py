"""What to serve from a finished run: its model, adapters and engine, and the limits that its users were promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from peftopt import identity, plugins, report, store
from peftopt.errors import BadInput
from peftopt.gateway import held
from peftopt.gateway.limits import Held, Limits
from peftopt.gateway.lines import Origin
from peftopt.policies import OPENED_WITH, opened_with
from peftopt.recipe import plan as planning
from peftopt.records import Decision, Json, Model, Plan, Step, Variant

SERVED_BY = {"llamacpp": "llamacpp_server"}
"""Engines of one process, and the server that runs the same files."""

TIMES = ("latency", "ttft", "tpot")

NO_LIMITS = (
    "while it serves with --limits off: peftopt load URL --prompts FILE --find-rate --slo 'ttft <= 500 ms' "
    "--out found.jsonl, then serve with --limits found.jsonl"
)
"""How to get limits that a run cannot tell."""


@dataclass(frozen=True)
class Decided:
    """`origin`: the variant to serve, with its run and decision, and `chosen`, the variant that the decision chose, ""
    for none; `model` with its unmerged adapters; `name`: the model's name for users, the adapter's; `engine` that
    serves it and its `params`; `measured_on`: the variant's engine in the recipe; `slos_s`: every limit on a time in
    the recipe, in seconds; `held`: the load under which they held, None if the run has none; `draft`: the folder of the
    model that proposes its tokens, "" for none."""

    origin: Origin
    model: Model
    name: str
    engine: str
    params: Mapping[str, Json]
    measured_on: Step
    slos_s: tuple[float, ...]
    held: Held | None = None
    chosen: str = ""
    draft: str = ""

    @property
    def limits(self) -> Limits | None:
        """The limits of the gateway, None if the run gives none."""
        return self.held.limits() if self.held else None


@dataclass(frozen=True)
class Finished:
    """A finished run, and one of its variants."""

    plan: Plan
    decision: Decision
    variant: str


def finished(folder: Path, variant: str = "") -> Finished:
    """A run with its chosen variant, or a named one. Raises BadInput for a folder that is not a finished run, and for a
    run without a chosen variant."""
    file = folder / "decision.json"
    if not file.is_file():
        raise BadInput(f"{folder} is no finished run", "give a folder below results/runs: peftopt run RECIPE makes one")
    decision = report.as_json.decision_from_json(file.read_text(encoding="utf-8"))
    plan = store.read_plan(folder / "plan.json")
    name, known = variant or decision.chosen, ", ".join(plan.recipe.variants)
    if not name:
        raise BadInput(f"{folder.name} chose no variant: {decision.sentence}", f"name one: --variant, of {known}")
    if name not in plan.recipe.variants:
        raise BadInput(f"{folder.name} has no variant {name!r}", f"known: {known}")
    return Finished(plan, decision, name)


def of_run(folder: Path, variant: str = "") -> Decided:
    """The chosen variant of a run, or a named one. Raises BadInput for a folder that is not a finished run, a variant
    that changes its users' requests, and an artifact that is gone or damaged."""
    run = finished(folder, variant)
    plan, name = run.plan, run.variant
    engine = plan.recipe.variants[name].engine
    limits = {
        threshold.limit / 1e3
        for threshold in plan.recipe.require
        if threshold.metric.name.partition(".")[0] in TIMES and not threshold.relative
    }
    return Decided(
        origin=Origin(run=folder.resolve().name, variant=name, decision=identity.of_file(folder / "decision.json")),
        model=_model(folder, plan, name),
        name=Path(plan.recipe.adapter).name,
        engine=SERVED_BY.get(engine.plugin, engine.plugin),
        params=_params(plan, name),
        measured_on=engine,
        slos_s=tuple(sorted(limits)),
        held=_held(folder, run),
        chosen=run.decision.chosen or "",
        draft=_draft(plan.recipe.variants[name]),
    )


_DOES = {"speculation": "proposes tokens", "reuse": "reuses prefixes"}


def _params(plan: Plan, variant: str) -> Mapping[str, Json]:
    """The parameters of its engine, with those by which a server speculates or reuses prefixes where the variant does.
    Raises BadInput for what the gateway does not do in front of it."""
    engine, policies = plan.recipe.variants[variant].engine, plan.recipe.variants[variant].policies
    if changing := [policy.plugin for policy in policies if policy.technique not in OPENED_WITH]:
        what = (
            f"the variant {variant} changes its users' requests ({', '.join(changing)}), and the gateway passes them "
        )
        what += "as they are"
        raise BadInput(what, "name a variant without it (--variant), and let your service change the requests")
    if not (asked := opened_with(policies)):
        return engine.params
    source = plugins.module("engine", engine.plugin)
    if not plugins.catalogue()[engine.plugin].serves:
        does = " and ".join(_DOES[argument] for argument in asked)
        what = f"the variant {variant} {does}, which {engine.plugin} does in a run, and not behind the gateway"
        raise BadInput(what, "name a variant without it (--variant), or one on vllm or llamacpp_server")
    params = source.Params(**engine.params)
    if speculation := asked.get("speculation"):
        params = source.speculating(params, speculation)
    if reuse := asked.get("reuse"):
        params = source.reusing(params, reuse)
    return asdict(params)


def _draft(variant: Variant) -> str:
    speculation = opened_with(variant.policies).get("speculation")
    return str(speculation.draft) if speculation else ""


def _held(folder: Path, run: Finished) -> Held | None:
    """That of a search that was added to the run, else that of the load that the run measured itself."""
    measured = store.read(folder / "measurements.jsonl")
    return held.of_run(run.plan, run.decision, measured, run.variant, f"the run {folder.resolve().name}")


def limits_of_file(path: Path) -> Limits:
    """The limits of the last search in a file of `load --find-rate --out`. Raises BadInput for a file without a
    search."""
    if not path.is_file():
        raise BadInput(f"--limits: there is no file {path}", NO_LIMITS)
    found = held.searched(store.read(path), path.name)
    if found is None:
        what = f"{path} holds no search that found a rate at which a limit on ttft or latency holds"
        raise BadInput(f"--limits: {what}", NO_LIMITS)
    return found.limits()


def _model(folder: Path, plan: Plan, variant: str) -> Model:
    source = Model(plan.recipe.base, (plan.recipe.adapter,))
    if (id_ := plan.models[variant]) == planning.SOURCE:
        return source
    home = store.Store(folder.resolve().parent.parent)
    build = next(build for build in plan.builds if build.id == id_)
    if home.find(build) is None:
        what = f"the model of {variant} is not whole in {home.folder(id_)}"
        hint = f"build it again: peftopt run {plan.recipe.path} --results {home.root}"
        raise BadInput(what, hint)
    return home.model(id_, source)
