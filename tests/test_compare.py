"""Runs side by side: what differs is named first, equal runs differ in nothing, and a difference takes a test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command, errors
from helpers.records import builds, decide, plan_of, quality, speed
from hypothesis import given
from hypothesis import strategies as st

from peftopt import report, store
from peftopt.decision.comparing import ComparedRun, Comparison, compare
from peftopt.errors import BadInput
from peftopt.records import Decision, Interval, VariantDecision, Verdict
from peftopt.report.comparison import sentence

HERE = {"cpu": "small", "cores": 2, "gpu": [], "python": "3.11.7", "versions": {"torch": "2.13.0", "peft": "0.21.2"}}
THERE = {**HERE, "cpu": "large", "cores": 16, "versions": {"torch": "2.12.0", "peft": "0.21.2"}}


# ---- the pure core ---------------------------------------------------------------------------------


def interval(middle: float, half: float, n: int = 12) -> Interval:
    return Interval(middle, middle / (1 + half), middle * (1 + half), n)


def decided(variants: Mapping[str, Mapping[str, Interval]], outcome: Any = "accepted") -> Decision:
    """A decision that holds these values of variants, and those of a baseline that takes 1000 ms and 100 bytes."""
    own = {"memory": interval(100.0, 0.01), "size": Interval(100, 100, 100, 1), "accuracy": interval(0.9, 0.02, 200)}
    verdicts = (Verdict("merge.gain", outcome, ""),)
    found = [
        VariantDecision(name, ("merge",), outcome, "merge.gain", verdicts, values) for name, values in variants.items()
    ]
    baseline = VariantDecision("adapter", (), "not judged", "", (), own)
    return Decision("r", "adapter", "latency.p50@chat", "wall", None, outcome, "", (baseline, *found))


def told(comparison: Comparison, metric: str, other: int = 1) -> str:
    return next(v.contrasts[other - 1].statement for v in comparison.values if v.metric == metric)


ratios = st.tuples(st.floats(0.05, 20), st.floats(0.001, 2), st.integers(2, 60)).map(lambda each: interval(*each))
values = st.fixed_dictionaries({"latency.ratio@chat": ratios, "memory": ratios, "perplexity": ratios})


@given(values)
def test_a_run_compared_with_itself_differs_in_nothing(figures: dict[str, Interval]) -> None:
    run = ComparedRun("x", decided({"merged": figures}), {"machine": {"cpu": "x"}})
    comparison = compare([run, run])
    assert not comparison.differing and not any(verdict.changed for verdict in comparison.verdicts)
    assert {contrast.statement for value in comparison.values for contrast in value.contrasts} <= {
        "none shown",
        "cannot be told",
        "same",
    }


@given(values, values)
def test_exchanged_runs_say_the_same_and_invert_every_ratio(
    ours: dict[str, Interval], theirs: dict[str, Interval]
) -> None:
    runs = [ComparedRun(name, decided({"merged": each})) for name, each in (("x", ours), ("y", theirs))]
    for one, other in zip(compare(runs).values, compare(runs[::-1]).values, strict=True):
        (ahead,), (back,) = one.contrasts, other.contrasts
        assert ahead.statement == back.statement
        assert ahead.value and back.value and ahead.value.estimate == pytest.approx(1 / back.value.estimate)


def test_a_difference_is_said_of_a_clear_one_and_of_none_that_the_intervals_leave_open() -> None:
    middle = {"latency.ratio@chat": interval(0.5, 0.05)}
    near = {"latency.ratio@chat": interval(0.52, 0.05)}
    far = {"latency.ratio@chat": interval(0.9, 0.05)}
    runs = [ComparedRun(str(n), decided({"merged": each})) for n, each in enumerate((middle, near, far))]
    comparison = compare(runs)
    assert told(comparison, "latency.ratio@chat", 1) == "none shown"
    assert told(comparison, "latency.ratio@chat", 2) == "differs"


def test_one_launch_tells_nothing_however_far_apart_two_medians_are() -> None:
    blocks = interval(0.5, 0.05), interval(5.0, 0.05)
    runs = [
        ComparedRun(str(n), decided({"merged": {"latency.ratio@chat": each}}), launches={"merged@chat": 1})
        for n, each in enumerate(blocks)
    ]
    assert told(compare(runs), "latency.ratio@chat") == "cannot be told"


def test_values_are_ratios_to_each_runs_own_baseline() -> None:
    """A machine that needs ten times the memory for all shows no difference."""
    here = decided({"merged": {"memory": interval(50.0, 0.01)}})
    tenfold = replace(here.variants[0], figures={"memory": interval(1000.0, 0.01)})
    there = replace(decided({"merged": {"memory": interval(500.0, 0.01)}}))
    there = replace(there, variants=(tenfold, *there.variants[1:]))
    comparison = compare([ComparedRun("here", here), ComparedRun("there", there)])
    (value,) = comparison.values
    assert [each.estimate for each in value.values if each] == pytest.approx([0.5, 0.5])
    assert value.contrasts[0].statement == "none shown"


def test_exact_sizes_take_no_test_and_a_few_bytes_are_the_same() -> None:
    sizes = [Interval(x, x, x, 1) for x in (50_000.0, 50_001.0, 60_000.0)]
    runs = [ComparedRun(str(n), decided({"merged": {"size": each}})) for n, each in enumerate(sizes)]
    comparison = compare(runs)
    assert comparison.family == 0
    assert [told(comparison, "size", n) for n in (1, 2)] == ["same", "differs"]


def test_the_more_is_compared_the_more_each_statement_takes() -> None:
    few = {"latency.ratio@chat": interval(0.5, 0.05)}
    many = few | {f"latency.ratio@w{n}": interval(0.5, 0.05) for n in range(30)}
    widths = []
    for figures in (few, many):
        value = compare([ComparedRun("x", decided({"merged": figures}))] * 2).values[0].contrasts[0].value
        assert value
        widths.append(value.high - value.low)
    assert widths[1] > widths[0]


def test_right_answers_are_compared_as_they_are_paired() -> None:
    """Each variant lost none of its own run's right answers: unpaired, a ratio of two accuracies is much wider."""
    kept = {"accuracy": interval(0.9, 0.02, 200)}
    kept |= {name: Interval(0, 0, 0, 200) for name in ("flips_worse", "flips_better")}
    (value,) = [v for v in compare([ComparedRun("x", decided({"m": kept}))] * 2).values if v.metric == "accuracy"]
    first = value.values[0]
    assert first and first.estimate == 1 and first.low > 0.97


def test_a_changed_verdict_is_named_with_its_rule() -> None:
    figures = {"merged": {"latency.ratio@chat": interval(0.5, 0.05)}}
    runs = [ComparedRun(outcome, decided(figures, outcome)) for outcome in ("accepted", "rejected")]
    changed = [verdict for verdict in compare(runs).verdicts if verdict.changed]
    assert [verdict.rule for verdict in changed] == ["", "merge.gain"]
    assert changed[0].outcomes == ("accepted", "rejected")


def test_rules_that_changed_beneath_the_same_verdict_are_said_with_it() -> None:
    figures = {"merged": {"latency.ratio@chat": interval(0.5, 0.05)}}
    one = decided(figures, "inconclusive")
    rejected = tuple(replace(v, verdicts=(Verdict("merge.gain", "rejected", ""),)) for v in one.variants[1:])
    other = replace(one, variants=(one.variants[0], *rejected))
    said = sentence(compare([ComparedRun("x", one), ComparedRun("y", other)]))
    assert "the same verdict" in said and "1 rule changed" in said and "merged" in said
    assert "changed" not in sentence(compare([ComparedRun("x", one)] * 2))
    changed = compare([ComparedRun("x", one), ComparedRun("y", decided(figures, "rejected"))])
    assert "judged differently: merged" in sentence(changed)
    assert "the same verdict" not in sentence(changed)


def test_a_fact_that_one_run_does_not_know_differs_from_nothing() -> None:
    decision = decided({"merged": {"latency.ratio@chat": interval(0.5, 0.05)}})
    known = ComparedRun("x", decision, {"machine": {"cpu": "a"}, "packages": {"torch": "1"}})
    other = ComparedRun("y", decision, {"packages": {"torch": "2", "extra": "1"}})
    found = {(each.topic, each.name): each.texts for each in compare([known, other]).differing}
    assert found == {("packages", "torch"): ("1", "2"), ("packages", "extra"): ("none", "1")}


# ---- the command line --------------------------------------------------------------------------------


def run_folder(folder: Path, ratios: Mapping[str, float], machine: Mapping[str, Any] = HERE, **changes: Any) -> Path:
    """A run's folder of variants that take so much of the adapter's time."""
    plan = plan_of(*ratios)
    plan = replace(plan, recipe=replace(plan.recipe, **changes))
    lines = [*builds(plan), *speed(plan, ratios), *quality("adapter"), *quality("adapter", launch=2)]
    lines += [line for name in ratios for line in quality(name)]
    folder.mkdir(parents=True)
    store.append(folder / "measurements.jsonl", *lines)
    store.write(folder / "plan.json", json.dumps(asdict(plan)))
    store.write(folder / "machine.json", json.dumps(machine))
    store.write(folder / "decision.json", report.as_json.render(decide(plan, lines, machine)))
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("here") / "run", {"merged": 0.5, "int8": 0.7})


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On another machine, with another adapter; its merged model gains nothing."""
    folder = tmp_path_factory.mktemp("there") / "run"
    return run_folder(folder, {"merged": 1.1, "compiled": 0.3}, THERE, adapter="adapters/other")


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert command("compare", *arguments, "--format", "json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_differs_between_two_runs_is_named_before_any_value(
    here: Path, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(capsys, here, there)
    facts = {(each["topic"], each["name"]): each["texts"] for each in found["differing"]}
    assert facts["machine", "cores"] == ["2", "16"]
    assert facts["packages", "torch"] == ["2.13.0", "2.12.0"]
    assert facts["model", "adapter"] == ["adapter", "other"]
    assert ("packages", "peft") not in facts
    assert len(found["cautions"]) == 2, "the machines, and the models"
    assert command("compare", here, there) == 0
    screen = capsys.readouterr().out
    assert screen.index("2.12.0") < screen.index("speed@chat") < screen.index("merge.gain")
    assert max(map(len, screen.partition("what differs")[2].partition("\n- ")[0].splitlines())) <= 120


def test_a_value_that_differs_and_a_verdict_that_changed_are_said(
    here: Path, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(capsys, here, there)
    speeds = {v["variant"]: v for v in found["values"] if v["metric"] == "latency.ratio@chat"}
    assert speeds.keys() == {"merged"}
    (contrast,) = speeds["merged"]["contrasts"]
    assert contrast["statement"] == "differs" and contrast["value"]["estimate"] == pytest.approx(2.2, rel=0.02)
    changed = {(v["variant"], v["rule"]) for v in found["verdicts"] if v["changed"]}
    assert {("merged", ""), ("merged", "merge.gain")} <= changed
    assert found["only"] == {"int8": [0], "compiled": [1]}


def test_a_run_and_its_copy_differ_in_nothing(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(here, tmp_path / "copy")
    found = compared(capsys, here, copy)
    assert not found["differing"] and not found["cautions"] and not found["remarks"]
    statements = {each["statement"] for value in found["values"] for each in value["contrasts"]}
    assert statements >= {"none shown", "same"} and "differs" not in statements
    assert not any(verdict["changed"] for verdict in found["verdicts"])


def test_a_decision_alone_is_compared_and_what_is_missing_is_said(
    here: Path, there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "old" / "decision.json"
    alone.parent.mkdir()
    shutil.copy(there / "decision.json", alone)
    for place in (alone, alone.parent):
        found = compared(capsys, here, place)
        assert found["runs"][1]["lacks"] and not found["runs"][0]["lacks"]
        assert any(each["topic"] == "machine" for each in found["differing"])
        assert not any(each["topic"] == "model" for each in found["differing"])
        assert {v["variant"] for v in found["values"]} == {"merged"}


def test_a_folder_of_another_version_is_compared_as_far_as_it_can_be(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = shutil.copytree(here, tmp_path / "old")
    store.write(old / "plan.json", '{"recipe": {}}')
    store.write(old / "measurements.jsonl", '{"format": 0}\n')
    found = compared(capsys, here, old)
    assert len(found["runs"][1]["lacks"]) == 1 and found["values"]


def test_a_run_that_has_not_decided_is_judged_as_it_is_and_left_as_it_is(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_run = shutil.copytree(here, tmp_path / "open")
    (open_run / "decision.json").unlink()
    before = {file.name: file.read_bytes() for file in open_run.iterdir()}
    found = compared(capsys, here, open_run)
    assert found["runs"][1]["chosen"] == found["runs"][0]["chosen"] and found["runs"][1]["lacks"]
    assert {file.name: file.read_bytes() for file in open_run.iterdir()} == before


def test_hashes_of_a_runs_files_tell_two_models_of_one_name_apart(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [shutil.copytree(here, tmp_path / name) for name in "ab"]
    for run, digit in zip(runs, "12", strict=True):
        store.write(
            run / "hashes.json", json.dumps({"base": "f" * 64, "adapter": digit * 64, "workloads": {"chat": "e"}})
        )
    found = compared(capsys, *runs)
    assert [(each["topic"], each["name"]) for each in found["differing"]] == [("contents", "adapter")]
    assert len(found["cautions"]) == 1


@pytest.mark.parametrize("form", ["html", "md", "json"])
def test_a_file_is_written_by_its_ending_with_every_run_and_value(
    form: str, here: Path, there: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"both.{form}"
    assert command("compare", here, there, here, "--output", file) == 0
    text = file.read_text()
    for word in (str(here), str(there), "merged", "int8", "differs", "merge.gain"):
        assert word in text
    assert form != "html" or not {"<script", "http://", "https://"} & set(text.split('"'))


def test_metrics_are_chosen_by_name(here: Path, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, here, there, "--metric", "ttft.p50", "--metric", "kl")
    assert [value["metric"] for value in found["values"]] == ["ttft.p50@chat", "kl"]
    assert [value["scale"] for value in found["values"]] == ["ratio", "difference"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["{here}"], "two runs"),
        (["{here}", "{nothing}"], "no run at"),
        (["{here}", "{empty}"], "not a run"),
        (["{here}", "{here}", "--format", "pdf"], "pdf"),
        (["{here}", "{here}", "-o", "{empty}/x.txt"], "format"),
        (["{here}", "{here}", "--metric", "spead"], "spead"),
        (["{here}", "{here}", "--metric", "ttft.p50@elsewhere"], "elsewhere"),
        (["{here}", "{unlike}"], "in common"),
    ],
)
def test_what_cannot_be_compared_is_said_with_what_to_do(
    arguments: list[str], word: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"here": here, "nothing": tmp_path / "nothing", "empty": tmp_path, "unlike": tmp_path / "unlike"}
    if "{unlike}" in arguments:
        run_folder(places["unlike"], {"compiled": 0.5})
    assert command("compare", *(argument.format(**places) for argument in arguments)) == 2
    said = errors(capsys)
    assert word in said and "hint:" in said


def test_runs_without_a_common_variant_are_refused_with_what_each_has() -> None:
    runs = [ComparedRun(name, decided({name: {"memory": interval(1.0, 0.1)}})) for name in ("one", "two")]
    with pytest.raises(BadInput) as caught:
        compare(runs)
    assert all(name in caught.value.hint for name in ("one", "two"))
