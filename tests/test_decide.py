"""What the rules make of measurements: three outcomes, the rule that decided, and never a pass by silence."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from helpers.records import (
    COMPILED,
    EAGER,
    INT8,
    MERGE,
    RULES,
    builds,
    decide,
    evidence_of,
    of,
    outcome,
    plan_of,
    quality,
    speed,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt import plugins
from peftopt.decision.evidence import FAILED
from peftopt.decision.rules.parents import parent_of
from peftopt.decision.rules.requirements import fewest_requests
from peftopt.decision.stopping import answers as answers_needed
from peftopt.decision.stopping import blocks as blocks_needed
from peftopt.decision.stopping import hopeless, open_races, undecidable
from peftopt.errors import BadInput
from peftopt.metrics import percent
from peftopt.recipe import plan as planning
from peftopt.recipe.thresholds import parse
from peftopt.records import TWIN, Invariants, Json, Measurement, Metric, Plan, Quality, Rule, Step, Variant, Workload
from peftopt.report import measured, table
from peftopt.stats import looks, needed_n, upper_bound


@pytest.mark.parametrize(("ratio", "expected"), [(0.80, "accepted"), (0.90, "rejected"), (0.85, "inconclusive")])
def test_a_merge_is_accepted_only_for_more_than_15_percent(ratio: float, expected: str) -> None:
    plan = plan_of("merged")
    decision = decide(plan, whole(plan, {"merged": ratio}), {})
    assert outcome(decision, "merged", "merge.gain") == expected
    assert decision.outcome == expected
    assert (decision.chosen == "merged") == (expected == "accepted")
    assert of(decision, "merged").decided_by == "merge.gain"


def test_what_a_recipe_cannot_decide_is_known_before_anything_is_measured() -> None:
    recipe = plan_of("merged", "int8", "compiled", "int8_compiled", require=["latency.p95@chat <= 400 ms"]).recipe
    enough = needed_n(0.01, 4)  # four variants may be chosen
    assert list(undecidable(recipe, enough)) == []
    late, tail = undecidable(replace(recipe, measure=replace(recipe.measure, max_blocks=11, requests=1)), enough)
    assert looks(4)[0] == 12
    assert late.startswith("merge.gain, int8.not_slower, compile.gain: ") and "12 blocks" in late
    assert tail.startswith("require: latency.p95@chat <= 400 ms: ") and tail.endswith("11 blocks have 11")
    claims = list(undecidable(recipe, 80))
    assert [claim.split(":")[0] for claim in claims] == ["int8.critical_errors", "variant.critical_errors"]
    assert f"takes {enough} prompts" in claims[0] and f"takes {needed_n(0.05, 4)} prompts" in claims[1]
    assert f"can claim {percent(upper_bound(0, 80, 1 - 0.05 / 4), 2)}" in claims[0]
    (none,) = undecidable(replace(recipe, quality=None), 0)
    assert none.startswith("merge.parity, int8.critical_errors, compile.parity: no answers are checked")
    seldom = replace(recipe, measure=replace(recipe.measure, relaunch=40))
    (few,) = undecidable(seldom, enough)
    assert "2 launches" in few and "measure.relaunch" in few


@given(st.integers(1, 60), st.integers(1, 800), st.integers(1, 4))
@settings(deadline=None)
def test_what_is_not_foreseen_as_undecidable_can_be_decided(blocks: int, prompts: int, requests: int) -> None:
    """The clearest figures there can be: half the time, and no error."""
    plan = plan_of("merged", "int8", max_blocks=blocks, requests=requests)
    answers = [m for name in ("adapter", "merged", "int8") for m in quality(name, prompts)]
    answers += quality("adapter", prompts, launch=2)
    found = speed(plan, {"merged": 0.5, "int8": 0.25}, blocks=blocks) + answers + builds(plan)
    open_ = " ".join(undecidable(plan.recipe, prompts))
    for rule in ("merge.gain", "int8.not_slower", "int8.critical_errors"):
        told = outcome(decide(plan, found, {}), "int8", rule)
        assert (told == "accepted") == (rule not in open_), (rule, told)


def test_the_sentence_names_the_choice_and_its_rule() -> None:
    plan = plan_of("merged")
    accepted = decide(plan, whole(plan, {"merged": 0.7}), {})
    assert "Ship merged" in accepted.sentence and "30 % lower" in accepted.sentence
    assert "merge.gain" in accepted.sentence
    kept = decide(plan, whole(plan, {"merged": 1.2}), {})
    assert kept.sentence.startswith("Keep the adapter as served") and "merge.gain" in kept.sentence


def test_a_choice_that_gains_no_time_is_not_called_higher_or_lower() -> None:
    plan = plan_of("merged", "int8")
    rules = [Rule("int8", "not_slower", None), Rule("int8", "critical_errors", 0.01)]
    plan = replace(plan, recipe=replace(plan.recipe, rules=tuple(rules)))
    said = decide(plan, whole(plan, {"merged": 2.0, "int8": 1.0}, noise=0.0), {}).sentence
    assert said.startswith("Ship int8: latency.p50@chat is about the adapter's (1.00x")


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


def for_memory(plan: Plan) -> Plan:
    """The plan under `int8: {gain: memory, smaller: 25 %}`."""
    others = [rule for rule in RULES if rule.name not in ("not_slower", "smaller")]
    rules = (*others, Rule("int8", "not_slower", None), Rule("int8", "smaller", 0.25))
    return replace(plan, recipe=replace(plan.recipe, rules=rules))


def test_int8_declared_a_memory_win_may_be_slower_than_its_parent() -> None:
    plan = plan_of("merged", "int8")
    plan = for_memory(plan)
    measurements = whole(plan, {"merged": 0.7, "int8": 1.3})
    assert outcome(decide(plan, measurements, {}), "int8", "int8.smaller") == "rejected"  # same size as merged
    sizes = {b.id: 100 if b.step == INT8 else 260 for b in plan.builds}
    smaller = [Measurement("build", "", values={"id": i, "size_bytes": s, "tier0": []}) for i, s in sizes.items()]
    decision = decide(plan, measurements + smaller, {})
    assert outcome(decision, "int8", "int8.smaller") == "accepted"
    assert of(decision, "int8").outcome == "accepted"


@pytest.mark.parametrize(("merged", "expected"), [(0.7, "accepted"), (0.95, "rejected")])
def test_the_merge_before_a_memory_win_is_judged_by_itself(merged: float, expected: str) -> None:
    plan = plan_of("merged", "int8")
    measurements = whole(plan, {"merged": merged, "int8": 1.3})
    assert outcome(decide(plan, measurements, {}), "int8", "merge.gain") == "rejected"  # it was to be faster
    decision = decide(for_memory(plan), measurements, {})
    assert outcome(decision, "int8", "merge.gain") == expected
    reason = next(v.reason for v in of(decision, "int8").verdicts if v.rule == "merge.gain")
    assert reason.startswith("merged: latency.p50@chat is")
    without = plan_of("int8")  # nothing but the whole variant is there to tell
    found = decide(for_memory(without), whole(without, {"int8": 1.3}), {})
    assert outcome(found, "int8", "merge.gain") == "rejected"


@pytest.mark.fault(20, "the variant is rejected, however it measured")
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


@pytest.mark.fault(38, "not judged, which is no pass")
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
        return blocks_needed(evidence_of(plan, answers + speed(plan, ratios, blocks)), "chat")

    assert racing({"merged": 0.5, "compiled": 0.3}, 9) == {"adapter", "merged", "compiled"}
    assert racing({"merged": 0.5, "compiled": 0.3}, 16) == frozenset()
    assert racing({"merged": 0.5, "compiled": 0.4999}, 16) == {"adapter", "merged", "compiled"}
    assert racing({"merged": 1.0, "compiled": 1.1}, 16) == frozenset()
    assert racing({"merged": 0.5, "compiled": 0.4999}, 60) == frozenset()


def test_a_workload_that_decides_nothing_gets_the_fewest_blocks() -> None:
    plan = plan_of("merged")
    assert blocks_needed(evidence_of(plan, []), "bulk") == {"adapter", "merged"}
    six = [replace(m, workload="bulk") for m in speed(plan, {"merged": 0.85}, 6)]
    assert blocks_needed(evidence_of(plan, six), "bulk") == frozenset()


def test_only_what_is_minimized_is_measured_of_what_is_rejected_already() -> None:
    plan = plan_of("merged", "int8")
    wrong = builds(plan) + quality("adapter") + quality("adapter", launch=2)
    wrong += quality("int8", p1={"correct": False, "flags": ["empty answer"]})
    assert of(decide(plan, wrong, {}), "int8").outcome == "rejected"
    assert blocks_needed(evidence_of(plan, wrong), "chat") == {"adapter", "merged", "int8"}
    assert blocks_needed(evidence_of(plan, wrong), "bulk") == {"adapter", "merged"}


def test_only_what_more_answers_cannot_mend_is_hopeless() -> None:
    plan = plan_of("merged", "int8")
    base = builds(plan) + quality("adapter") + quality("adapter", launch=2)
    slow = speed(plan, {"merged": 1.5, "int8": 1.5})
    assert not hopeless(evidence_of(plan, base + slow + quality("int8", 50)), "int8")
    assert hopeless(evidence_of(plan, base + quality("int8", 50, p3={"correct": False})), "int8")


def test_an_engine_that_only_generates_answers_no_more_than_its_rules_take() -> None:
    recipe = plan_of("merged", "int8", "compiled", "int8_compiled").recipe
    needed = {name: answers_needed(recipe, variant) for name, variant in recipe.variants.items()}
    assert needed == {
        "adapter": None,
        "merged": None,
        "int8": None,
        "compiled": 128,
        "int8_compiled": needed_n(0.01, 4),
    }


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


# ---- what holds for any measurements -------------------------------------------------------------

RANK = ("rejected", "inconclusive", "not judged", "accepted")


def with_rule(plan: Plan, technique: str, name: str, limit: float | None) -> Plan:
    rules = [r for r in plan.recipe.rules if (r.technique, r.name) != (technique, name)]
    return replace(plan, recipe=replace(plan.recipe, rules=(*rules, Rule(technique, name, limit))))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.4, 1.1), st.sampled_from([6, 12, 16, 30, 60]), st.floats(0, 0.5), st.floats(0, 0.4))
def test_a_laxer_threshold_never_makes_a_verdict_worse(ratio: float, blocks: int, gain: float, more: float) -> None:
    plan = plan_of("merged")
    measurements = whole(plan, {"merged": ratio}, blocks=blocks, noise=0.05)
    strict, lax = (
        outcome(decide(with_rule(plan, "merge", "gain", limit), measurements, {}), "merged", "merge.gain")
        for limit in (min(gain + more, 0.9), gain)
    )
    assert RANK.index(strict) <= RANK.index(lax)


@settings(max_examples=5, deadline=None)
@given(st.permutations(["merged", "int8", "compiled", "int8_compiled"]), st.integers(0, 99))
def test_the_order_of_variants_and_of_records_changes_no_verdict(names: list[str], seed: int) -> None:
    ratios = {"merged": 0.8, "int8": 0.7, "compiled": 0.6, "int8_compiled": 0.75}
    plan, other = plan_of(*ratios), plan_of(*names)
    measurements = whole(plan, ratios)
    shuffled = random.Random(seed).sample(measurements, len(measurements))
    one, two = decide(plan, measurements, {}), decide(other, shuffled, {})
    assert (one.outcome, one.chosen) == (two.outcome, two.chosen)
    assert {v.name: (v.outcome, v.decided_by) for v in one.variants} == {
        v.name: (v.outcome, v.decided_by) for v in two.variants
    }


def lose(kind: str, measurements: list[Measurement]) -> list[Measurement]:
    """The measurements of a good merge and a good int8, with something of them missing or broken."""
    if kind == "nothing":
        return []
    if kind == "no blocks":
        return [m for m in measurements if m.probe != "speed"]
    if kind == "too few blocks":
        return [m for m in measurements if m.probe != "speed" or m.values["block"] < 5]
    if kind == "no baseline blocks":
        return [m for m in measurements if m.probe != "speed" or m.variant.partition("~")[0] != "adapter"]
    if kind == "no answers":
        return [m for m in measurements if m.probe != "quality" or m.variant in ("adapter", "merged")]
    if kind == "few answers":
        return [m for m in measurements if m.probe != "quality" or int(m.values["row"][1:]) < 30]
    if kind == "no build":
        return [m for m in measurements if m.probe != "build"]
    broken = {"NaN times": math.nan, "no times": None, "zero times": 0.0}
    if kind in broken:
        return [
            replace(m, values={**m.values, "requests": [{**r, **dict.fromkeys(TIMES, broken[kind])} for r in rs]})
            if (rs := m.values.get("requests")) and m.variant != "adapter"
            else m
            for m in measurements
        ]
    died = {"stage": "speed (chat)", "reason": "timeout", "detail": "", "hint": ""}
    return [*measurements, *(Measurement("failure", name, values=died) for name in ("merged", "int8"))]


TIMES = ("request_duration_ms", "cpu_ms", "ttft_ms", "tpot_ms")
LOSSES = ["nothing", "no blocks", "too few blocks", "no baseline blocks", "no build", "died"]
LOSSES += ["NaN times", "no times", "zero times"]


@pytest.mark.parametrize("kind", [*LOSSES, "no answers", "few answers"])
@pytest.mark.fault(31, "too few answers decide nothing")
def test_what_is_missing_broken_or_too_little_is_never_accepted(kind: str) -> None:
    plan = plan_of("merged", "int8")
    good = whole(plan, {"merged": 0.5, "int8": 0.3})
    assert decide(plan, good, {}).outcome == "accepted"
    decision = decide(plan, lose(kind, good), {})
    outcomes = {v.name: v.outcome for v in decision.variants}
    assert outcomes["int8"] != "accepted"
    if kind in LOSSES:
        assert outcomes["merged"] != "accepted" and decision.chosen is None


def test_likelihoods_that_are_not_finite_meet_no_requirement() -> None:
    plan = plan_of("merged", require=["perplexity <= 1.02x", "kl <= 0.1 nats"])
    one = quality("merged", p7={"nll": math.nan, "kl": math.nan})
    decision = decide(plan, builds(plan) + speed(plan, {"merged": 0.5}) + whole(plan, {})[-800:] + one, {})
    assert {v.rule: v.outcome for v in of(decision, "merged").verdicts if v.rule.startswith("require")} == {
        "require: perplexity <= 1.02x": "inconclusive",
        "require: kl <= 0.1 nats": "inconclusive",
    }


def test_a_variant_that_no_rule_covers_is_not_judged_by_the_check_of_its_files() -> None:
    recipe = plan_of("merged").recipe
    twin = replace(recipe.variants["adapter"], name="twin")
    recipe = replace(recipe, variants={**recipe.variants, "twin": twin})
    plan = planning.plan(recipe, {"base": "b", "adapter": "a", "calibration": ""}, {})
    decision = decide(plan, whole(plan, {"merged": 1.5, "twin": 0.5}), {})
    assert (of(decision, "twin").outcome, of(decision, "twin").decided_by) == ("not judged", "")
    assert "twin not judged" in decision.sentence and "twin not judged by" not in decision.sentence


def test_kl_may_reject_a_variant_but_not_accept_it() -> None:
    plan = plan_of("merged", require=["kl <= 0.1 nats"])
    for name, half in (("merge", "gain"), ("merge", "parity")):
        plan = with_rule(plan, name, half, None)
    decision = decide(plan, whole(plan, {"merged": 0.5}), {})
    assert outcome(decision, "merged", "require: kl <= 0.1 nats") == "accepted"
    assert of(decision, "merged").outcome == "not judged" and decision.chosen is None


# ---- clocks, budgets and thresholds that change ----------------------------------------------------


def test_the_verdict_is_of_the_clock_that_judges_and_says_why() -> None:
    plan = plan_of("merged", clock="cpu")
    turns = [
        replace(m, values={**m.values, "requests": [{**r, "cpu_ms": r["cpu_ms"] * 2} for r in m.values["requests"]]})
        if m.variant == "merged"
        else m
        for m in speed(plan, {"merged": 0.5})
    ]
    answers = [m for m in whole(plan, {"merged": 0.5}) if m.probe != "speed"]
    decision = decide(plan, turns + answers, {})
    assert outcome(decision, "merged", "merge.gain") == "rejected" and decision.clock == "cpu"
    verdict = next(v for v in of(decision, "merged").verdicts if v.rule == "merge.gain")
    assert verdict.clock == "cpu" and "1.00x" in verdict.reason
    assert decide(plan_of("merged"), turns + answers, {}).clock_reason == "what a user waits for"


def test_a_required_time_is_always_of_the_wall_clock() -> None:
    plan = plan_of("merged", require=["latency.p50@chat <= 1 s"], clock="cpu")
    decision = decide(plan, whole(plan, {"merged": 0.5}), {})
    assert [v.clock for v in of(decision, "merged").verdicts if v.rule.startswith("require")] == ["wall"]


def test_too_few_requests_for_a_tail_says_what_would_give_enough() -> None:
    plan = plan_of("merged", require=["latency.p99@chat <= 1 s", "latency.p95@chat <= 1.5x"])
    verdicts = {v.rule: v for v in of(decide(plan, whole(plan, {"merged": 0.7}), {}), "merged").verdicts}
    tail = verdicts["require: latency.p99@chat <= 1 s"]
    fewest = fewest_requests(Metric("latency.p99", "chat"), plan.recipe)  # more than the 368 of a single look
    assert tail.outcome == "inconclusive" and fewest > 368 and f"40 of {fewest}" in tail.reason
    assert "measure.requests: 8" in tail.reason
    assert verdicts["require: latency.p95@chat <= 1.5x"].outcome == "inconclusive"
    many = plan_of("merged", require=["latency.p99@chat <= 1 s", "latency.p95@chat <= 3x"], max_blocks=500)
    found = decide(many, whole(many, {"merged": 0.7}, blocks=500), {})
    assert {v.outcome for v in of(found, "merged").verdicts if v.rule.startswith("require")} == {"accepted"}


def loads(ratios: Mapping[str, float], runs: int = 12, **odd: Json) -> list[Measurement]:
    """Runs of `peftopt load`, each of 8 requests that took `ratio` times 100 ms; `odd` is of every first request."""
    dice, found = random.Random(3), []
    for _ in range(runs):
        for name, ratio in {"adapter": 1.0, **ratios}.items():
            requests = []
            for n in range(8):
                ms = 100 * ratio * dice.uniform(0.95, 1.05)
                request = {"id": str(n), "scheduled": n / 50, "done": n / 50 + ms / 1e3, "request_duration_ms": ms}
                request |= {"ttft_ms": ms / 4, "tpot_ms": ms / 100, "new_tokens": 64, "error": "", "warmup": False}
                requests.append({**request, **(odd if n == 0 else {})})
            values = {"source": "a meter", "lacks": ["gaps"], "requests": requests}
            found.append(Measurement("load", name, "bulk", values=values))
    return found


def loaded_plan(*require: str) -> Plan:
    plan = plan_of("merged", require=require)
    workloads = {"bulk": Workload("bulk", "p.jsonl", users=4)}
    rules = tuple(replace(rule, limit=None) if rule.name == "parity" else rule for rule in RULES)
    recipe = replace(plan.recipe, workloads=workloads, minimize=Metric("ttft.p50", "bulk"), rules=rules)
    return replace(plan, recipe=recipe)


@pytest.mark.parametrize(("ratio", "expected"), [(0.7, "accepted"), (0.95, "rejected")])
def test_loads_that_were_run_apart_are_blocks_and_say_what_they_lack(ratio: float, expected: str) -> None:
    plan = loaded_plan("throughput@bulk >= 100 tokens/s", "latency.p95@bulk <= 200 ms")
    decision = decide(plan, [*builds(plan), *loads({"merged": ratio}, 40)], {})
    assert outcome(decision, "merged", "merge.gain") == expected
    assert outcome(decision, "merged", "require: latency.p95@bulk <= 200 ms") == "accepted"
    # 8 requests of 64 tokens from the first's start to the last's end, some 0.2 s
    assert of(decision, "merged").figures["throughput@bulk"].estimate == pytest.approx(8 * 64 / 0.22, rel=0.1)
    assert any("merged@bulk was loaded apart" in w and "it lacks gaps" in w for w in decision.warnings)


def test_a_load_that_is_left_out_keeps_its_place() -> None:
    """On a machine that was ever slower, pairs of loads that ran beside one another still tell the ratio."""
    found, runs = [], loads({"merged": 0.7})
    for number, m in enumerate(runs):
        slower, failed = 1.5 ** (number // 2), number == 1  # merged's first
        requests = [{**r, "request_duration_ms": r["request_duration_ms"] * slower} for r in m.values["requests"]]
        requests[0]["error"] = "HTTP 500" if failed else ""
        found.append(replace(m, values={**m.values, "requests": requests}))
    logs = evidence_of(loaded_plan(), found).paired("merged", "adapter", "bulk", "request_duration_ms")
    assert logs[0] == FAILED and len(logs) == 12
    assert all(abs(log - math.log(0.7)) < 0.11 for log in logs[1:])


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"new_tokens": 12}, "answers of 12 tokens, where the workload has 64"),
        ({"request_duration_ms": math.nan}, "a time that is none"),
    ],
)
def test_a_load_that_went_wrong_is_as_good_as_none(odd: Mapping[str, Json], says: str) -> None:
    plan = loaded_plan()
    decision = decide(plan, [*builds(plan), *loads({"merged": 0.5}, **odd)], {})
    assert outcome(decision, "merged", "merge.gain") == "inconclusive"
    assert any(f"merged@bulk: a turn was left out: {says}" in w for w in decision.warnings)
    bare = [Measurement("load", v, "bulk", values={"reported": {"mean_ttft_ms": 1}}) for v in ("adapter", "merged")]
    decision = decide(plan, [*builds(plan), *bare], {})
    assert outcome(decision, "merged", "merge.gain") == "inconclusive"
    assert any("no raw requests" in w for w in decision.warnings)


def test_a_race_that_its_budget_cannot_decide_stops_and_goes_on_when_more_is_granted() -> None:
    plan = plan_of("merged", max_blocks=45)
    near = whole(plan, {"merged": 0.855}, noise=0.1)  # 40 blocks
    verdict = next(v for v in of(decide(plan, near, {}), "merged").verdicts if v.rule == "merge.gain")
    assert verdict.hopeless and verdict.blocks_needed and "45 blocks it may have can hardly suffice" in verdict.reason
    assert blocks_needed(evidence_of(plan, near), "chat") == frozenset()
    assert [v.rule for v in open_races(evidence_of(plan, near))] == ["merge.gain"]
    granted = [*near, Measurement("more", "", values={"max_blocks": 5000})]
    assert blocks_needed(evidence_of(plan, granted), "chat") == {"adapter", "merged"}


def test_the_planner_tells_minutes_from_the_runs_own_blocks() -> None:
    plan = plan_of("merged", relaunch=5)
    timed = [
        replace(m, values={**m.values, "machine": {"seconds": 2.0}}) if m.probe == "speed" else m
        for m in whole(plan, {"merged": 0.85}, noise=0.1)
    ]
    launches = [Measurement("launch", v, "chat", values={"model_loading_time": 10.0}) for v in ("adapter", "merged")]
    verdict = next(v for v in of(decide(plan, launches + timed, {}), "merged").verdicts if v.rule == "merge.gain")
    assert verdict.blocks_needed is not None and verdict.minutes_needed is not None
    more = verdict.blocks_needed - 40
    assert verdict.minutes_needed == pytest.approx((more * 3 * 2.0 + math.ceil(more / 5) * 3 * 10.0) / 60)


def test_other_thresholds_judge_what_was_measured_and_nothing_else() -> None:
    plan = plan_of("merged", "int8")
    measurements = whole(plan, {"merged": 0.8, "int8": 0.7})
    other = with_rule(plan_of("merged"), "merge", "gain", 0.4).recipe
    judged = planning.rejudged(plan, replace(other, require=(parse("latency.p50@chat <= 1 s"),)))
    assert outcome(decide(plan, measurements, {}), "merged", "merge.gain") == "accepted"
    decision = decide(judged, measurements, {})
    assert outcome(decision, "merged", "merge.gain") == "rejected" and [v.name for v in decision.variants] == [
        "adapter",
        "merged",
    ]
    assert planning.changes(plan.recipe, judged.recipe) == ["merge.gain 0.15 -> 0.4", "now latency.p50@chat <= 1 s"]
    with pytest.raises(BadInput, match="did not measure compiled"):
        planning.rejudged(plan, plan_of("merged", "compiled").recipe)


# ---- policies --------------------------------------------------------------------------------------

TRUNCATE = Step("truncate", "policy", "truncate", {"over": 2048, "keep": "tail"})
CAP = Step("cap", "policy", "shorten", {"max_new_tokens": 48})
POLICY_RULES = (
    *(Rule("truncate", name, limit) for name, limit in (("over", 2048), ("gain", 0.0), ("lost", 0.2))),
    *(Rule("shorten", name, limit) for name, limit in (("by", 1.0), ("gain", 0.0), ("cut", 0.02))),
)


def policed() -> Plan:
    plan = plan_of("merged")
    variants = dict(plan.recipe.variants)
    for name, step in (("truncated", TRUNCATE), ("capped", CAP)):
        variants[name] = Variant(name, (MERGE,), EAGER, (step,))
    workloads = {
        "chat": Workload("chat", "p.jsonl"),
        "long": Workload("long", "p.jsonl", slice="long"),
        "free": Workload("free", "p.jsonl", lengths="natural"),
    }
    recipe = replace(plan.recipe, variants=variants, workloads=workloads, rules=RULES + POLICY_RULES)
    return planning.plan(recipe, {"base": "b", "adapter": "a", "calibration": ""}, {})


def policy_run(touched: int, cut_off: int = 0, wrong: int = 0) -> list[Measurement]:
    """40 of 400 prompts are long; the truncated variant touches `touched` requests in ten of the long workload."""
    plan = policed()
    found = whole(plan, {"merged": 0.5})
    ratios = {"merged": 0.5, "truncated": 0.4, "capped": 0.42}
    for workload in ("chat", "long", "free"):
        for m in speed(plan, ratios):
            if workload == "chat" and m.variant in ("adapter", "adapter" + TWIN, "merged"):
                continue  # `whole` has them
            share = touched if (workload, m.variant) == ("long", "truncated") else 0
            requests = [{**r, "batch": 10, "touched": share} for r in m.values["requests"]]
            found.append(replace(m, workload=workload, values={**m.values, "requests": requests}))
    long = {f"p{n}": {"uncut_tokens": 3000, "correct": n >= wrong} for n in range(40, 80)}
    capped = {f"p{n}": {"stopped": False, "correct": False} for n in range(100, 100 + cut_off)}
    if wrong:
        long |= {f"p{40 + n}": {"uncut_tokens": 3000, "correct": False} for n in range(wrong)}
    return found + quality("truncated", **long) + quality("capped", **capped)


def test_policies_are_judged_where_they_matter_against_the_same_variant_without_them() -> None:
    plan = policed()
    decision = decide(plan, policy_run(touched=10), {})
    verdicts = {v.rule: v for name in ("truncated", "capped") for v in of(decision, name).verdicts}
    assert [verdicts[f"truncate.{rule}"].outcome for rule in ("over", "gain", "lost")] == ["accepted"] * 3
    assert [verdicts[f"shorten.{rule}"].outcome for rule in ("by", "gain", "cut")] == ["accepted"] * 3
    assert (verdicts["truncate.gain"].against, verdicts["truncate.gain"].workload) == ("merged", "long")
    assert (verdicts["shorten.gain"].against, verdicts["shorten.gain"].workload) == ("merged", "free")
    assert "length.ratio@free" in of(decision, "capped").figures
    assert any("cuts 40 of 400 prompts: 0 answers lost" in line for line in of(decision, "truncated").remarks)


def test_a_policy_that_meets_no_request_it_changes_is_not_accepted_for_speed() -> None:
    decision = decide(policed(), policy_run(touched=4), {})
    assert outcome(decision, "truncated", "truncate.gain") == "inconclusive"
    assert outcome(decide(plan_of("merged"), policy_run(4), {}), "merged", "merge.gain") == "accepted"


def test_answers_that_a_policy_loses_or_cuts_reject_it_and_are_named() -> None:
    decision = decide(policed(), policy_run(touched=10, cut_off=20, wrong=20), {})
    assert outcome(decision, "truncated", "truncate.lost") == "rejected"
    assert outcome(decision, "capped", "shorten.cut") == "rejected"
    assert any("20 answers lost (p40" in line for line in of(decision, "truncated").remarks)
    assert any("cuts off 20 of 400 answers (p100" in line for line in of(decision, "capped").remarks)


def test_an_input_that_was_short_and_cut_all_the_same_rejects() -> None:
    short = [*policy_run(touched=10), *quality("truncated", n=3, p2={"uncut_tokens": 1999})]
    assert outcome(decide(policed(), short, {}), "truncated", "truncate.over") == "rejected"


def test_a_cap_is_proposed_from_the_baselines_own_lengths() -> None:
    plan = plan_of("merged")
    long = {f"p{n}": {"new_tokens": 200} for n in range(3)}
    measurements = whole(plan, {"merged": 0.7}) + quality("adapter", **long)
    remarks = of(decide(plan, measurements, {}), "adapter").remarks
    assert len(remarks) == 1 and "max_new_tokens: 31 would cut off 0.8 %" in remarks[0] and "200 tokens" in remarks[0]


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
    sheets = table.more(decision).values()
    cells = {name: cell for sheet in sheets for name, cell in zip(sheet.header, sheet.body[-1], strict=True)}
    assert cells["compile time"] == "40.0 s" and cells["requests answered uncompiled"] == "3"
    assert ("compiled's engine", "recompiled: batch 8") in measured.facts(decision, evidence_of(plan, found))


def test_a_slice_that_the_second_run_has_not_come_to_yet_is_not_judged_by_itself() -> None:
    plan = plan_of("merged")
    tagged = {"p399": {"slices": ["late"]}}
    early = quality("adapter", **tagged) + quality("adapter", 100, launch=2) + quality("merged", **tagged)
    found = builds(plan) + speed(plan, {"merged": 0.5}) + early
    assert outcome(decide(plan, found, {}), "merged", "merge.parity") == "accepted"


@pytest.mark.parametrize(("right", "warned"), [(0, True), (4, True), (200, False)])
def test_a_baseline_that_is_hardly_ever_right_is_a_warning(right: int, warned: bool) -> None:
    plan = plan_of("merged")
    wrong = {f"p{n}": {"correct": False} for n in range(right, 400)}
    found = [*speed(plan, {"merged": 0.5}), *builds(plan)]
    for name, launch in (("adapter", 1), ("adapter", 2), ("merged", 1)):
        found += quality(name, 400, launch, **wrong)
    decision = decide(plan, found, {})
    assert any("itself answers" in warning for warning in decision.warnings) == warned


def test_validity_is_shown_only_where_something_says_what_is_valid() -> None:
    plan = plan_of("merged", require=["validity >= 99 %"])
    shown = decide(plan, whole(plan, {"merged": 0.5}), {})
    assert "schema validity" in table.rows(shown)[0]
    silent = replace(plan, recipe=replace(plan.recipe, quality=Quality("p.jsonl")))
    decision = decide(silent, whole(plan, {"merged": 0.5}), {})
    assert "schema validity" not in table.rows(decision)[0]
    assert "validity" not in of(decision, "merged").figures
    assert outcome(decision, "merged", "require: validity >= 99 %") == "inconclusive"
    labels = replace(
        plan, recipe=replace(plan.recipe, quality=Quality("p.jsonl", invariants=Invariants(labels=("a",))))
    )
    assert "schema validity" in table.rows(decide(labels, whole(plan, {"merged": 0.5}), {}))[0]


def test_a_recipe_of_another_name_judges_a_run_of_an_older_peftopt() -> None:
    """The run's plug-ins had fewer parameters: those that they have got since stand at their defaults."""
    recipe = plan_of("merged").recipe
    variants = {name: replace(v, engine=Step("eager", "engine", "")) for name, v in recipe.variants.items()}
    old = replace(plan_of("merged"), recipe=replace(recipe, variants=variants))
    new = planning.completed(old, plugins.catalogue()).recipe
    renamed = replace(new, name="other", path="elsewhere/other.yaml")
    assert new.variants != old.recipe.variants
    with pytest.raises(BadInput, match="device"):
        planning.rejudged(old, renamed)
    again = planning.rejudged(planning.completed(old, plugins.catalogue()), renamed)
    assert again.recipe.name == recipe.name and planning.changes(new, renamed) == planning.kept(new, renamed) == []


def test_what_a_recipe_has_otherwise_than_the_run_is_said() -> None:
    recipe = plan_of("merged").recipe
    workloads = {**recipe.workloads, "chat": replace(recipe.workloads["chat"], new_tokens=9, prompts="other.jsonl")}
    changed = replace(recipe, workloads=workloads, measure=replace(recipe.measure, requests=7))
    chat, measure = planning.kept(recipe, changed)[::-1]
    assert chat == "workloads.chat.new_tokens 64, not 9"
    assert measure == "measure.requests 3, not 7"
