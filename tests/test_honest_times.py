"""Intervals on times say what they claim: launches, clocks, failed turns, loads run apart, limits at their truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from helpers.records import builds, decide, evidence_of, of, outcome, plan_of, quality, whole

from peftopt import stats
from peftopt.decision import stopping
from peftopt.decision.evidence import FAILED
from peftopt.decision.rules.parents import family
from peftopt.recipe import plan as planning
from peftopt.records import TWIN, Decision, Json, Measurement, Metric, Plan, Workload


def turn(arm: str, block: int, times: Sequence[float], **more: Json) -> Measurement:
    keys = ("request_duration_ms", "ttft_ms", "tpot_ms", "cpu_ms")
    requests = [{**dict.fromkeys(keys, float(ms)), "new_tokens": 16, "warmup": False, **more} for ms in times]
    return Measurement("speed", arm, "chat", values={"block": block, "requests": requests})


def launch(arm: str, workload: str = "chat", load_s: float = 1.0) -> Measurement:
    return Measurement("launch", arm, workload, values={"model_loading_time": load_s})


def raced(
    ratios: Mapping[str, float], blocks: int, relaunch: int, launch_sd: float = 0.0, noise: float = 0.01, seed: int = 0
) -> list[Measurement]:
    """Blocks of one request of some 100 ms, with an effect of each launch."""
    rng = np.random.default_rng(seed)
    found, effect = [], dict[str, float]()
    for block in range(blocks):
        for arm, ratio in {"adapter": 1.0, **ratios}.items():
            if block % relaunch == 0:
                found.append(launch(arm))
                effect[arm] = rng.normal(0, launch_sd)
            found.append(turn(arm, block, [100 * ratio * math.exp(effect[arm] + rng.normal(0, noise))]))
    return found


def answers(plan: Plan) -> list[Measurement]:
    others = [m for name in plan.recipe.variants if name != "adapter" for m in quality(name)]
    return [*builds(plan), *quality("adapter"), *quality("adapter", launch=2), *others]


def gain(plan: Plan, measurements: Sequence[Measurement]) -> tuple[str, str]:
    found = next(v for v in of(decide(plan, measurements, {}), "merged").verdicts if v.rule == "merge.gain")
    return found.outcome, found.reason


# ---- launches ----------------------------------------------------------------------------------


def test_one_launch_decides_nothing_however_many_blocks_it_has() -> None:
    plan = plan_of("merged", relaunch=60)
    said, why = gain(plan, raced({"merged": 0.5}, 60, relaunch=60))
    assert said == "inconclusive" and "1 launch" in why and "measure.relaunch" in why
    assert gain(plan, raced({"merged": 0.5}, 60, relaunch=2))[0] == "accepted"


def test_launches_that_differ_are_the_unit_of_evidence() -> None:
    """Blocks that agree to a hundredth, launches that differ by a fifth: a few launches cannot show 15 %."""
    plan = plan_of("merged", relaunch=10)
    apart = [raced({"merged": 0.80}, 60, 10, launch_sd=0.2, seed=seed) for seed in range(10)]
    assert "accepted" not in {gain(plan, found)[0] for found in apart}
    alike = [raced({"merged": 0.80}, 60, 10, seed=seed) for seed in range(10)]
    assert {gain(plan, found)[0] for found in alike} == {"accepted"}


@pytest.mark.parametrize("relaunch", [2, 8])
def test_exactly_the_limit_is_hardly_ever_accepted_whatever_launches_do(relaunch: int) -> None:
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(150):
        effects = np.repeat(rng.normal(0, 0.07, -(-60 // relaunch)), relaunch)[:60]
        d = math.log(0.85) + effects + rng.normal(0, 0.07, 60)
        wrong += stats.race(d, math.log(0.85), launches=[n // relaunch for n in range(60)]).outcome == "accepted"
    assert wrong <= 6  # 1 % is 1.5; by blocks alone it is some 20 of 150 at eight blocks a launch


def test_launches_are_known_from_either_worker() -> None:
    found = [launch("adapter"), launch("merged")]
    for block in range(6):
        if block == 3:
            found.append(launch("merged"))  # the reference goes on
        if block == 4:
            found += [launch("adapter"), launch("merged")]
        found += [turn("adapter", block, [100]), turn("merged", block, [80])]
    evidence = evidence_of(plan_of("merged"), found)
    assert evidence.launches_of("merged", "adapter", "chat", range(6)) == [0, 0, 0, 0, 1, 1]
    assert evidence.launch_count("merged", "chat") == 3
    assert (
        evidence_of(plan_of("merged"), [turn("adapter", 0, [1])]).launches_of("merged", "adapter", "chat", [0]) is None
    )


# ---- requirements ------------------------------------------------------------------------------


def required(text: str, measurements: Sequence[Measurement], **measure: Json) -> tuple[str, Decision, Plan]:
    plan = plan_of("merged", require=[text], **measure)
    decision = decide(plan, [*answers(plan), *measurements], {})
    return outcome(decision, "merged", f"require: {text}"), decision, plan


def test_a_median_is_bounded_by_launches_not_by_requests() -> None:
    """Four launches that differ by a tenth, of thirty blocks each that agree: a limit 5 % above the median is open."""
    few = raced({"merged": 1.0}, 60, 15, launch_sd=0.1)
    middle = np.median(
        [r["request_duration_ms"] for m in few if m.variant == "merged" for r in m.values.get("requests", ())]
    )
    assert required(f"latency.p50@chat <= {1.05 * middle:.3f} ms", few, relaunch=15)[0] == "inconclusive"
    many = raced({"merged": 1.0}, 60, 1, noise=0.01)
    assert required("latency.p50@chat <= 105 ms", many, relaunch=1)[0] == "accepted"
    assert required("latency.p50@chat <= 95 ms", many, relaunch=1)[0] == "rejected"


def test_a_limit_at_its_true_value_is_neither_met_nor_missed() -> None:
    outcomes = [
        required("latency.p50@chat <= 100 ms", raced({"merged": 1.0}, 40, 2, 0.03, 0.03, seed), max_blocks=40)[0]
        for seed in range(60)
    ]
    assert outcomes.count("accepted") <= 5 and outcomes.count("rejected") <= 5


def test_a_requirement_is_judged_at_planned_looks_and_the_first_that_decides_is_final() -> None:
    assert [look for look, _ in stats.planned_looks(100, 40)] == [10, 16, 24, 40, 80]
    assert required("latency.p50@chat <= 105 ms", raced({"merged": 1.0}, 9, 1))[0] == "inconclusive"
    fast = raced({"merged": 0.5}, 24, 1)
    slow = [
        replace(m, values={**m.values, "block": m.values["block"] + 24})
        for m in raced({"merged": 3.0}, 36, 1)
        if m.probe == "speed"
    ]
    assert required("latency.p50@chat <= 80 ms", [*fast, *slow])[0] == "accepted"


def test_an_open_requirement_asks_for_blocks_and_more_can_be_added() -> None:
    text = "latency.p50@chat <= 101 ms"
    said, decision, plan = required(text, raced({"merged": 1.0}, 16, 2, noise=0.05), max_blocks=16)
    assert said == "inconclusive"
    (verdict,) = [v for v in of(decision, "merged").verdicts if v.rule == f"require: {text}"]
    assert verdict.blocks_needed and verdict.blocks_needed > 16
    measured = [*answers(plan), *raced({"merged": 1.0}, 16, 2, noise=0.05)]
    relaxed = replace(plan, recipe=replace(plan.recipe, rules=()))
    assert [v.rule for v in stopping.open_races(evidence_of(relaxed, measured))] == [f"require: {text}"]
    ten = [m for m in measured if m.probe != "speed" or m.values["block"] < 10]
    assert stopping.blocks(evidence_of(relaxed, ten), "chat") == {"adapter", "merged"}
    assert stopping.blocks(evidence_of(relaxed, measured), "chat") == frozenset()
    granted = Measurement("more", "", values={"max_blocks": 32})
    assert stopping.blocks(evidence_of(relaxed, [*measured, granted]), "chat") == {"adapter", "merged"}


@pytest.mark.parametrize("text", ["load_time <= 5 s", "memory <= 1 GB"])
def test_one_launch_has_no_interval_of_load_time_or_memory(text: str) -> None:
    def seen(launches: int) -> list[Measurement]:
        memory = [Measurement("memory", "merged", values={"peak_memory_bytes": 5e8 + n}) for n in range(launches)]
        return [*memory, *(launch("merged", load_s=1 + n / 100) for n in range(launches))]

    assert required(text, seen(1))[0] == "inconclusive"
    assert required(text, seen(3))[0] == "accepted"


# ---- clocks, failures, loads --------------------------------------------------------------------


@pytest.mark.parametrize(("step", "expected"), [(0.001, "accepted"), (10.0, "inconclusive")])
def test_a_clock_that_is_too_coarse_decides_nothing(step: float, expected: str) -> None:
    plan = plan_of("merged")
    rng, found = np.random.default_rng(3), []
    for block in range(60):
        for arm, ratio in (("adapter", 1.0), ("merged", 0.8)):
            found.append(turn(arm, block, np.floor(50 * ratio * np.exp(rng.normal(0, 0.05, 3)) / step) * step))
    said, why = gain(plan, found)
    assert said == expected and ("clock" in why) == (expected == "inconclusive")


def test_a_turn_that_failed_is_a_result_against_the_variant() -> None:
    plan = plan_of("merged")
    fine = raced({"merged": 0.5}, 24, 1)
    failed = [
        replace(m, values={**m.values, "requests": [{**m.values["requests"][0], "error": "timeout"}]})
        if m.probe == "speed" and m.variant == "merged" and m.values["block"] % 2
        else m
        for m in fine
    ]
    assert gain(plan, fine)[0] == "accepted"
    assert gain(plan, failed)[0] != "accepted"
    assert any("12 turns failed" in warning for warning in decide(plan, failed, {}).warnings)
    series = evidence_of(plan, failed).series("merged", "adapter", "chat", "request_duration_ms")
    assert [series[block] == FAILED for block in range(4)] == [False, True, False, True]
    theirs = [replace(m, variant={"merged": "adapter", "adapter": "merged"}[m.variant]) for m in failed]
    assert evidence_of(plan, theirs).series("merged", "adapter", "chat", "request_duration_ms")[1] == -FAILED
    assert required("latency.p50@chat <= 80 ms", failed)[0] != "accepted", "a failed request took forever"


def load(variant: str, ms: float, started: str = "", **more: Json) -> Measurement:
    request = {"scheduled": 0.0, "done": ms / 1e3, "request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms}
    request |= {"new_tokens": 64, "error": "", "warmup": False}
    values = {"requests": [request], **({"started": started} if started else {}), **more}
    return Measurement("load", variant, "chat", values=values)


def test_loads_are_pairs_only_where_they_alternate() -> None:
    """A slow morning of the adapter and a fast afternoon of a copy say nothing of either."""
    plan = plan_of("merged")
    morning = [load("adapter", 150 + n) for n in range(12)]
    afternoon = [load("merged", 100 + n) for n in range(12)]
    said, why = gain(plan, [*morning, *afternoon])
    assert said == "inconclusive" and "alternate" in why
    turns = [m for pair in zip(morning, afternoon, strict=True) for m in pair]
    assert gain(plan, turns)[0] == "accepted"
    swapped = [
        m for n, pair in enumerate(zip(morning, afternoon, strict=True)) for m in (pair if n % 2 else pair[::-1])
    ]
    assert gain(plan, swapped)[0] == "accepted"


def test_when_loads_were_run_counts_not_when_they_were_imported() -> None:
    plan = plan_of("merged")
    adapter = [load("adapter", 150 + n, f"2026-01-01T{n:02}:00:00") for n in range(12)]
    merged = [load("merged", 100 + n, f"2026-01-01T{n:02}:30:00") for n in range(12)]
    assert gain(plan, [*adapter, *merged])[0] == "accepted"


def test_a_load_that_its_user_broke_off_is_no_failure_and_one_whose_server_died_is() -> None:
    plan = plan_of("merged")
    for why, failed in (("interrupted", 0), ("the server is gone", 1)):
        evidence = evidence_of(plan, [load("adapter", 100), load("merged", 100, stopped=why)])
        assert len(evidence.failed["merged", "chat"]) == failed


# ---- families, parents, choosing ------------------------------------------------------------------


def test_the_family_is_every_variant_that_may_be_chosen() -> None:
    assert [family(plan_of(*names).recipe) for names in ((), ("merged",), ("merged", "int8", "compiled"))] == [1, 1, 3]


def test_leaving_a_variant_out_changes_no_verdict_on_the_others_and_is_said() -> None:
    plan = plan_of("merged", "int8")
    measured = whole(plan, {"merged": 0.5, "int8": 0.6})  # faster than the adapter, slower than the merge
    fewer = replace(plan.recipe, variants={k: v for k, v in plan.recipe.variants.items() if k != "merged"})
    again = planning.rejudged(plan, fewer)
    before, after = decide(plan, measured, {}), decide(again, measured, {})
    assert [v.name for v in after.variants] == ["adapter", "int8"] and after.chosen != "merged"
    assert outcome(before, "int8", "int8.not_slower") == outcome(after, "int8", "int8.not_slower") == "rejected"
    assert planning.changes(plan.recipe, fewer) == ["leaves out merged"]


def test_the_headlines_interval_is_at_a_higher_level_for_more_variants() -> None:
    def level(*names: str) -> float:
        plan = plan_of(*names)
        sentence = decide(plan, whole(plan, {name: 0.7 for name in names}, noise=0.05), {}).sentence
        return float(sentence.split(" at ")[1].split()[0])

    assert 100 > level("merged", "int8", "compiled", "int8_compiled") > level("merged") > 95


@pytest.mark.parametrize("twin", [0.9, 1.1])
@pytest.mark.parametrize("workload", ["chat", "bulk"])
def test_the_a_a_arm_is_looked_at_on_both_sides_and_in_every_workload(twin: float, workload: str) -> None:
    plan = plan_of("merged")
    rng = np.random.default_rng(5)
    arm = [
        replace(turn("adapter" + TWIN, n, [100 * twin * math.exp(rng.normal(0, 0.02))]), workload=workload)
        for n in range(40)
    ]
    reference = [
        replace(turn("adapter", n, [100 * math.exp(rng.normal(0, 0.02))]), workload=workload) for n in range(40)
    ]
    quiet = [m for m in whole(plan, {"merged": 0.5}) if (m.variant, m.workload) != ("adapter" + TWIN, workload)]
    if workload == "chat":
        quiet = [m for m in quiet if m.probe != "speed"] + [turn("merged", n, [50.0]) for n in range(40)]
    decision = decide(plan, [*quiet, *arm, *reference], {})
    assert decision.chosen is None and of(decision, "merged").decided_by == "measurement.a_a"


def test_a_workload_under_load_is_compared_by_whole_turns() -> None:
    plan = plan_of("merged")
    loaded = replace(plan.recipe, workloads={"chat": Workload("chat", "p.jsonl", users=4)})
    evidence = evidence_of(replace(plan, recipe=loaded), [])
    assert evidence.wall_field(Metric("throughput", "chat")) == "turn_ms"
