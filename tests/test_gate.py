"""`peftopt gate`: the exit code, the files it writes, and the baseline it keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from helpers.command_line import command, errors, prompts
from helpers.gates import HASHES, MACHINE, run_folder
from helpers.records import plan_of, quality, whole

from peftopt import store
from peftopt.cli.gate import GateOptions
from peftopt.records import Json, Measurement

CI_PAGE = Path(__file__).parent.parent / "docs" / "ci.md"
PLAN = plan_of("merged", "int8")
WRONG: Mapping[str, Json] = {"correct": False, "score": 0.0}


class Gated:
    """A baseline that ships the merged model, and runs that are compared with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "b.json"
        self.out = folder / "out"

    def run(self, name: str, ratio: float = 0.5, found: list[Measurement] | None = None, **files: Json) -> Path:
        measured = whole(PLAN, {"merged": ratio, "int8": 1.1}) if found is None else found
        return run_folder(self.folder / name, PLAN, measured, **files)

    def gate(self, run: Path, *options: object) -> int:
        return command("gate", run, "--baseline", self.file, "--out", self.out, *options)

    def cases(self) -> dict[str, str]:
        answer = json.loads((self.out / "gate.json").read_text())
        return {case["name"]: case["outcome"] for case in answer["cases"]}

    def reasons(self) -> str:
        answer = json.loads((self.out / "gate.json").read_text())
        return " ".join([answer["sentence"], *answer["notes"], *(case["reason"] for case in answer["cases"])])


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gated:
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE", "CI_PROJECT_DIR"):
        monkeypatch.delenv(name, raising=False)
    found = Gated(tmp_path)
    assert found.gate(found.run("accepted"), "--update") == 0
    return found


def answers(name: str, launches: int = 1, **changes: Mapping[str, Json]) -> list[Measurement]:
    return [line for launch in range(1, launches + 1) for line in quality(name, launch=launch, **changes)]


def with_answers(*found: Measurement) -> list[Measurement]:
    """A run as usual but for these answers, in place of all that their variants gave."""
    names = {line.variant for line in found}
    usual = whole(PLAN, {"merged": 0.5, "int8": 1.1})
    return [line for line in usual if line.probe != "quality" or line.variant not in names] + list(found)


# ---- the exit code -------------------------------------------------------------------------------


def test_an_unchanged_run_passes_and_each_rule_is_a_case(gated: Gated) -> None:
    assert gated.gate(gated.run("same", 0.501)) == 0
    expected = {"baseline", "artifact.intact", "merge.gain", "merge.parity", "answers.accuracy"}
    assert expected <= gated.cases().keys() and "rejected" not in gated.cases().values()


def test_a_slower_ratio_fails_though_its_own_rule_passes(gated: Gated) -> None:
    assert gated.gate(gated.run("slower", 0.63)) == 1
    assert gated.cases()["merge.gain"] == "rejected"


def test_an_adapter_that_got_worse_fails_though_every_relative_rule_passes(gated: Gated) -> None:
    lost = {f"p{number}": WRONG for number in range(100, 160)}
    found = with_answers(*answers("adapter", 2, **lost), *answers("merged", **lost), *answers("int8", **lost))
    run = gated.run("worse", found=found, hashes=replace(HASHES, adapter="retrained"))
    assert gated.gate(run) == 1
    cases = gated.cases()
    assert {name for name, outcome in cases.items() if outcome == "rejected"} == {"answers.accuracy"}
    assert "retrained"[:9] in gated.reasons()


def test_one_new_critical_error_of_all_answers_fails(gated: Gated) -> None:
    loop = {"p7": {"flags": ["loop"]}}
    found = with_answers(*answers("adapter", 2, **loop), *answers("merged", **loop), *answers("int8", **loop))
    assert gated.gate(gated.run("loop", found=found)) == 1
    assert "p7: loop" in gated.reasons()


def test_the_shipped_variant_must_still_pass_its_rules(gated: Gated) -> None:
    found = with_answers(*answers("merged", p7={"flags": ["loop"]}))
    assert gated.gate(gated.run("broken", found=found)) == 1
    assert gated.cases()["variant.critical_errors"] == "rejected"


def test_another_variant_that_got_worse_is_not_what_is_gated(gated: Gated) -> None:
    found = with_answers(*answers("int8", p7={"flags": ["loop"]}))
    assert gated.gate(gated.run("other", found=found)) == 0


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"hashes": replace(HASHES, answers="changed")}, "prompt set has changed"),
        ({"machine": {**MACHINE, "cpu": "B"}}, "another class of machine: cpu B, was A"),
        ({"hashes": replace(HASHES, base="changed")}, "another base model"),
    ],
)
@pytest.mark.fault(40, "a run unlike it is undecided, exit 3")
def test_a_run_that_is_unlike_the_baseline_is_undecided(gated: Gated, files: dict[str, Json], told: str) -> None:
    assert gated.gate(gated.run("unlike", **files)) == 3
    assert told in gated.reasons()


def test_a_run_that_lacks_the_shipped_variant_is_undecided(gated: Gated) -> None:
    plan = plan_of("int8")
    run = run_folder(gated.folder / "gone", plan, whole(plan, {"int8": 0.5}))
    assert gated.gate(run) == 3 and "merged" in gated.reasons()


@pytest.mark.parametrize("probes", [set(), {"build"}, {"build", "quality"}, {"build", "speed"}])
def test_a_run_that_did_not_measure_all_is_never_a_pass(gated: Gated, probes: set[str]) -> None:
    usual = whole(PLAN, {"merged": 0.5, "int8": 1.1})
    some = [line for line in usual if line.probe in probes]
    assert gated.gate(gated.run("some", found=some or usual[:1])) in (1, 3, 4)


def test_a_variant_that_was_skipped_was_not_measured(gated: Gated) -> None:
    skipped = {"stage": "launch", "reason": "missing library", "detail": "no wheel", "hint": ""}
    found = [line for line in whole(PLAN, {"merged": 0.5, "int8": 1.1}) if line.variant != "merged"]
    found.append(Measurement("failure", "merged", values=skipped))
    assert gated.gate(gated.run("skipped", found=found)) == 4


# ---- the baseline --------------------------------------------------------------------------------


@pytest.mark.fault(40, "a missing one is undecided, and nothing is run")
def test_without_a_baseline_a_recipe_is_not_even_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "chat.yaml"
    recipe.write_text("nothing that could be run")
    assert command("gate", recipe, "--out", tmp_path / "out", "--results", tmp_path / "results") == 3
    assert "chat.baseline.json" in capsys.readouterr().out.replace("\n", "")
    assert not (tmp_path / "results").exists() and (tmp_path / "out" / "junit.xml").exists()


def test_a_target_that_is_not_there_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("gate", tmp_path / "nowhere") == 2
    assert "nowhere" in errors(capsys)


@pytest.mark.parametrize(
    ("days", "options", "code"), [(89, (), 0), (91, (), 3), (3, ("--max-age", "2d"), 3), (-9, (), 0)]
)
def test_an_old_baseline_is_no_longer_compared_with(
    gated: Gated, days: int, options: tuple[str, ...], code: int
) -> None:
    file = json.loads(gated.file.read_text())
    file["written"] = (datetime.now(UTC).date() - timedelta(days=days)).isoformat()
    gated.file.write_text(json.dumps(file))
    assert gated.gate(gated.run("same"), *options) == code
    assert code == 0 or gated.cases() == {"baseline": "inconclusive"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"format": 1', '"format": 9'),
        lambda text: text.replace('"written": "2', '"written": "never 2'),
        lambda text: "[]",
    ],
)
@pytest.mark.fault(39, "a baseline of another version is refused")
def test_a_damaged_baseline_is_bad_input(
    gated: Gated, damage: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    gated.file.write_text(damage(gated.file.read_text()))
    assert gated.gate(gated.run("same")) == 2
    assert "hint:" in errors(capsys)


def test_an_update_says_what_changes_and_keeps_the_tolerances(gated: Gated, capsys: pytest.CaptureFixture[str]) -> None:
    text = gated.file.read_text()
    gated.file.write_text(text.replace('"speed": 0.1', '"speed": 0.2'))
    capsys.readouterr()
    lost = {"p300": WRONG}
    found = with_answers(*answers("adapter", 2, **lost), *answers("merged", **lost), *answers("int8", **lost))
    assert gated.gate(gated.run("next", found=found, hashes=replace(HASHES, adapter="retrained")), "--update") == 0
    said = capsys.readouterr().out
    assert "accuracy: 1 answers worse" in said and "retrained" in said
    assert '"speed": 0.2' in gated.file.read_text() and '"p300": 0.0' in gated.file.read_text()


def test_an_undecided_run_cannot_be_accepted(gated: Gated) -> None:
    before = gated.file.read_text()
    plan = plan_of("merged")
    few = run_folder(gated.folder / "few", plan, whole(plan, {"merged": 0.84}, blocks=4))
    assert gated.gate(few, "--update") == 3
    assert gated.file.read_text() == before


def test_where_nothing_is_worth_it_the_adapter_is_what_ships(tmp_path: Path) -> None:
    plan = plan_of("merged")
    gated = Gated(tmp_path)
    slow = whole(plan, {"merged": 1.2})
    assert gated.gate(run_folder(tmp_path / "slow", plan, slow), "--update") == 0
    assert json.loads(gated.file.read_text())["accepted"]["variant"] == "adapter"
    assert gated.gate(run_folder(tmp_path / "again", plan, slow)) == 0
    lost = {f"p{number}": WRONG for number in range(100, 160)}
    worse = [line for line in slow if line.probe != "quality"]
    worse += [*answers("adapter", 2, **lost), *answers("merged", **lost)]
    assert gated.gate(run_folder(tmp_path / "worse", plan, worse)) == 1


def test_a_run_of_an_older_version_says_nothing_of_what_it_was_made_of(gated: Gated) -> None:
    old = gated.run("old")
    (old / "hashes.json").unlink()
    assert gated.gate(old) == 3 and "run the recipe again" in gated.reasons()
    assert gated.gate(old, "--update") == 2


def test_a_run_that_is_not_finished_is_neither_judged_nor_accepted(gated: Gated) -> None:
    half = gated.run("half")
    (half / store.OWNER).write_text("process 1 on another")
    assert gated.gate(half) == 3 and "not finished" in gated.reasons()
    assert gated.gate(half, "--update") == 3


# ---- what CI shows -------------------------------------------------------------------------------


def test_ci_gets_files_a_summary_and_annotations(
    gated: Gated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = gated.folder / "step.md"
    step.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(gated.folder))
    capsys.readouterr()
    assert gated.gate(gated.run("slower", 0.63)) == 1
    assert step.read_text() == "before\n" + (gated.out / "summary.md").read_text()
    annotations = [line for line in capsys.readouterr().out.splitlines() if line.startswith("::")]
    assert annotations and annotations[0].startswith("::error file=b.json,line=")
    line = int(annotations[0].split("line=")[1].split(",")[0])
    assert gated.file.read_text().splitlines()[line - 1].strip() == '"merge.gain": {'
    (issue,) = json.loads((gated.out / "code-quality.json").read_text())
    assert issue["location"] == {"path": "b.json", "lines": {"begin": line}}
    assert ElementTree.fromstring((gated.out / "junit.xml").read_text()).get("failures") == "2"


def test_as_json_stdout_is_the_answer_and_nothing_else(
    gated: Gated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    capsys.readouterr()
    assert gated.gate(gated.run("slower", 0.63), "--json") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["outcome"] == "rejected" and "::error" in captured.err


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", CI_PAGE.read_text(), re.S))
def test_the_workflows_of_the_page_run_the_gate_and_keep_what_it_writes(block: str) -> None:
    workflow = yaml.safe_load(block)
    jobs = workflow.get("jobs") or workflow
    assert {"gate", "night"} <= jobs.keys()
    for option in re.findall(r"peftopt gate .*?(--[a-z-]+)", block):
        assert option.removeprefix("--") in GateOptions.__dataclass_fields__
    for name in re.findall(r"results/gate/([\w.-]+)", block):
        assert name in ("junit.xml", "code-quality.json")
    assert "results/gate" in block and block.count("peftopt gate") == 2


# ---- a recipe ------------------------------------------------------------------------------------

RECIPE = """
model: {{base: {base}, adapter: {adapter}}}
workloads: {{chat: {{prompts: {prompts}, new_tokens: 4}}}}
quality: {{prompts: {prompts}, new_tokens: 8, batch: 16}}
measure: {{requests: 1, warmup: 0, relaunch: 8, max_blocks: 10, threads: 1}}
variants: {{adapter: [], merged: [merge]}}
tradeoffs: {{merge: {{gain: off, parity: 1 %}}, variant: {{critical_errors: 20 %}}}}
minimize: latency.p50@chat
"""


def test_a_recipe_is_run_and_compared_with_what_was_accepted(
    tmp_path: Path, tiny_base: Path, tiny_lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "pull.yaml"
    file = prompts(tmp_path / "p.jsonl", 48, "ask")
    recipe.write_text(RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=file))
    options = ("--results", tmp_path / "results", "--out", tmp_path / "out", "--quiet", "--no-forecast")
    assert command("gate", recipe, *options, "--update") == 0, capsys.readouterr()
    accepted = json.loads((tmp_path / "pull.baseline.json").read_text())["accepted"]
    assert accepted["variant"] == "adapter", "a random model's answers turn on near ties"
    assert not accepted["races"] and accepted["errors"]["asked"] == 48
    assert command("gate", recipe, *options) == 0, capsys.readouterr()
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 2
