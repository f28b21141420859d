"""Rules on times at their limits: what is compared with what, on which workload, and why a race stays open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from helpers.records import decide, plan_of, speed, verdict, whole
from helpers.ruled import CAP, TRUNCATE, launched, policed, ruled

from peftopt.decision.evidence import Evidence
from peftopt.records import Measurement, Plan, Rule, Verdict, Workload


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
