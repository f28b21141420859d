"""Requirements at their limits: what is just enough, what is just too little, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from helpers.records import MERGE, builds, decide, of, plan_of, quality, speed, verdict, whole
from helpers.ruled import asked, launched, rows

from peftopt import stats
from peftopt.decision.rules import requirements
from peftopt.recipe import plan as planning
from peftopt.recipe.thresholds import parse
from peftopt.records import Interval, Json, Measurement, Metric, Step, Threshold, Variant, Verdict


def required(text: str, measurements: Sequence[Measurement], **measure: Json) -> Verdict:
    plan = plan_of("merged", require=[text], **measure)
    return verdict(decide(plan, measurements, {}), "merged", f"require: {text}")


def test_an_open_requirement_says_what_is_missing() -> None:
    plan = plan_of("merged")
    blocks = speed(plan, {"merged": 0.5}, 16)
    nothing = required("latency.p50@chat <= 50 ms", [])
    assert (nothing.outcome, nothing.workload, nothing.blocks_needed) == ("inconclusive", "", None)
    assert "not measured" in nothing.reason
    early = required("latency.p50@chat <= 500 ms", blocks[: 3 * 9])
    assert early.outcome == "inconclusive" and early.value and early.value.n == 9, "no look yet, but figures"
    assert early.value.level == 0.95 and early.blocks_needed == 10, "clear as they are, they take one more"
    tail = required("latency.p95@chat <= 900 ms", blocks, requests=1)
    assert "P95: 16 of 93" in tail.reason and "measure.requests: 2 would give them in 60 blocks" in tail.reason
    assert (tail.blocks_needed, tail.workload, tail.clock, tail.unit) == (93, "chat", "wall", "ms")
    enough = required("latency.p95@chat <= 900 ms", blocks, requests=3)
    assert "measure.requests" not in enough.reason and enough.blocks_needed == 60
    more = required("latency.p95@chat <= 900 ms", blocks, requests=3, max_blocks=31)
    assert "measure.requests" not in more.reason and more.blocks_needed == 31
    pairs = required("latency.p95@chat <= 900 ms", blocks, requests=2, max_blocks=20)
    fewest = requirements.fewest_requests(Metric("latency.p95", "chat"), plan_of("merged", max_blocks=20).recipe)
    assert fewest % 2 and pairs.blocks_needed == fewest // 2 + 1, "half a block is none"
    one = required("latency.p50@chat <= 500 ms", launched(blocks, 16), relaunch=20)
    assert "one launch" in one.reason and one.blocks_needed == 40
    two = required("latency.p50@chat <= 60 ms", launched(blocks, 8), relaunch=8)
    assert two.outcome == "inconclusive" and "one launch" not in two.reason


def test_a_met_requirement_says_by_what() -> None:
    plan = plan_of("merged")
    timed = [replace(m, values={**m.values, "machine": {"seconds": 6.0}}) for m in speed(plan, {"merged": 0.5}, 40)]
    met = required("latency.p50@chat <= 500 ms", timed)
    assert (met.outcome, met.against, met.limit, met.clock) == ("accepted", "", 500, "wall")
    assert met.value and met.value.n == 10 and met.value.level == pytest.approx(1 - 0.05 * 0.1)
    assert "10 requests of 10 launches" in met.reason and met.blocks_needed is met.minutes_needed is None
    relative = required("latency.p50@chat <= 0.9x", timed)
    assert (relative.outcome, relative.against, relative.unit) == ("accepted", "adapter", "x")
    middle = met.value.estimate
    open_ = required(f"latency.p50@chat <= {middle:.4f} ms", timed)
    assert open_.outcome == "inconclusive" and open_.blocks_needed and open_.blocks_needed > 40
    assert open_.minutes_needed == pytest.approx((open_.blocks_needed - 40) * 3 * 6 / 60)


def test_requirements_on_whole_variants_are_judged_over_the_family() -> None:
    text = "accuracy >= 90 %"
    plan = plan_of("merged", "int8", require=[text, "critical_errors <= 5 %"])
    decision = decide(plan, asked(merged=rows(1, correct=False, critical=False), int8={}), {})
    found = verdict(decision, "merged", f"require: {text}")
    assert found.value == stats.proportion(59, 60, 1 - 0.05 / 2)
    assert (found.against, found.unit, found.limit, found.workload) == ("", "share", 0.9, "")
    errors = verdict(decision, "int8", "require: critical_errors <= 5 %")
    assert errors.value and errors.value.high == stats.upper_bound(0, 60, 1 - 0.05 / 2)
    assert (errors.against, errors.limit) == ("adapter", 0.05)
    missing = verdict(decide(plan, [], {}), "merged", f"require: {text}")
    assert missing.outcome == "inconclusive" and missing.value is None


def test_the_adapter_is_held_to_limits_of_its_own_only() -> None:
    texts = ["accuracy >= 90 %", "accuracy >= 0.9x", "critical_errors <= 5 %", "latency.p50@chat <= 900 ms"]
    plan = plan_of("merged", require=texts)
    found = of(decide(plan, whole(plan, {"merged": 0.5}), {}), "adapter")
    assert [v.rule for v in found.verdicts] == [f"require: {texts[0]}", f"require: {texts[3]}"]


def test_an_adapter_alone_is_held_to_its_requirements_too() -> None:
    plan = plan_of(require=["latency.p50@chat <= 900 ms"])
    (found,) = of(decide(plan, speed(plan, {}, 24), {}), "adapter").verdicts
    assert found.outcome == "accepted"


def test_one_launch_of_a_figure_is_told() -> None:
    memory = [Measurement("memory", "merged", values={"peak_memory_bytes": 5e8})]
    assert "one launch" in required("memory <= 1 GB", memory).reason
    assert "one launch" not in required("memory <= 1 GB", memory * 2).reason
    sized = plan_of("merged", require=["size <= 1 KB"])
    said = verdict(decide(sized, builds(sized), {}), "merged", "require: size <= 1 KB")
    assert said.outcome == "accepted" and "one launch" not in said.reason


def test_the_twin_of_a_variant_that_has_no_scores_has_some() -> None:
    plan = plan_of("merged", "compiled", require=["kl <= 1 nats"])
    silent = [
        replace(m, values={k: v for k, v in m.values.items() if k not in ("nll", "kl", "agree")}) for m in asked()
    ]
    bare = [replace(m, variant=name) for m in silent if m.launch == 1 for name in ("merged", "compiled")]
    said = verdict(decide(plan, [*asked(), *bare], {}), "compiled", "require: kl <= 1 nats")
    assert said.outcome == "inconclusive" and "merged" not in said.reason


def test_the_twin_is_one_that_has_scores_where_another_has_none() -> None:
    plan = plan_of("merged", "compiled", require=["kl <= 1 nats"])
    again = Variant("again", (MERGE,), Step("other", "engine", ""))
    variants = {**plan.recipe.variants, "again": again}
    plan = planning.plan(replace(plan.recipe, variants=variants), {"base": "b", "adapter": "a", "calibration": ""}, {})
    bare = [
        replace(m, variant=name, values={k: v for k, v in m.values.items() if k not in ("nll", "kl", "agree")})
        for m in quality("merged", 60)
        for name in ("merged", "compiled")
    ]
    said = verdict(decide(plan, [*asked(again={}), *bare], {}), "compiled", "require: kl <= 1 nats")
    assert said.outcome == "accepted" and "again" in said.reason


def test_a_threshold_of_another_metric_is_shown_in_its_unit() -> None:
    ms, times = parse("latency.p50@chat <= 5 ms"), parse("latency.p50@chat <= 0.9x")
    value = Interval(0.512, 0.4, math.inf, 9)

    def shown(threshold: Threshold) -> str:
        return requirements._show(threshold, value)

    assert shown(times) == "0.512x (0.4x to unknown)" and shown(ms).startswith("0.512 ms (0.400 ms to unknown)")


@pytest.mark.parametrize(
    ("names", "most", "metric", "fewest"),
    [
        (("merged",), 60, "latency.p95", 93),
        (("merged",), 60, "latency.p50", 0),
        (("merged", "int8"), 60, "ttft.p95", 106),
        (("merged",), 2, "latency.p95", 76),
        (("merged",), 2, "latency.p99", 384),
        (("merged",), 100, "latency.p95", 89),
    ],
)
def test_the_fewest_requests_of_a_tail_by_hand(names: tuple[str, ...], most: int, metric: str, fewest: int) -> None:
    """ln(half the error of the last look / variants) / ln 0.95, rounded up."""
    recipe = plan_of(*names, max_blocks=most).recipe
    assert requirements.fewest_requests(Metric(metric, "chat"), recipe) == fewest


def test_as_many_requests_as_a_tail_takes_are_not_too_few() -> None:
    """89 requests bound a P95 on both sides at the last look of 89 blocks."""
    plan = plan_of("merged", max_blocks=89)
    assert requirements.fewest_requests(Metric("latency.p95", "chat"), plan.recipe) == 89
    for blocks, few in ((88, True), (89, False)):
        measured = speed(plan, {"merged": 0.5}, blocks)
        said = required("latency.p95@chat <= 90 ms", measured, requests=1, max_blocks=89)
        assert said.outcome == "inconclusive" and ("too few" in said.reason) == few
        assert "would give them" not in said.reason, "the blocks that it may have are enough"


def test_the_level_of_a_requirement_is_shared_by_looks_and_variants() -> None:
    assert requirements.required_level(plan_of("merged").recipe) == 0.95
    assert requirements.required_level(plan_of("merged", "int8").recipe, 0.5) == pytest.approx(1 - 0.05 / 4)


def test_a_ratio_to_an_adapter_that_was_not_measured_there_is_unknown() -> None:
    plan = plan_of("merged")
    alone = [m for m in speed(plan, {"merged": 0.5}, 24) if m.variant == "merged"]
    for metric in ("latency.p50", "latency.p95"):
        said = required(f"{metric}@chat <= 0.9x", alone)
        assert (said.outcome, said.value, said.workload) == ("inconclusive", None, "")
        assert "not measured" in said.reason
