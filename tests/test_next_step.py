"""Every undecided run says what to do next: the one command that gets nearest to a decision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from helpers.records import builds, decide, of, outcome, plan_of, quality, speed, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.decision import stopping
from peftopt.records import Decision, Measurement, Plan, Quality, Rule
from peftopt.report.headline import headline


def ruled(plan: Plan, *rules: Rule) -> Plan:
    return replace(plan, recipe=replace(plan.recipe, rules=rules))


def answered(n: int) -> Sequence[Measurement]:
    return [*quality("adapter", n), *quality("adapter", n, launch=2), *quality("merged", n)]


def test_an_open_race_asks_for_more_blocks() -> None:
    plan = plan_of("merged")
    decision = decide(plan, whole(plan, {"merged": 0.83}, blocks=10, noise=0.1), {})
    assert outcome(decision, "merged", "merge.gain") == "inconclusive"
    assert decision.next_step == "peftopt run test.yaml --more"
    assert headline(decision).endswith("Next: peftopt run test.yaml --more")


def test_too_few_answers_ask_for_as_many_prompts_as_it_takes() -> None:
    plan = plan_of("merged")
    found = [*builds(plan), *speed(plan, {"merged": 0.5}), *answered(20)]
    decision = decide(plan, found, {})
    needed = max(stopping.prompts_for(plan.recipe, rule) for rule in ("merge.parity", "variant.critical_errors"))
    assert f"{needed} prompts, not 20" in decision.next_step and "add to p.jsonl" in decision.next_step
    assert decision.next_step.endswith(": peftopt run test.yaml")
    fewer = replace(plan, recipe=replace(plan.recipe, quality=Quality("p.jsonl", rows=20)))
    assert "raise quality.rows" in decide(fewer, found, {}).next_step
    enough = [*builds(plan), *speed(plan, {"merged": 0.5}), *answered(needed)]
    assert decide(plan, enough, {}).outcome == "accepted", "so many are enough"


def test_answers_that_nobody_asked_for_take_a_section_of_the_recipe() -> None:
    plan = plan_of("merged")
    plan = replace(plan, recipe=replace(plan.recipe, quality=None))
    decision = decide(plan, [*builds(plan), *speed(plan, {"merged": 0.5})], {})
    assert decision.outcome == "inconclusive" and "section quality" in decision.next_step


def test_a_race_that_no_blocks_decide_asks_for_another_limit() -> None:
    plan = ruled(plan_of("merged"), Rule("merge", "gain", 0.15), Rule("variant", "critical_errors", 0.05))
    decision = decide(plan, whole(plan, {"merged": 0.85}, blocks=40, noise=0.4), {})
    (verdict,) = (v for v in of(decision, "merged").verdicts if v.outcome == "inconclusive")
    stuck = replace(verdict, hopeless=True)
    assert stuck.blocks_needed
    if not verdict.hopeless:
        pytest.skip("more blocks may decide it")
    assert "merge.gain" in decision.next_step and decision.next_step.endswith("peftopt decide --recipe test.yaml")


def test_what_is_nearest_to_a_decision_comes_first() -> None:
    """Blocks decide one variant, prompts another: the blocks come first."""
    plan = ruled(plan_of("merged", "int8"), Rule("merge", "gain", 0.15), Rule("int8", "critical_errors", 0.001))
    answers = [m for name in ("merged", "int8") for m in quality(name)]
    answers += [*quality("adapter"), *quality("adapter", launch=2)]
    times = speed(plan, {"merged": 0.83, "int8": 0.5}, blocks=10, noise=0.1)
    decision = decide(plan, [*builds(plan), *times, *answers], {})
    assert outcome(decision, "int8", "int8.critical_errors") == "inconclusive"
    assert decision.next_step.endswith("--more")


def test_a_machine_that_differs_from_itself_has_to_be_another() -> None:
    plan = plan_of("merged")
    timed = speed(plan, {"merged": 0.5, "adapter~aa": 1.2})
    found = [*builds(plan), *timed, *answered(400)]
    decision = decide(plan, found, {})
    assert of(decision, "merged").decided_by == "measurement.a_a"
    assert decision.next_step.endswith("peftopt run test.yaml --fresh")


@settings(deadline=None, max_examples=30)
@given(
    st.floats(0.3, 1.5),
    st.integers(1, 40),
    st.floats(0.001, 0.5),
    st.integers(0, 90),
    st.sampled_from([0, 30, math.inf]),
)
def test_whatever_is_undecided_ends_with_a_command(
    ratio: float, blocks: int, noise: float, prompts: int, rows: float
) -> None:
    plan = plan_of("merged", require=["latency.p95@chat <= 130 ms", "accuracy >= 0.9x"])
    limit = 0 if math.isinf(rows) else int(rows)
    plan = replace(plan, recipe=replace(plan.recipe, quality=Quality("p.jsonl", rows=limit)))
    found = [*builds(plan), *speed(plan, {"merged": ratio}, blocks=blocks, noise=noise), *answered(prompts)]
    decision: Decision = decide(plan, found, {})
    told = headline(decision)
    if decision.outcome == "inconclusive":
        assert told.endswith(decision.next_step) and "Next: " in told
        assert "peftopt " in decision.next_step
    else:
        assert decision.next_step == "" and "Next:" not in told
