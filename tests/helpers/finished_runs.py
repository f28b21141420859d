"""A finished run's folder, as `peftopt run` leaves it: a merged model that was built, and times that chose it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from helpers.records import EAGER, RULES, decide, quality
from peftopt import plugins, report, store
from peftopt.recipe import plan as planning
from peftopt.recipe.thresholds import parse
from peftopt.records import (
    TWIN,
    Measure,
    Measurement,
    Metric,
    Model,
    Plan,
    Quality,
    Recipe,
    Step,
    Variant,
    Workload,
)

USERS, BLOCKS, REQUESTS = 4, 40, 8
FIRST_MS, WHOLE_MS = 100.0, 400.0
"""Of the adapter's requests under load; the merged model takes half of each."""

CERTIFIED = Step("merge", "transform", "merge", {"certify": "blocks"})
CAP = Step("cap", "policy", "shorten", {"max_new_tokens": 8})


def finished_run(
    results: Path,
    base: Path,
    lora: Path,
    ratio: float = 0.5,
    require: tuple[str, ...] = (),
    built: bool = True,
    quantizer: Step | None = None,
    device: str = "cpu",
) -> Path:
    """A run that found the merged model to take `ratio` of the adapter's time, alone and with four users at once; with
    a `quantizer`, the merged model that this has rounded."""
    plan = _plan(base, lora, require, quantizer)
    if built:
        _build(store.Store(results), plan, Model(str(base), (str(lora),)))
    measured = [*_launches(plan, device), *_measured(plan, ratio)]
    folder = results / "runs" / "20261128T120000-tiny"
    folder.mkdir(parents=True)
    store.append(folder / "measurements.jsonl", *measured)
    store.write(folder / "plan.json", json.dumps(asdict(plan)))
    store.write(folder / "decision.json", report.as_json.render(decide(plan, measured, {})))
    return folder


def on_engine(run: Path, engine: Step) -> Path:
    """A copy of a run, beside it, whose variants were measured on another engine."""
    folder = run.with_name(f"{run.name}-{engine.plugin}")
    shutil.copytree(run, folder)
    plan = json.loads((folder / "plan.json").read_text())
    for variant in plan["recipe"]["variants"].values():
        variant["engine"] = asdict(engine)
    store.write(folder / "plan.json", json.dumps(plan))
    return folder


def _build(home: store.Store, plan: Plan, source: Model) -> None:
    for build in plan.builds:
        with home.locked(build):
            home.build(build, partial(_made, build.step, home.model(build.parent, source)))


def _made(step: Step, source: Model, out: Path) -> tuple[Model, Mapping[str, Any]]:
    transform = plugins.module("transform", step.plugin)
    return transform.transform(source, transform.Params(**step.params), out, [], 0), {"seconds": 1.0}


def _plan(base: Path, lora: Path, require: tuple[str, ...], quantizer: Step | None) -> Plan:
    steps = (CERTIFIED, quantizer) if quantizer else (CERTIFIED,)
    recipe = Recipe(
        name="tiny",
        path=str(base.parent / "tiny.yaml"),
        base=str(base),
        adapter=str(lora),
        variants={
            "adapter": Variant("adapter", (), EAGER),
            "merged": Variant("merged", steps, EAGER),
            "capped": Variant("capped", (), EAGER, (CAP,)),
        },
        baseline="adapter",
        workloads={
            "chat": Workload("chat", "p.jsonl"),
            "peak": Workload("peak", "p.jsonl", users=USERS, requests=REQUESTS),
        },
        quality=Quality("p.jsonl"),
        calibration=None,
        rules=RULES,
        require=tuple(map(parse, require)),
        minimize=Metric("latency.p50", "chat"),
        measure=Measure(),
    )
    return planning.plan(recipe, {"base": "b", "adapter": "a", "calibration": ""}, {})


def _launches(plan: Plan, device: str) -> list[Measurement]:
    values = {"model_loading_time": 1.0, "threads": 2, "device": device}
    return [Measurement("launch", name, values=values) for name in plan.recipe.variants]


def _measured(plan: Plan, ratio: float) -> list[Measurement]:
    found = [Measurement("build", "", values={"id": "", "size_bytes": 270, "tier0": []})]
    found += [Measurement("build", "", values={"id": b.id, "size_bytes": 270, "tier0": []}) for b in plan.builds]
    for name, times in {"adapter": 1.0, "adapter" + TWIN: 1.0, "merged": ratio}.items():
        for workload in plan.recipe.workloads.values():
            for block in range(BLOCKS):
                found.append(_turn(name, workload, block, times * (1 + 0.01 * (block % 3))))
    return found + quality("adapter") + quality("adapter", launch=2) + quality("merged")


def _turn(name: str, workload: Workload, block: int, times: float) -> Measurement:
    n = workload.requests if workload.loaded else 1
    whole = WHOLE_MS * times
    request = {"request_duration_ms": whole, "ttft_ms": FIRST_MS * times, "tpot_ms": whole / 64, "cpu_ms": whole}
    request |= {"new_tokens": 64, "warmup": False, "prompt_tokens": 50}
    if workload.loaded:
        request |= {"turn_ms": whole * n / USERS}
    return Measurement("speed", name, workload.name, 1, {"block": block, "requests": [request] * n})
