"""What the rules make of measurements: three outcomes, the rule that decided, and never a pass by silence."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest

from peftopt import plan as planning
from peftopt.decide import decide
from peftopt.evidence import TWIN, Evidence
from peftopt.need import answers as answers_needed
from peftopt.need import blocks as blocks_needed
from peftopt.need import hopeless
from peftopt.records import (
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
    Workload,
)
from peftopt.render import table
from peftopt.rules import parent_of
from peftopt.thresholds import parse

EAGER, COMPILED = Step("eager", "engine", ""), Step("compiled", "engine", "compile")
MERGE, INT8 = Step("merge", "transform", "merge"), Step("int8", "transform", "quantize")
CHAINS: Mapping[str, Variant] = {
    "adapter": Variant("adapter", (), EAGER),
    "merged": Variant("merged", (MERGE,), EAGER),
    "int8": Variant("int8", (MERGE, INT8), EAGER),
    "compiled": Variant("compiled", (MERGE,), COMPILED),
    "int8_compiled": Variant("int8_compiled", (MERGE, INT8), COMPILED),
}
RULES = (
    Rule("merge", "gain", 0.15),
    Rule("merge", "parity", 0.01),
    Rule("int8", "critical_errors", 0.01),
    Rule("int8", "not_slower", 0.02),
    Rule("int8", "smaller", None),
    Rule("compile", "gain", 0.0),
    Rule("compile", "parity", 0.01),
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
        quality=Quality("p.jsonl"),
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


def of(decision: Decision, name: str) -> VariantDecision:
    return next(v for v in decision.variants if v.name == name)


def outcome(decision: Decision, name: str, rule: str) -> str:
    return next(v.outcome for v in of(decision, name).verdicts if v.rule == rule)


@pytest.mark.parametrize(("ratio", "expected"), [(0.80, "accepted"), (0.90, "rejected"), (0.85, "inconclusive")])
def test_a_merge_is_accepted_only_for_more_than_15_percent(ratio: float, expected: str) -> None:
    plan = plan_of("merged")
    decision = decide(plan, whole(plan, {"merged": ratio}), {})
    assert outcome(decision, "merged", "merge.gain") == expected
    assert decision.outcome == expected
    assert (decision.chosen == "merged") == (expected == "accepted")
    assert of(decision, "merged").decided_by == "merge.gain"


def test_the_sentence_names_the_choice_and_its_rule() -> None:
    plan = plan_of("merged")
    accepted = decide(plan, whole(plan, {"merged": 0.7}), {})
    assert "Ship merged" in accepted.sentence and "30 % lower".replace(" %", "%") in accepted.sentence
    assert "merge.gain" in accepted.sentence
    kept = decide(plan, whole(plan, {"merged": 1.2}), {})
    assert kept.sentence.startswith("Keep the adapter as served") and "merge.gain" in kept.sentence


def test_a_merge_that_is_another_model_is_rejected_by_parity() -> None:
    plan = plan_of("merged")
    changed = {f"p{n}": {"tokens": [9, *range(1, 30)]} for n in range(0, 400, 2)}
    measurements = whole(plan, {}) + speed(plan, {"merged": 0.5}) + quality("merged", **changed)
    decision = decide(plan, measurements, {})
    assert outcome(decision, "merged", "merge.parity") == "rejected"
    assert decision.outcome == "rejected"


def test_what_the_adapter_itself_changes_from_run_to_run_does_not_count_against_a_merge() -> None:
    plan = plan_of("merged")
    changed = {f"p{n}": {"tokens": [9, *range(1, 30)]} for n in range(0, 400, 2)}
    null = quality("adapter") + quality("adapter", launch=2, **changed)
    decision = decide(plan, builds(plan) + speed(plan, {"merged": 0.5}) + null + quality("merged", **changed), {})
    assert outcome(decision, "merged", "merge.parity") == "accepted"


def test_one_critical_prompt_gone_wrong_rejects_int8() -> None:
    plan = plan_of("merged", "int8")
    measurements = whole(plan, {"merged": 0.7}) + speed(plan, {"int8": 0.5})
    decision = decide(plan, measurements + quality("int8", p3={"correct": False}), {})
    assert outcome(decision, "int8", "int8.critical_errors") == "rejected"
    assert "p3" in next(v.reason for v in of(decision, "int8").verdicts if v.rule == "int8.critical_errors")
    assert decision.chosen == "merged"


def test_a_wrong_answer_to_a_plain_prompt_is_degradation_not_a_critical_error() -> None:
    plan = plan_of("int8")
    measurements = whole(plan, {}) + speed(plan, {"int8": 0.5}) + quality("int8", p300={"correct": False})
    decision = decide(plan, measurements, {})
    assert outcome(decision, "int8", "int8.critical_errors") == "accepted"


def test_an_error_that_the_adapter_makes_too_is_not_the_variants() -> None:
    plan = plan_of("int8")
    flaw = {"p300": {"flags": ["invalid output"], "valid": False}}
    for launch in (1, 2):
        base = quality("adapter", launch=launch, **flaw) + quality("adapter", launch=3 - launch)
        decision = decide(plan, builds(plan) + speed(plan, {"int8": 0.5}) + base + quality("int8", **flaw), {})
        assert outcome(decision, "int8", "int8.critical_errors") == "accepted"


@pytest.mark.parametrize(("n", "expected"), [(298, "inconclusive"), (299, "accepted")])
def test_no_critical_errors_is_a_claim_that_needs_its_n(n: int, expected: str) -> None:
    plan = plan_of("int8")
    answers = quality("adapter") + quality("adapter", launch=2) + quality("int8", n)
    decision = decide(plan, builds(plan) + speed(plan, {"int8": 0.5}) + answers, {})
    assert outcome(decision, "int8", "int8.critical_errors") == expected


def test_int8_is_compared_with_the_same_variant_without_int8() -> None:
    plan = plan_of("merged", "int8", "compiled", "int8_compiled")
    variants = plan.recipe.variants
    assert parent_of(plan.recipe, variants["int8"], INT8) == "merged"
    assert parent_of(plan.recipe, variants["int8_compiled"], INT8) == "compiled"
    assert parent_of(plan.recipe, variants["int8_compiled"], COMPILED) == "int8"
    assert parent_of(plan.recipe, variants["merged"], MERGE) == "adapter"


def test_int8_that_is_slower_than_bf16_is_rejected_and_the_report_says_so() -> None:
    plan = plan_of("merged", "int8")
    decision = decide(plan, whole(plan, {"merged": 0.7, "int8": 1.3}), {})
    assert outcome(decision, "int8", "int8.not_slower") == "rejected"
    assert any("slower than adapter" in note for note in of(decision, "int8").notes)


def test_int8_declared_a_memory_win_may_be_slower_than_its_parent() -> None:
    plan = plan_of("merged", "int8")
    rules = [Rule("int8", "not_slower", None), Rule("int8", "smaller", 0.25), Rule("int8", "critical_errors", 0.01)]
    plan = replace(plan, recipe=replace(plan.recipe, rules=tuple(rules)))
    measurements = whole(plan, {"merged": 0.7, "int8": 1.3})
    assert outcome(decide(plan, measurements, {}), "int8", "int8.smaller") == "rejected"  # same size as merged
    sizes = {b.id: 100 if b.step == INT8 else 260 for b in plan.builds}
    smaller = [Measurement("build", "", values={"id": i, "size_bytes": s, "tier0": []}) for i, s in sizes.items()]
    decision = decide(plan, measurements + smaller, {})
    assert outcome(decision, "int8", "int8.smaller") == "accepted"
    assert of(decision, "int8").outcome == "accepted"


def test_weights_that_are_not_finite_reject_whatever_the_figures_say() -> None:
    plan = plan_of("merged")
    measurements = whole(plan, {"merged": 0.5}) + builds(plan, ["model.safetensors: w holds NaN"])
    decision = decide(plan, measurements, {})
    assert of(decision, "merged").decided_by == "artifact.intact"
    assert decision.outcome == "rejected"


def test_a_failing_a_a_arm_withholds_every_accept() -> None:
    plan = plan_of("merged")
    measurements = [m for m in whole(plan, {"merged": 0.5}) if m.variant != "adapter" + TWIN]
    twin = [replace(m, variant="adapter" + TWIN) for m in speed(plan, {"merged": 1.2}) if m.variant == "merged"]
    decision = decide(plan, measurements + twin, {})
    assert decision.outcome == "inconclusive" and decision.chosen is None
    assert any("A/A" in warning for warning in decision.warnings)


def test_a_variant_that_died_is_rejected_with_its_reason_and_the_others_are_judged() -> None:
    plan = plan_of("merged", "int8")
    died = {"stage": "speed (chat)", "reason": "killed (SIGKILL)", "detail": "too little memory", "hint": ""}
    measurements = [*whole(plan, {"merged": 0.7}), Measurement("failure", "int8", values=died)]
    decision = decide(plan, measurements, {})
    assert of(decision, "int8").outcome == "rejected"
    assert "SIGKILL" in of(decision, "int8").verdicts[0].reason
    assert decision.chosen == "merged"


def test_a_missing_library_is_not_judged_and_never_passes() -> None:
    plan = plan_of("int8")
    skipped = {"stage": "build", "reason": "missing library", "detail": "torchao", "hint": "pip install torchao"}
    decision = decide(plan, [*whole(plan, {}), Measurement("failure", "int8", values=skipped)], {})
    assert decision.outcome == "not judged" and decision.chosen is None


def test_nothing_measured_is_not_accepted() -> None:
    plan = plan_of("merged")
    decision = decide(plan, [], {})
    assert decision.outcome == "inconclusive" and decision.chosen is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("latency.p50@chat <= 0.8x", "accepted"),
        ("latency.p50@chat <= 0.5x", "rejected"),
        ("latency.p50@chat <= 1000 ms", "accepted"),
        ("latency.p50@chat <= 1 ms", "rejected"),
        ("latency.p95@chat <= 1000 ms", "inconclusive"),
        ("throughput@chat >= 1.2x", "accepted"),
        ("accuracy >= 90 %", "accepted"),
        ("perplexity <= 1.02x", "accepted"),
        ("size <= 1 KB", "accepted"),
        ("size <= 0.1x", "rejected"),
        ("load_time <= 5 s", "inconclusive"),
    ],
)
def test_requirements_are_judged_on_the_whole_variant(text: str, expected: str) -> None:
    plan = plan_of("merged", require=[text])
    decision = decide(plan, whole(plan, {"merged": 0.7}), {})
    assert outcome(decision, "merged", f"require: {text}") == expected


def test_the_fastest_accepted_variant_is_chosen() -> None:
    plan = plan_of("merged", "compiled")
    decision = decide(plan, whole(plan, {"merged": 0.7, "compiled": 0.5}), {})
    assert decision.chosen == "compiled"


def test_the_race_ends_for_a_decided_variant_and_goes_on_for_an_open_one_with_its_reference() -> None:
    plan = plan_of("merged", "compiled")
    answers = builds(plan) + [m for name in ("adapter", "merged", "compiled") for m in quality(name)]
    answers += quality("adapter", launch=2)

    def racing(ratios: Mapping[str, float], blocks: int) -> frozenset[str]:
        return blocks_needed(Evidence(plan, answers + speed(plan, ratios, blocks)), "chat")

    assert racing({"merged": 0.5, "compiled": 0.3}, 9) == {"adapter", "merged", "compiled"}
    assert racing({"merged": 0.5, "compiled": 0.3}, 16) == frozenset()
    assert racing({"merged": 0.5, "compiled": 0.4999}, 16) == {"adapter", "merged", "compiled"}
    assert racing({"merged": 1.0, "compiled": 1.1}, 16) == frozenset()
    assert racing({"merged": 0.5, "compiled": 0.4999}, 60) == frozenset()


def test_a_workload_that_decides_nothing_gets_the_fewest_blocks() -> None:
    plan = plan_of("merged")
    assert blocks_needed(Evidence(plan, []), "bulk") == {"adapter", "merged"}
    six = [replace(m, workload="bulk") for m in speed(plan, {"merged": 0.85}, 6)]
    assert blocks_needed(Evidence(plan, six), "bulk") == frozenset()


def test_only_what_more_answers_cannot_mend_is_hopeless() -> None:
    plan = plan_of("merged", "int8")
    base = builds(plan) + quality("adapter") + quality("adapter", launch=2)
    slow = speed(plan, {"merged": 1.5, "int8": 1.5})
    assert not hopeless(Evidence(plan, base + slow + quality("int8", 50)), "int8")
    assert hopeless(Evidence(plan, base + quality("int8", 50, p3={"correct": False})), "int8")


def test_an_engine_that_only_generates_answers_no_more_than_its_rules_take() -> None:
    recipe = plan_of("merged", "int8", "compiled", "int8_compiled").recipe
    needed = {name: answers_needed(recipe, variant) for name, variant in recipe.variants.items()}
    assert needed == {"adapter": None, "merged": None, "int8": None, "compiled": 128, "int8_compiled": 368}


def test_the_perplexity_of_weights_holds_on_every_engine_that_runs_them() -> None:
    plan = plan_of("merged", "compiled", require=["perplexity <= 1.02x"])
    likelihoods = ("nll", "scored_tokens", "kl", "agree")
    silent = [
        replace(m, values={k: v for k, v in m.values.items() if k not in likelihoods}) for m in quality("compiled")
    ]
    measurements = whole(plan, {"merged": 0.7}) + speed(plan, {"compiled": 0.5}) + silent
    decision = decide(plan, measurements, {})
    verdict = next(v for v in of(decision, "compiled").verdicts if v.rule == "require: perplexity <= 1.02x")
    assert verdict.outcome == "accepted" and "of merged" in verdict.reason


def test_what_compiling_cost_is_a_figure_with_its_break_even_and_a_line_of_the_report() -> None:
    plan = plan_of("merged", "compiled")
    found = whole(plan, {"merged": 0.8, "compiled": 0.6})
    for spent, started in ((40.0, 0.0), (0.0, 2.0)):
        seconds = {k: v for k, v in (("compile_time", spent), ("warm_start", started)) if v}
        said = {"graphs": 2, "graph_breaks": 0, "recompiles": 1, "uncompiled": 3, "log": ["recompiled: batch 8"]}
        found.append(Measurement("engine", "compiled", values={**seconds, **said}))
    decision = decide(plan, found, {})
    figures, parents = of(decision, "compiled").figures, of(decision, "merged").figures
    assert (figures["compile_time"].estimate, figures["warm_start"].estimate, figures["graphs"].high) == (40, 2, 2)
    assert "break_even" not in parents
    saved = parents["latency.p50@chat"].estimate - figures["latency.p50@chat"].estimate
    assert figures["break_even"].estimate == pytest.approx(40_000 / saved)
    assert figures["break_even"].low < figures["break_even"].estimate < figures["break_even"].high
    slower = decide(plan, [*whole(plan, {"merged": 0.8, "compiled": 1.1}), found[-2]], {})
    assert "break_even" not in of(slower, "compiled").figures, "what saves nothing is never paid for"
    cells = dict(zip(*(table.further(decision)[0], table.further(decision)[1][-1]), strict=True))
    assert cells["compile time"] == "40.0 s" and cells["requests answered uncompiled"] == "3"
    assert ("compiled's engine", "recompiled: batch 8") in table.facts(decision, found)
