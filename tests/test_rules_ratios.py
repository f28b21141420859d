"""Metrics as ratios to the baseline's: how they are paired, and on which error their bounds hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from helpers.records import evidence_of, plan_of, speed
from helpers.ruled import NEVER, Rows, asked, rows

from peftopt import stats
from peftopt.decision import figures
from peftopt.decision.evidence import Evidence
from peftopt.decision.rules import ratios
from peftopt.records import Interval, Measurement, Metric, Quality


def ratio(ours: Rows, theirs: Rows, level: float = 0.95) -> Interval | None:
    mine, reference = ({k: float(v["x"]) for k, v in each.items()} for each in (ours, theirs))
    return ratios.score_ratio(mine, reference, level)


def test_a_ratio_of_scores_by_kind() -> None:
    right, wrong = rows(0, 1, 2, x=1), rows(3, 4, x=0)
    found = ratio(rows(0, x=0) | rows(1, 2, 3, x=1) | rows(4, x=0) | rows(9, x=1), right | wrong, 0.9)
    assert found == stats.kept(1, 3, 1, 2, 0.9)
    assert ratio(right | wrong, right | wrong) == stats.kept(0, 3, 0, 2)
    graded = rows(0, 1, x=0.5) | rows(2, x=0)
    assert ratio(graded, graded) == stats.kept(0, 2, 0, 1), "all kept their score"
    assert ratio(rows(0, x=0.4) | rows(1, 2, x=0.5), graded | rows(2, x=0.5)) == stats.ratio_of_means(
        [0.4, 0.5, 0.5], [0.5, 0.5, 0.5]
    )
    assert ratio(right, wrong) is None and ratio(wrong, wrong) is None


def test_validity_is_not_accuracy() -> None:
    """Three answers are no longer valid, of which one is no longer right either."""
    ours = rows(1, 2, valid=False) | rows(3, valid=False, correct=False)
    evidence = evidence_of(plan_of("merged"), asked(merged=ours))
    assert ratios.relative(evidence, "merged", Metric("validity"), 0.9) == stats.kept(3, 60, 0, 0, 0.9)
    assert ratios.relative(evidence, "merged", Metric("accuracy"), 0.9) == stats.kept(1, 60, 0, 0, 0.9)


def test_where_nothing_says_what_is_valid_there_is_no_ratio_of_it() -> None:
    plan = plan_of("merged")
    for quality, there in ((Quality("p", schema="s.json"), True), (Quality("p"), False), (None, False)):
        recipe = replace(plan.recipe, quality=quality)
        evidence = evidence_of(replace(plan, recipe=recipe), asked(merged=rows(1, valid=False)))
        assert (ratios.relative(evidence, "merged", Metric("validity")) is not None) == there


def test_a_task_may_be_required_to_keep_a_share_of_the_adapters_score() -> None:
    def scored(name: str, *values: float) -> Measurement:
        samples = [{"id": str(n), "value": value} for n, value in enumerate(values)]
        return Measurement("task", name, values={"task": "t", "samples": samples})

    evidence = evidence_of(plan_of("merged"), [scored("adapter", 1, 1, 1, 0), scored("merged", 1, 1, 0, 1)])
    assert ratios.relative(evidence, "merged", Metric("task.t"), 0.9) == stats.kept(1, 3, 1, 1, 0.9)
    assert ratios.relative(evidence, "int8", Metric("task.t")) is None


def seen(measurements: Sequence[Measurement], *require: str) -> Evidence:
    return evidence_of(plan_of("merged", "int8", require=require), measurements)


def test_ratios_are_at_95_percent_unless_it_is_said() -> None:
    evidence, metric = seen(asked(merged=rows(1, correct=False))), Metric("accuracy")
    assert ratios.relative(evidence, "merged", metric) == ratios.relative(evidence, "merged", metric, 0.95)


def test_a_ratio_of_figures_has_the_bounds_of_two_intervals_that_share_the_error() -> None:
    launches = [
        Measurement("launch", name, "chat", values={"model_loading_time": s})
        for name, times in (("adapter", (10, 11, 12)), ("merged", (5, 5.5, 6, 6.5)))
        for s in times
    ]
    metric = Metric("load_time")
    found = ratios.relative(seen(launches), "merged", metric, 0.9)
    own, base = stats.mean([5, 5.5, 6, 6.5], 0.95), stats.mean([10, 11, 12], 0.95)
    assert found and (found.estimate, found.n, found.level) == (pytest.approx(own.estimate / base.estimate), 3, 0.9)
    assert (found.low, found.high) == pytest.approx((own.low / base.high, own.high / base.low))
    fast = [replace(m, values={"model_loading_time": m.values["model_loading_time"] / 1e3}) for m in launches]
    again = ratios.relative(seen(fast), "merged", metric, 0.9)
    assert again and (again.low, again.high) == pytest.approx((found.low, found.high)), "seconds or milliseconds"
    one = ratios.relative(seen(launches[:1] + launches[3:]), "merged", metric, 0.9)
    assert one and (one.low, one.high) == (0, NEVER)
    spread = ratios.relative(seen(launches[:4]), "merged", metric, 0.9)
    assert spread and (spread.low, spread.high) == (0, NEVER), "a time may be next to nothing, and no less"
    assert ratios.relative(seen(launches[:3]), "merged", metric) is None
    assert ratios.relative(seen(launches[3:]), "merged", metric) is None


def test_a_ratio_of_tails_has_the_bounds_of_two_intervals_that_share_the_error() -> None:
    plan = plan_of("merged", require=["latency.p95@chat <= 0.9x"])
    evidence = evidence_of(plan, speed(plan, {"merged": 0.5}, 200))
    metric = Metric("latency.p95", "chat")
    found = ratios.timed_ratio(evidence, "merged", metric, 0.9, 200)
    own, base = (figures.timed(evidence, name, metric, 0.95, 200) for name in ("merged", "adapter"))
    assert found and own and base and math.isfinite(own.high) and found.level == 0.9
    assert found.estimate == own.estimate / base.estimate
    assert (found.low, found.high, found.n) == (own.low / base.high, own.high / base.low, 200)
    fast = [
        replace(m, values={**m.values, "requests": [{**r, "request_duration_ms": r["request_duration_ms"] / 1e4}]})
        for m in speed(plan, {"merged": 0.5}, 200)
        for r in m.values["requests"][1:]
    ]
    again = ratios.timed_ratio(evidence_of(plan, fast), "merged", metric, 0.9, 200)
    assert again and (again.low, again.high) == pytest.approx((found.low, found.high)), "also of microseconds"
    few = ratios.timed_ratio(evidence, "merged", metric, 0.9, 20)
    assert few and few.high == NEVER and few.n == 20
    one = ratios.timed_ratio(evidence, "merged", metric, 0.9, 1)
    assert one and (one.low, one.high) == (0, NEVER), "one request bounds nothing"
    assert ratios.timed_ratio(evidence, "int8", metric, 0.9, 20) is None
    itself = ratios.timed_ratio(evidence, "adapter", metric, 0.9, 20)
    assert itself == Interval(1.0, 1.0, 1.0, 20)


def test_a_ratio_of_tails_has_as_many_requests_as_the_fewer_of_the_two() -> None:
    plan = plan_of("merged")
    found = [m for m in speed(plan, {"merged": 0.5}, 200) if m.variant != "merged" or m.values["block"] < 150]
    ratio = ratios.timed_ratio(evidence_of(plan, found), "merged", Metric("latency.p95", "chat"), 0.9, 200)
    assert ratio and ratio.n == 150


def test_a_ratio_of_medians_is_paired_by_block_and_a_throughput_is_its_inverse() -> None:
    plan = plan_of("merged")
    evidence = evidence_of(plan, speed(plan, {"merged": 0.5}, 40))
    fewer = evidence_of(plan, speed(plan, {"merged": 0.5}, 12))
    time = ratios.timed_ratio(evidence, "merged", Metric("latency.p50", "chat"), 0.9, 12)
    rate = ratios.timed_ratio(evidence, "merged", Metric("throughput", "chat"), 0.9, 12)
    assert time and rate and time == fewer.ratio("merged", "adapter", "chat", "request_duration_ms", 0.9)
    assert (rate.low, rate.high) == pytest.approx((1 / time.high, 1 / time.low)) and 1.9 < rate.estimate < 2.1
    assert ratios.timed_ratio(evidence, "int8", Metric("latency.p50", "chat"), 0.9, 12) is None
