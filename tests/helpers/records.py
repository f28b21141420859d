"""Records as a run leaves them, with nothing wrong but what is asked for, and what was decided of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from peftopt import corpus
from peftopt.decision import decide as judging
from peftopt.decision.evidence import Evidence
from peftopt.measurements import measured
from peftopt.recipe import plan as planning
from peftopt.recipe.thresholds import parse
from peftopt.records import (
    TWIN,
    Decision,
    Json,
    Measure,
    Measurement,
    Metric,
    Plan,
    Quality,
    Recipe,
    Rule,
    Step,
    Variant,
    VariantDecision,
    Verdict,
    Workload,
)

EAGER, COMPILED = Step("eager", "engine", ""), Step("compiled", "engine", "compile")
MERGE, INT8 = Step("merge", "transform", "merge"), Step("int8", "transform", "quantize")
BAKE = Step("bake", "transform", "bake")
SPECULATE = Step("speculate", "policy", "speculate", {"tokens": 4, "ngram": 3, "shortest": 1, "answers": False})
PREFIX = Step("prefix", "policy", "prefix", {"block": 32, "memory_gb": 1.0})
PACK = Step("pack", "policy", "pack", {"tokens": 4096})
CHAINS: Mapping[str, Variant] = {
    "adapter": Variant("adapter", (), EAGER),
    "merged": Variant("merged", (MERGE,), EAGER),
    "int8": Variant("int8", (MERGE, INT8), EAGER),
    "apart": Variant("apart", (INT8,), EAGER),
    "compiled": Variant("compiled", (MERGE,), COMPILED),
    "int8_compiled": Variant("int8_compiled", (MERGE, INT8), COMPILED),
    "speculating": Variant("speculating", (MERGE,), COMPILED, (SPECULATE,)),
    "reusing": Variant("reusing", (MERGE,), COMPILED, (PREFIX,)),
    "packed": Variant("packed", (MERGE,), EAGER, (PACK,)),
    "baked": Variant("baked", (BAKE,), EAGER),
    "int8_baked": Variant("int8_baked", (INT8, BAKE), EAGER),
    "baked_compiled": Variant("baked_compiled", (BAKE,), COMPILED),
}
RULES = (
    Rule("merge", "gain", 0.15),
    Rule("merge", "parity", 0.01),
    Rule("bake", "gain", 0.0),
    Rule("bake", "parity", 0.01),
    Rule("bake", "lost", 0.05),
    Rule("bake", "critical_errors", 0.05),
    Rule("int8", "critical_errors", 0.01),
    Rule("int8", "not_slower", 0.02),
    Rule("int8", "smaller", None),
    Rule("compile", "gain", 0.0),
    Rule("compile", "parity", 0.01),
    Rule("speculate", "gain", 0.05),
    Rule("speculate", "parity", 0.01),
    Rule("speculate", "critical_errors", 0.05),
    Rule("prefix", "gain", 0.05),
    Rule("prefix", "parity", 0.01),
    Rule("prefix", "critical_errors", 0.05),
    Rule("pack", "gain", 0.05),
)


def plan_of(*names: str, require: Iterable[str] = (), **measure: Json) -> Plan:
    recipe = Recipe(
        name="test",
        path="test.yaml",
        base="base",
        adapter="adapter",
        variants={name: CHAINS[name] for name in ("adapter", *names)},
        baseline="adapter",
        workloads={"chat": Workload("chat", "p.jsonl"), "bulk": Workload("bulk", "p.jsonl", batch=8)},
        quality=Quality("p.jsonl", schema="schema.json"),
        calibration=None,
        rules=RULES,
        require=tuple(parse(text) for text in require),
        minimize=Metric("latency.p50", "chat"),
        measure=Measure(**{"max_blocks": 60, **measure}),
    )
    return planning.plan(recipe, {"base": "b", "adapter": "a", "calibration": ""}, {})


def speed(plan: Plan, ratios: Mapping[str, float], blocks: int = 40, noise: float = 0.01) -> list[Measurement]:
    """Blocks in which each variant takes `ratio` times the adapter's 100 ms, and drift that hits all alike."""
    dice = random.Random(7)
    found = []
    for block in range(blocks):
        drift = dice.uniform(0.5, 2.0)
        for name, ratio in {"adapter": 1.0, "adapter" + TWIN: 1.0, **ratios}.items():
            ms = 100 * ratio * drift * (1 + dice.gauss(0, noise))
            request = {"request_duration_ms": ms, "ttft_ms": ms / 4, "tpot_ms": ms / 16, "cpu_ms": ms}
            request |= {"new_tokens": 16, "warmup": False}
            warm = {**request, "request_duration_ms": 9999.0, "warmup": True}
            found.append(Measurement("speed", name, "chat", 1, {"block": block, "requests": [warm, request]}))
    return found


def quality(name: str, n: int = 400, launch: int = 1, **changes: Mapping[str, Json]) -> list[Measurement]:
    """`n` right answers; `changes` are of single prompts by id, such as p3={"correct": False}."""
    found = []
    for number in range(n):
        row = f"p{number}"
        values = {"row": row, "critical": number < 40, "correct": True, "valid": True, "score": 1.0, "flags": []}
        values |= {"tokens": list(range(30)), "stopped": True, "new_tokens": 31, "output": "{}", "expected": "{}"}
        values |= {"nll": 1.0, "scored_tokens": 31, "kl": 0.001, "agree": 31, "slices": []}
        found.append(Measurement("quality", name, "", launch, {**values, **changes.get(row, {})}))
    return found


def builds(plan: Plan, tier0: Iterable[str] = ()) -> list[Measurement]:
    source = {"id": "", "size_bytes": 270, "tier0": []}
    made = [{"id": b.id, "size_bytes": 160, "tier0": list(tier0)} for b in plan.builds]
    return [Measurement("build", "", values=values) for values in (source, *made)]


def whole(plan: Plan, ratios: Mapping[str, float], **rest: Json) -> list[Measurement]:
    """Everything a run leaves, with nothing wrong but what the arguments say."""
    answers = quality("adapter") + quality("adapter", launch=2)
    for name in ratios:
        answers += quality(name)
    return builds(plan) + speed(plan, ratios, **rest) + answers


def evidence_of(plan: Plan, found: Sequence[Measurement]) -> Evidence:
    """What a run of these lines would know, each read as a line of its file is."""
    return Evidence(plan, [measured(each) for each in found])


def lines_of(path: Path) -> list[Measurement]:
    """The lines of a file of measurements, with their values as they stand there."""
    return [Measurement(**{k: v for k, v in line.items() if k != "format"}) for line in _json_lines(path)]


def _json_lines(path: Path) -> list[dict[str, Json]]:
    return [json.loads(line) for _, line in corpus.lines(corpus.text_of(path.read_bytes()))]


def decide(plan: Plan, found: Sequence[Measurement], machine: Mapping[str, Json]) -> Decision:
    return judging.decide(evidence_of(plan, found), machine)


def of(decision: Decision, name: str) -> VariantDecision:
    return next(v for v in decision.variants if v.name == name)


def outcome(decision: Decision, name: str, rule: str) -> str:
    return next(v.outcome for v in of(decision, name).verdicts if v.rule == rule)


def verdict(decision: Decision, name: str, rule: str) -> Verdict:
    return next(v for v in of(decision, name).verdicts if v.rule == rule)
