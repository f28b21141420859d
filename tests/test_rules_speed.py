"""Rules on times at their limits: what is compared with what, on which workload, and why a race stays open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from helpers.records import CHAINS, EAGER, decide, evidence_of, plan_of, speed, verdict, whole
from helpers.ruled import CAP, TRUNCATE, launched, policed, ruled

from peftopt import stats
from peftopt.decision.evidence import Evidence
from peftopt.decision.rules.speed import _own_limits, judged_speed
from peftopt.recipe import plan as planning
from peftopt.records import TWIN, Json, Measurement, Metric, Plan, Rule, Variant, Verdict, Workload


def gain(plan: Plan, measurements: Sequence[Measurement]) -> Verdict:
    return verdict(decide(plan, measurements, {}), "merged", "merge.gain")


def test_a_race_tells_what_was_compared_with_what_and_what_judged() -> None:
    plan = plan_of("merged")
    found = gain(plan, speed(plan, {"merged": 0.5}, 24))
    assert (found.outcome, found.against, found.workload, found.unit) == ("accepted", "adapter", "chat", "x")
    assert (found.limit, found.clock, found.blocks_needed, found.minutes_needed) == (0.85, "wall", None, None)
    assert found.value and (found.value.n, found.value.estimate) == (10, pytest.approx(0.5, rel=0.02))
    assert "10 blocks" in found.reason and "launch" not in found.reason and "bets" not in found.reason
    assert f"{found.value.low:.2f} to {found.value.high:.2f}" in found.reason
    open_ = gain(plan, speed(plan, {"merged": 0.85}, 24, noise=0.2))
    assert open_.outcome == "inconclusive" and "clock" not in open_.reason and "launch" not in open_.reason
    nothing = gain(plan, [])
    assert (nothing.outcome, nothing.against, nothing.workload) == ("inconclusive", "adapter", "chat")
    assert "not measured" in nothing.reason and nothing.value is None


def test_a_race_tells_launches_where_they_are_fewer_than_blocks() -> None:
    plan = plan_of("merged", relaunch=2)
    two = gain(plan, launched(speed(plan, {"merged": 0.5}, 24), 2))
    assert two.outcome == "accepted" and "10 blocks of 5 launches" in two.reason
    assert "launch" not in gain(plan, launched(speed(plan, {"merged": 0.5}, 24), 1)).reason
    one = gain(plan, launched(speed(plan, {"merged": 0.5}, 24), 24))
    assert one.outcome == "inconclusive" and "no interval yet" in one.reason and one.blocks_needed


def test_a_race_of_more_than_sixty_blocks_is_judged_by_bets_alone() -> None:
    for most, bets in ((60, False), (61, True)):
        plan = plan_of("merged", max_blocks=most)
        found = gain(plan, speed(plan, {"merged": 0.5}, 24))
        assert found.outcome == "accepted" and ("by bets" in found.reason) == bets


def test_the_limit_of_a_race_is_a_ratio_and_its_error_is_shared() -> None:
    plan = plan_of("merged", "int8", "compiled", "int8_compiled")
    found = decide(ruled(plan, Rule("int8", "not_slower", 0.02)), speed(plan, {"merged": 1.0, "int8": 0.5}, 40), {})
    said = verdict(found, "int8", "int8.not_slower")
    assert (said.limit, said.against, said.outcome) == (1.02, "merged", "accepted")
    assert said.value and said.value.level == pytest.approx(1 - 0.02 * 0.1 / 4)


@pytest.mark.parametrize(("ratio", "expected"), [(0.8, "accepted"), (0.9, "rejected"), (1.1, "rejected")])
def test_a_compile_must_gain_its_limit_over_what_it_compiles(ratio: float, expected: str) -> None:
    plan = ruled(plan_of("merged", "compiled"), Rule("compile", "gain", 0.15))
    said = verdict(decide(plan, speed(plan, {"merged": 0.5, "compiled": 0.5 * ratio}), {}), "compiled", "compile.gain")
    assert (said.outcome, said.against, said.limit) == (expected, "merged", 0.85)


@pytest.mark.parametrize(
    ("smaller", "not_slower", "alone"),
    [(0.1, None, True), (0.1, 0.02, False), (None, None, False), (None, 0.02, False)],
)
def test_a_merge_is_raced_by_itself_only_where_what_follows_may_cost_speed(
    smaller: float | None, not_slower: float | None, alone: bool
) -> None:
    """int8 is taken for its size where its speed is not asked for; then the merge must not pay for it."""
    table = (Rule("merge", "gain", 0.15), Rule("int8", "smaller", smaller), Rule("int8", "not_slower", not_slower))
    table += (Rule("gptq", "smaller", 0.1), Rule("gptq", "not_slower", 0.1))  # which is another quantizer
    plan = ruled(plan_of("merged", "int8"), *table)
    said = verdict(decide(plan, speed(plan, {"merged": 0.5, "int8": 2.0}), {}), "int8", "merge.gain")
    assert said.outcome == ("accepted" if alone else "rejected")
    assert said.reason.startswith("merged: ") == alone, "whose gain it is"


@pytest.mark.parametrize(("touched", "judged"), [((5, 0), "chat"), ((4, 5), "long"), ((6, 9), "long"), ((4, 4), "")])
def test_a_truncation_is_raced_where_most_requests_are_cut_and_at_least_half_of_them(
    touched: tuple[int, int], judged: str
) -> None:
    plan, found = policed(TRUNCATE, Rule("truncate", "gain", 0.0), long=Workload("long", "p")), []
    for workload, share in zip(("chat", "long"), touched, strict=True):
        for m in speed(plan, {"merged": 1.0, "cut": 0.5}, 12):
            requests = [{**r, "batch": 10, "touched": share * (m.variant == "cut")} for r in m.values["requests"]]
            found.append(replace(m, workload=workload, values={**m.values, "requests": requests}))
    said = verdict(decide(plan, found, {}), "cut", "truncate.gain")
    assert (said.workload, said.against) == (judged, "merged")
    assert said.outcome == ("accepted" if judged else "inconclusive")


def test_a_cap_is_raced_where_answers_stop_by_themselves() -> None:
    free = {"free": Workload("free", "p", lengths="natural"), "more": Workload("more", "p", lengths="natural")}
    for workloads, judged in (({}, ""), (free, "free")):
        plan = policed(CAP, Rule("shorten", "gain", 0.0), Rule("shorten", "by", 1.0), **workloads)
        found = decide(plan, [replace(m, workload="free") for m in speed(plan, {"merged": 1.0, "cut": 0.5}, 12)], {})
        assert verdict(found, "cut", "shorten.gain").workload == judged
        by = verdict(found, "cut", "shorten.by")
        assert (by.outcome, by.unit) == ("accepted", "tokens") and "48 tokens" in by.reason


def test_a_race_is_hopeless_only_while_it_has_blocks_left() -> None:
    near = whole(plan_of("merged"), {"merged": 0.855}, noise=0.1)  # 40 blocks
    for most, hopeless in ((40, False), (41, True)):
        found = gain(plan_of("merged", max_blocks=most), near)
        assert found.outcome == "inconclusive" and found.hopeless == hopeless == ("hardly suffice" in found.reason)
    assert not gain(plan_of("merged", max_blocks=41), whole(plan_of("merged"), {"merged": 0.5})).hopeless


@pytest.mark.parametrize(("disturbed", "told"), [(9, False), (10, True)])
def test_an_open_race_names_what_disturbed_a_quarter_of_its_blocks(disturbed: int, told: bool) -> None:
    plan = plan_of("merged")
    found = [
        replace(m, values={**m.values, "machine": {"steal": 0.5} if m.values["block"] < disturbed else {}})
        for m in speed(plan, {"merged": 0.85}, 40, noise=0.2)
    ]
    assert (f"{disturbed} of 40 blocks were disturbed" in gain(plan, found).reason) == told
    assert "disturbed" not in gain(plan, speed(plan, {"merged": 0.85}, 40, noise=0.2)).reason


@pytest.mark.parametrize(("step", "told"), [(0.005, False), (0.015, True)])
def test_an_open_race_names_a_clock_whose_steps_are_more_than_a_hundredth(
    step: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evidence, "resolution", lambda *_: math.log1p(step))
    plan = plan_of("merged")
    assert ("longer requests" in gain(plan, speed(plan, {"merged": 0.85}, 24, noise=0.2)).reason) == told


def loaded(order: str) -> list[Measurement]:
    requests = [{"request_duration_ms": 100.0, "ttft_ms": 9, "tpot_ms": 9, "cpu_ms": 9, "new_tokens": 64}]
    requests = [{**requests[0], "warmup": False, "scheduled": 0.0, "done": 0.1}]
    names = {"A": "adapter", "M": "merged"}
    return [Measurement("load", names[letter], "chat", values={"requests": requests}) for letter in order]


@pytest.mark.parametrize(("order", "told"), [("AMAMAM", False), ("AAAMMM", True), ("AAAAMMA", True), ("AAA", False)])
def test_loads_that_are_no_pairs_are_told_where_both_have_some(order: str, told: bool) -> None:
    found = gain(plan_of("merged"), loaded(order))
    assert found.outcome == "inconclusive" and ("alternate" in found.reason) == told


def test_loads_of_one_of_the_two_are_no_loads_that_could_alternate() -> None:
    plan = plan_of("merged")
    found = gain(plan, [*speed(plan, {"merged": 0.85}, 24, noise=0.2), *loaded("AAA")])
    assert found.outcome == "inconclusive" and "alternate" not in found.reason


def test_an_open_race_needs_blocks_up_to_a_planned_look() -> None:
    """As many as `--more` then measures: between two looks bets alone decide, and later."""
    plan = plan_of("merged")
    for blocks, look in ((11, 16), (17, 24)):
        found = gain(plan, speed(plan, {"merged": 0.8}, blocks, noise=0.1))
        assert found.outcome == "inconclusive" and found.blocks_needed == look


def test_an_open_race_tells_how_long_its_missing_blocks_take() -> None:
    """40 blocks of three turns of 6 s are there."""
    plan = plan_of("merged")
    timed = [
        replace(m, values={**m.values, "machine": {"seconds": 6.0}})
        for m in speed(plan, {"merged": 0.85}, 40, noise=0.2)
    ]
    found = gain(plan, timed)
    assert found.outcome == "inconclusive" and found.blocks_needed and found.blocks_needed > 40
    assert found.minutes_needed == pytest.approx((found.blocks_needed - 40) * 3 * 6 / 60)


GAIN, SMALLER = Rule("merge", "gain", 0.15), Rule("int8", "smaller", 0.1)
NOT_SLOWER = Rule("int8", "not_slower", 0.02)
POLICIES = (("speculating", "speculate.gain"), ("reusing", "prefix.gain"))


@pytest.mark.parametrize(
    ("name", "others", "table", "limits"),
    [
        ("merged", (), (GAIN,), [0.85]),
        ("merged", (), (Rule("merge", "gain", 0.0),), [1.0]),
        ("merged", (), (Rule("merge", "gain", None),), []),
        ("merged", (), (Rule("merge", "parity", 0.01), NOT_SLOWER, Rule("compile", "gain", 0.1)), []),
        ("apart", (), (NOT_SLOWER,), [1.02]),
        ("int8", (), (GAIN, NOT_SLOWER), [0.85, 1.02]),
        ("int8", ("merged",), (GAIN, NOT_SLOWER), [0.85]),  # which is judged against the merge
        ("int8", ("merged",), (GAIN, SMALLER), []),  # whose gain is the merge's own
        ("int8", (), (GAIN, SMALLER), [0.85]),
        ("compiled", (), (GAIN, Rule("compile", "gain", 0.1)), [0.85, 0.9]),
        ("compiled", ("merged",), (Rule("compile", "gain", 0.1), GAIN), [0.85]),
    ],
)
def test_a_variant_is_raced_against_the_baseline_by_those_of_its_rules_that_compare_the_two(
    name: str, others: tuple[str, ...], table: tuple[Rule, ...], limits: list[float]
) -> None:
    plan = ruled(plan_of(*others, name), *table)
    assert [*_own_limits(evidence_of(plan, []), CHAINS[name])] == pytest.approx(limits)


@pytest.mark.parametrize(("raced", "limits"), [("chat", []), ("free", [0.9])])
def test_a_rule_that_is_raced_on_another_workload_says_nothing_of_the_minimized_one(
    raced: str, limits: list[float]
) -> None:
    free, rule = Workload("free", "p", lengths="natural"), Rule("shorten", "gain", 0.1)
    plan = policed(CAP, rule, free=free)
    cut = Variant("cut", (), EAGER, (CAP,))  # of which the baseline is all but the cap
    recipe = replace(plan.recipe, variants={**plan.recipe.variants, "cut": cut}, minimize=Metric("latency.p50", raced))
    plan = planning.plan(recipe, {"base": "b", "adapter": "a", "calibration": ""}, {})
    assert [*_own_limits(evidence_of(plan, []), cut)] == pytest.approx(limits)


@pytest.mark.parametrize(
    ("name", "ratio", "rule"), [("merged", 0.86, GAIN), ("merged", 0.5, GAIN), ("apart", 1.01, NOT_SLOWER)]
)
def test_the_speed_that_is_shown_is_the_one_that_the_rule_judged(name: str, ratio: float, rule: Rule) -> None:
    plan = ruled(plan_of(name), rule)
    measured = speed(plan, {name: ratio}, 40, noise=0.02)
    judged = verdict(decide(plan, measured, {}), name, f"{rule.technique}.{rule.name}").value
    assert judged and judged_speed(evidence_of(plan, measured), CHAINS[name]) == judged


def test_the_speed_that_no_rule_judges_is_a_race_against_1() -> None:
    """1 % faster are late shown to be faster, and soon not to be 15 % faster."""
    plan = plan_of("merged")
    measured = speed(plan, {"merged": 0.99}, 60, noise=0.02)
    unjudged, as_fast, gained = (
        judged_speed(evidence_of(ruled(plan, *table), measured), CHAINS["merged"])
        for table in ((), (Rule("merge", "gain", 0.0),), (GAIN,))
    )
    assert unjudged and gained and unjudged == as_fast and unjudged.n > gained.n == 10


def test_no_speed_is_judged_where_times_of_requests_are_not_minimized_or_not_measured() -> None:
    plan = plan_of("merged")
    measured = speed(plan, {"merged": 0.5})
    for minimize, there in (("latency.p50", True), ("throughput", True), ("ttft.p50", False), ("memory", False)):
        recipe = replace(plan.recipe, minimize=Metric(minimize, "" if minimize == "memory" else "chat"))
        evidence = evidence_of(replace(plan, recipe=recipe), measured)
        for name in ("adapter", "merged"):
            assert (judged_speed(evidence, CHAINS[name]) is not None) == there, (minimize, name)
    assert judged_speed(evidence_of(plan, []), CHAINS["merged"]) is None


def test_the_baselines_speed_is_its_second_copys_at_the_level_of_a_look() -> None:
    plan = plan_of("merged")
    evidence = evidence_of(plan, speed(plan, {"merged": 0.5}))
    own = judged_speed(evidence, CHAINS["adapter"])
    level = 1 - stats.ALPHA / len(stats.LOOKS)
    assert own and own == evidence.ratio("adapter" + TWIN, "adapter", "chat", "request_duration_ms", level)


def test_a_policy_says_on_which_other_workloads_it_loses() -> None:
    """Not on the one that it is raced on, nor where it may be as fast."""
    plan = ruled(plan_of("compiled", "reusing"), Rule("prefix", "gain", 0.0))
    for bulk, told in ((1.5, True), (1.0, False), (0.9, False)):
        measured = speed(plan, {"compiled": 0.5, "reusing": 0.6}, 24)
        others = speed(plan, {"compiled": 0.5, "reusing": 0.5 * bulk}, 24)
        found = decide(plan, [*measured, *(replace(m, workload="bulk") for m in others)], {})
        said = verdict(found, "reusing", "prefix.gain")
        assert said.outcome == "rejected" and said.workload == "chat"
        assert ("loses on bulk: 1.50x" in said.reason) == ("loses" in said.reason) == told


def test_what_a_policy_gave_is_said_of_that_policy() -> None:
    plan = ruled(
        plan_of("compiled", "speculating", "reusing"), Rule("speculate", "gain", 0.0), Rule("prefix", "gain", 0.0)
    )
    gave: dict[str, Json] = {"steps": 4, "proposed": 16, "accepted": 12, "prompt_tokens": 100, "reused": 61}
    found = [
        replace(m, values={**m.values, "requests": [{**r, **gave} for r in m.values["requests"]]})
        for m in speed(plan, {"compiled": 0.5, "speculating": 0.4, "reusing": 0.4}, 24)
    ]
    decision = decide(plan, found, {})
    proposing, reusing = (verdict(decision, *which).reason for which in POLICIES)
    assert "4.00 tokens a step" in proposing and "reused" not in proposing
    assert "61 % of prompt tokens were reused" in reusing and "a step" not in reusing
    bare = decide(plan, speed(plan, {"compiled": 0.5, "speculating": 0.4, "reusing": 0.4}, 24), {})
    assert not any("a step" in why or "reused" in why for why in (verdict(bare, *which).reason for which in POLICIES))
