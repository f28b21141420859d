"""The examples that are shown are what their measurements say, under the rules as they are now."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from peftopt import store
from peftopt.decision.decide import decide
from peftopt.decision.evidence import Evidence
from peftopt.measurements import Answer, Built, Launch, Memory, Turn
from peftopt.report import as_json, markdown

EXAMPLES = Path(__file__).parents[1] / "results" / "example"
FIRST = Path(__file__).parent / "data" / "first-run"
"""A run of a tiny model by the first commit's code (406eabd), made on 28 November 2026."""
MEASURED = sorted(path.parent for path in EXAMPLES.rglob("measurements.jsonl"))


def test_there_are_examples_whose_measurements_are_kept() -> None:
    assert MEASURED


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_an_example_is_judged_the_same_way_again(folder: Path) -> None:
    plan, measurements = store.read_plan(folder / "plan.json"), store.read(folder / "measurements.jsonl")
    machine = json.loads((folder / "machine.json").read_text())
    again = json.loads(as_json.render(decide(Evidence(plan, measurements), machine)))
    kept = json.loads((folder / "decision.json").read_text())
    assert again["chosen"] == kept["chosen"] and again["outcome"] == kept["outcome"]
    verdicts = [
        {(v["name"], found["rule"]): found["outcome"] for v in decision["variants"] for found in v["verdicts"]}
        for decision in (again, kept)
    ]
    assert verdicts[0] == verdicts[1]


def test_what_the_first_peftopt_left_is_read_judged_and_told_as_it_was() -> None:
    warned: list[str] = []
    plan, measured = store.read_plan(FIRST / "plan.json"), store.read(FIRST / "measurements.jsonl", warned.append)
    kinds = Counter(type(each.values) for each in measured)
    assert kinds == {Built: 3, Answer: 16, Launch: 4, Turn: 40, Memory: 4} and not warned, "every line, and its probe"
    evidence, machine = Evidence(plan, measured), json.loads((FIRST / "machine.json").read_text())
    then, now = json.loads((FIRST / "decision.json").read_text()), decide(evidence, machine)
    read = as_json.decision_from_json((FIRST / "decision.json").read_text())
    assert [v.name for v in read.variants] == [v["name"] for v in then["variants"]], "its decision is read too"
    for before, after in zip(then["variants"], now.variants, strict=True):
        assert (before["name"], before["outcome"]) == (after.name, after.outcome)
        assert before["figures"]["latency.p50@chat"]["estimate"] == after.figures["latency.p50@chat"].estimate
        assert after.name in markdown.render(now, evidence)
