"""The examples that are shown are what their measurements say, under the rules as they are now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftopt import store
from peftopt.decision.decide import decide
from peftopt.decision.evidence import Evidence
from peftopt.report import as_json

EXAMPLES = Path(__file__).parents[1] / "results" / "example"
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
