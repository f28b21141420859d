"""A report shows what was judged: every dot, count and flip is one that the decision rests on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from helpers.records import evidence_of, of, plan_of, quality, whole

from peftopt.decision.decide import decide
from peftopt.decision.evidence import Evidence
from peftopt.records import TWIN, Decision, Json, Measurement
from peftopt.report import answers, measured
from peftopt.report.plots import ratios

PLAN = plan_of("merged", "int8")
"""More flips than there are."""


def requests_of(m: Measurement, **changes: Json) -> Measurement:
    return replace(m, values={**m.values, "requests": [{**r, **changes} for r in m.values["requests"]]})


def spoiled(m: Measurement) -> Measurement:
    """In block 7 merged has a time that is none, in block 9 int8 fails."""
    match m.probe, m.variant, m.values.get("block"):
        case "speed", "merged", 7:
            return requests_of(m, request_duration_ms=0.0)
        case "speed", "int8", 9:
            return requests_of(m, error="HTTP 500")
    return m


def a_run() -> tuple[Decision, Evidence]:
    timed = [spoiled(m) for m in whole(PLAN, {"merged": 0.7, "int8": 0.9}) if m.probe != "quality"]
    wrong = {"correct": False}
    second = {"p3": wrong, "p7": {"noise": [0.5] * 31}}
    asked = quality("adapter", p60=wrong, p61=wrong) + quality("adapter", launch=2, p60=wrong, **second)
    asked = [m for m in asked if (m.launch, m.values["row"]) != (2, "p8")]
    ours = {"p3": wrong, "p6": wrong, "p7": {**wrong, "parting": (4, 0.1)}, "p8": wrong, "p50": wrong}
    flagged = {"p5": {**wrong, "flags": ["loop", "invalid output"]}, "p70": {"flags": ["loop"]}}
    asked += quality("merged") + quality("int8", p61=wrong, **ours, **flagged)
    failed = Measurement("failure", "merged", values={"stage": "speed", "reason": "killed", "detail": ""})
    launched = Measurement("launch", "merged", "chat", values={"model_loading_time": 1.0})
    late = Measurement("failure", "int8", values={"stage": "task", "reason": "error", "detail": "odd"})
    found = [*timed, *asked, failed, Measurement("retry", "merged"), launched, late]
    evidence = evidence_of(PLAN, found)
    return decide(evidence, {}), evidence


DECISION, EVIDENCE = a_run()


@pytest.mark.parametrize("name", ["adapter", "merged", "int8"])
def test_every_dot_is_a_block_of_the_ratio_that_is_shown(name: str) -> None:
    rows = ratios.rows(DECISION, EVIDENCE, "chat")
    row = next(row for row in rows if row.variant.name == name)
    ratio = of(DECISION, name).figures["latency.ratio@chat"]
    assert len(row.blocks) == ratio.n == {"adapter": 40, "merged": 39, "int8": 40}[name]
    source = name + TWIN * (name == "adapter")
    series = EVIDENCE.series(source, "adapter", "chat", "request_duration_ms")
    shown = measured.block_ratios(DECISION, EVIDENCE, "chat")[name]
    for log, judged in zip(series.values(), shown, strict=True):
        assert math.isinf(judged) if log > 5 else judged == pytest.approx(math.exp(log))
    assert sum(map(math.isinf, shown)) == (name == "int8"), "a turn that failed is at the edge"
    scale = ratios.scale(rows)
    assert all(0 <= scale.at(block) <= 1 for block in row.blocks)
    assert scale.at(1.0) > 0.5, "where it does not press the others together"


def test_every_count_is_of_what_was_judged() -> None:
    header, rows = measured.effort(DECISION, EVIDENCE)
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    for name in ("adapter", "merged", "int8"):
        figures = of(DECISION, name).figures
        assert int(cells[name]["timed requests"]) == figures["latency.p50@chat"].n
        assert int(cells[name]["answers checked"]) == figures["accuracy"].n
    assert [cells[name]["blocks"] for name in cells] == ["40", "39", "40"]
    assert cells["merged"]["launches"] == "1"


def test_every_flip_is_one_that_the_rules_count() -> None:
    found = answers.flips(DECISION, EVIDENCE)
    assert found["adapter"] == [] and {f.change for f in found["merged"]} == {"now right"}
    flips, figures = found["int8"], of(DECISION, "int8").figures
    errors, asked = EVIDENCE.critical_errors("int8")
    assert {f.row for f in flips if f.gravity < 3} == {e.row for e in errors if e.counts} == {"p5", "p6", "p70"}
    assert figures["critical_errors"].estimate * asked == 3
    worse, better = EVIDENCE.flips("int8")
    assert len(flips) == worse + better + 1, "p70 is right, and a loop"
    assert (figures["flips_worse"].estimate, figures["flips_better"].estimate) == (worse, better) == (6, 1)
    assert sum(f.gravity == 4 for f in flips) == better


@pytest.mark.parametrize(
    ("row", "gravity", "words"),
    [
        ("p3", 3, "now wrong"),
        ("p5", 1, "loop, invalid output"),
        ("p6", 2, "critical prompt now wrong"),
        ("p7", 3, "near tie"),
        ("p8", 3, "asked only once"),
        ("p50", 3, "now wrong"),
        ("p60", 4, "now right"),
        ("p70", 1, "loop"),
    ],
)
def test_a_flip_is_called_what_the_rule_says_of_it(row: str, gravity: int, words: str) -> None:
    """p3 is a critical prompt that the adapter itself gets right once and wrong once: no critical error."""
    flip = next(f for f in answers.flips(DECISION, EVIDENCE)["int8"] if f.row == row)
    assert flip.gravity == gravity and words in flip.change
    assert ("critical" in flip.change) == (row in ("p6", "p7", "p8"))


def test_the_shares_of_slices_are_those_of_the_accuracy() -> None:
    header, rows = answers.slices(DECISION, EVIDENCE)
    assert rows == [], "no prompt has a tag"
    tagged = [
        replace(m, values={**m.values, "slices": ["even"] if int(m.values["row"][1:]) % 2 == 0 else []})
        for m in quality("adapter") + quality("int8", p3={"correct": False}, p4={"correct": False})
    ]
    evidence = evidence_of(PLAN, tagged)
    decision = decide(evidence, {})
    header, rows = answers.slices(decision, evidence)
    assert header == ["slice", "adapter", "int8"] and [row[0] for row in rows] == ["all", "even"]
    accuracy = of(decision, "int8").figures["accuracy"]
    assert f"({round(accuracy.estimate * accuracy.n)} of {accuracy.n}," in rows[0][2]
    assert "(199 of 200," in rows[1][2]


def test_what_was_tried_again_has_not_failed() -> None:
    _, rows = measured.failures(EVIDENCE)
    assert [row[0] for row in rows] == ["int8"] == [*EVIDENCE.failures]


def test_loads_that_were_run_apart_are_blocks_and_dots() -> None:
    found = []
    for block in range(12):
        for name, ms in (("adapter", 100.0 + block), ("merged", 70.0 + block)):
            request = {"scheduled": 0.0, "done": ms / 1e3, "request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms}
            request |= {"new_tokens": 64, "error": "", "warmup": False}
            found.append(Measurement("load", name, "chat", values={"requests": [request]}))
    evidence = evidence_of(plan_of("merged"), found)
    decision = decide(evidence, {})
    (row,) = ratios.rows(decision, evidence, "chat")
    assert row.variant.name == "merged"
    assert len(row.blocks) == of(decision, "merged").figures["latency.ratio@chat"].n == 12
    header, rows = measured.effort(decision, evidence)
    cells = {each[0]: dict(zip(header, each, strict=True)) for each in rows}
    assert cells["merged"]["blocks"] == cells["merged"]["timed requests"] == "12"
    assert any("looks" in key for key, _ in measured.facts(decision, evidence))
