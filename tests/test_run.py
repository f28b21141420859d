"""A whole run on a tiny model through the command line: what it leaves, what it reuses, what it survives."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers.command_line import RECIPE, command, prompts
from helpers.forked import COMMANDS, workers
from helpers.waiting import wait_until

from peftopt import stats, store
from peftopt.decision import stopping
from peftopt.measurements import Turn, Values
from peftopt.records import TWIN, Rule
from peftopt.runner import recipe_run
from peftopt.runner.judged import read_recipe
from peftopt.runner.process import calm
from peftopt.runner.race import Field
from peftopt.runner.run import Run

FIELDS = {"request_duration_ms", "queue_time_ms", "generation_latency_ms", "ttft_ms", "tpot_ms", "cpu_ms"}


@pytest.fixture(scope="module")
def ran(tiny_base: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """(recipe, results, exit code) of one finished run."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "tiny.yaml"
    questions = prompts(folder / "eval.jsonl", 12, "eval")
    recipe.write_text(RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=questions))
    return recipe, folder / "results", command("run", recipe, "--results", folder / "results", "--quiet")


@pytest.fixture
def copied(ran: tuple[Path, Path, int], tmp_path: Path) -> tuple[Path, Path, Path]:
    """(recipe, results, run folder) of a copy of the finished run, which a test may spoil."""
    shutil.copytree(ran[1], tmp_path / "results", symlinks=True)
    return ran[0], tmp_path / "results", run_folder(tmp_path / "results")


def run_folder(results: Path) -> Path:
    return sorted((results / "runs").iterdir())[-1]


def lines(results: Path, probe: str) -> list[dict]:
    text = (run_folder(results) / "measurements.jsonl").read_text()
    return [m for m in map(json.loads, text.splitlines()) if m["probe"] == probe]


def test_a_run_says_first_what_its_prompts_and_blocks_cannot_decide(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=prompts(tmp_path / "eval.jsonl", 12, "eval"))
    )
    heard = Heard()
    with recipe_run.prepare(*read_recipe(path), tmp_path / "results", heard):
        pass
    late, *few = (line for line in heard.said if line.startswith("cannot be decided"))
    assert "merge.gain" in late and "11 blocks" in late
    rules = ("merge.parity", "merge.lost", "merge.critical_errors", "int8.critical_errors", "variant.critical_errors")
    assert all(any(rule in line and "are 12" in line for line in few) for rule in rules)


def test_a_run_leaves_its_plan_its_samples_and_its_reports(ran: tuple[Path, Path, int]) -> None:
    _, results, code = ran
    assert {f.name for f in run_folder(results).iterdir()} >= {
        *("recipe.yaml", "plan.json", "machine.json", "measurements.jsonl", "logs"),
        *("decision.json", "report.md", "report.html", "junit.xml"),
    }
    decision = json.loads((run_folder(results) / "decision.json").read_text())
    assert code == {"accepted": 0, "rejected": 1, "inconclusive": 3}[decision["outcome"]]
    assert [v["name"] for v in decision["variants"]] == ["adapter", "merged", "int8"]
    assert not any(v["decided_by"] == "artifact.runs" for v in decision["variants"])


def test_every_request_is_kept_raw_with_the_names_production_uses(ran: tuple[Path, Path, int]) -> None:
    turns = lines(ran[1], "speed")
    for turn in turns:
        requests = turn["values"]["requests"]
        assert [r["warmup"] for r in requests] == [True, False, False]
        for request in requests:
            assert request.keys() >= FIELDS
            assert request["new_tokens"] == 4 * request["batch"]
            parts = request["queue_time_ms"] + request["generation_latency_ms"]
            assert request["request_duration_ms"] == pytest.approx(parts)
    launches = lines(ran[1], "launch")
    assert all(v["values"]["model_loading_time"] > 0 for v in launches)
    assert {v["values"]["threads"] for v in launches} == {1}
    assert all(v["values"]["adapter_switch_time"] for v in launches if v["variant"].startswith("adapter"))


def test_a_block_holds_every_variant_and_the_hidden_twin_in_random_order(ran: tuple[Path, Path, int]) -> None:
    chat = [m for m in lines(ran[1], "speed") if m["workload"] == "chat"]
    blocks = {}
    for turn in chat:
        blocks.setdefault(turn["values"]["block"], []).append(turn["variant"])
    assert len(blocks) >= 6
    assert all(set(arms) >= {"adapter", "adapter~aa"} for arms in blocks.values())
    assert set(blocks[0]) == {"adapter", "adapter~aa", "merged", "int8"}
    assert len({tuple(arms) for arms in blocks.values()}) > 1


def test_variants_are_relaunched_in_fresh_processes(ran: tuple[Path, Path, int]) -> None:
    launches = [m["values"]["pid"] for m in lines(ran[1], "launch") if m["variant"] == "merged"]
    assert len(launches) == len(set(launches)) >= 3  # two for chat's ten blocks at four a launch, one for bulk


def test_every_answer_is_recorded_against_the_adapter_and_the_adapter_twice(ran: tuple[Path, Path, int]) -> None:
    answers = lines(ran[1], "quality")
    seen = {(m["variant"], m["launch"]): 0 for m in answers}
    for m in answers:
        seen[m["variant"], m["launch"]] += 1
    assert seen["adapter", 1] == seen["adapter", 2] == seen["merged", 1] == 12
    merged = [m["values"] for m in answers if m["variant"] == "merged"]
    assert sum(v["kl"] for v in merged) / sum(v["scored_tokens"] for v in merged) < 0.05


def test_the_report_carries_the_merges_certificate(ran: tuple[Path, Path, int]) -> None:
    report = next((ran[1] / "runs").glob("*/report.md")).read_text()
    assert "- merge: parity certificate passed (full, 6 checks)" in report
    assert "parity" not in report.partition("<details>")[0], "only what a reader must be warned of stands above"


def test_the_merged_model_is_the_adapters_model(ran: tuple[Path, Path, int]) -> None:
    answers = {(m["variant"], m["launch"], m["values"]["row"]): m["values"] for m in lines(ran[1], "quality")}
    pairs = [(v, answers["adapter", 1, row]) for (name, _, row), v in answers.items() if name == "merged"]
    agreed = sum(v["agree"] for v, _ in pairs) / sum(v["scored_tokens"] for v, _ in pairs)
    assert agreed > 0.9


def test_a_second_run_builds_nothing(ran: tuple[Path, Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, results, _ = ran
    artifacts = {f: f.stat().st_mtime_ns for f in results.glob("artifacts/*/*/artifact.json")}
    assert len(artifacts) == 2
    command("run", recipe, "--results", results)
    assert capsys.readouterr().err.count("cached") == 2
    assert {f: f.stat().st_mtime_ns for f in results.glob("artifacts/*/*/artifact.json")} == artifacts
    assert len(list((results / "runs").iterdir())) == 2


@pytest.mark.fault(7, "the torn line is dropped, the run goes on, and no answer is asked twice")
def test_an_unfinished_run_goes_on_where_it_stopped(copied: tuple[Path, Path, Path]) -> None:
    recipe, results, folder = copied
    (folder / store.FINISHED).unlink()
    log = folder / "measurements.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-3]) + b'{"format": 1, "torn')
    before = log.read_bytes().rpartition(b"\n")[0]
    assert command("decide", folder) in (0, 1, 3), "to look at it does not end it"
    looked = json.loads((folder / "decision.json").read_text())
    assert any("not finished" in w for w in looked["warnings"])
    assert looked["next_step"] in ("", f"finish the run: peftopt run {recipe.name}")
    assert command("run", recipe, "--results", results, "-q") in (0, 1, 3)
    assert run_folder(results) == folder and store.is_finished(folder)
    assert not any("not finished" in w for w in json.loads((folder / "decision.json").read_text())["warnings"])
    assert log.read_bytes().startswith(before)
    answers = [(m["variant"], m["launch"], m["values"]["row"]) for m in lines(results, "quality")]
    assert len(answers) == len(set(answers))


def test_what_failed_before_a_run_stopped_is_tried_again(
    copied: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, results, folder = copied
    (folder / store.FINISHED).unlink()
    why = {"stage": "speed (bulk)", "reason": "refused", "detail": "no usable tokenizer", "hint": ""}
    failure = {"format": 1, "probe": "failure", "variant": "adapter", "values": why}
    with (folder / "measurements.jsonl").open("a") as log:
        log.write(json.dumps(failure) + "\n")
    assert command("run", recipe, "--results", results) in (0, 1, 3), "and not 4: its baseline is there"
    assert "adapter: speed (bulk) failed before (refused); trying again" in " ".join(capsys.readouterr().err.split())
    assert not any("tokenizer" in w for w in json.loads((folder / "decision.json").read_text())["warnings"])


def test_decide_and_report_need_only_the_run_folder(
    ran: tuple[Path, Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    original = sorted((ran[1] / "runs").iterdir())[0]
    for name in ("plan.json", "machine.json", "measurements.jsonl"):
        shutil.copy(original / name, alone)
    assert command("decide", alone, "--json") == ran[2]
    assert json.loads(capsys.readouterr().out) == json.loads((original / "decision.json").read_text())
    (alone / "report.html").unlink()
    assert command("report", alone) == 0
    assert (alone / "report.html").read_text() == (original / "report.html").read_text()
    assert "merged" in capsys.readouterr().out


def test_other_thresholds_change_the_verdict_without_measuring(
    ran: tuple[Path, Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, results, _ = ran
    shutil.copytree(results / "runs", tmp_path / "results" / "runs")
    changed = recipe.parent / "changed" / recipe.name
    changed.parent.mkdir(exist_ok=True)

    def decided(rows: str) -> dict[str, dict]:
        changed.write_text(recipe.read_text() + f"tradeoffs: {rows}\n")
        command("decide", "--recipe", changed, "--results", tmp_path / "results", "--json")
        found = json.loads(capsys.readouterr().out)
        assert bool(found["warnings"]) and "changed after the run" in found["warnings"][0]
        merged = next(v for v in found["variants"] if v["name"] == "merged")
        return {v["rule"]: v for v in merged["verdicts"]}

    before = lines(tmp_path / "results", "speed")
    asked = decided("{merge: {gain: 95 %, parity: 100 %}}")["merge.gain"]
    assert asked["limit"] == pytest.approx(0.05) and asked["outcome"] != "accepted"
    assert decided("{merge: {gain: 0 %, parity: 100 %}}")["merge.parity"]["outcome"] == "accepted"
    assert "merge.gain" not in decided("{merge: {gain: off}}")
    assert lines(tmp_path / "results", "speed") == before
    changed.write_text(recipe.read_text().replace("int8: [merge, int8]", "int8: [int8]"))
    assert command("decide", "--recipe", changed, "--results", tmp_path / "results") == 2
    assert "did not measure int8" in capsys.readouterr().err


class Heard:
    """A listener that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def done(self, *_: object, **__: object) -> None:
        pass

    def warn(self, text: str) -> None:
        self.said.append(text)

    tell = warn

    def progress(self, title: str, total: int, unit: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext(lambda done, what: None)


def test_more_blocks_are_granted_to_an_undecided_run_where_they_may_decide_it(
    copied: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, raced = Heard(), []
    monkeypatch.setattr(
        recipe_run, "race", lambda run, workload: raced.append(stopping.blocks(run.evidence, workload.name))
    )
    with recipe_run.reopen(copied[2], heard) as run:
        median = stats.median(run.evidence.paired("merged", "adapter", "chat", "request_duration_ms"))
        undecided = (Rule("merge", "gain", 1 - math.exp(median)),)  # nobody can tell on which side of it the truth is
        run.plan = replace(run.plan, recipe=replace(run.recipe, rules=undecided))
        recipe_run.add_blocks(run, minutes=0.0)
        assert heard.said[-1] == "nothing was measured" and not raced
        recipe_run.add_blocks(run, blocks=3000)
        assert "up to 3000 more blocks, about" in heard.said[-1] and raced[0] >= {"adapter", "merged"}
    with recipe_run.reopen(copied[2], heard) as again:
        assert again.evidence.budget == again.evidence.blocks("merged", "chat") + 3000
        again.plan = replace(again.plan, recipe=replace(again.recipe, rules=()))
        recipe_run.add_blocks(again)
        assert "no race is open" in heard.said[-1] and len(raced) == len(again.recipe.workloads)


def test_an_unfinished_run_of_another_machine_is_not_gone_on_with(copied: tuple[Path, Path, Path]) -> None:
    recipe, results, run = copied
    (run / store.FINISHED).unlink()
    (run / "decision.json").unlink()
    with recipe_run.prepare(*read_recipe(recipe), results, Heard()) as here:
        assert here.folder == run.resolve()
    described = json.loads((run / "machine.json").read_text())
    (run / "machine.json").write_text(json.dumps({**described, "cpu": "another"}))
    heard = Heard()
    with recipe_run.prepare(*read_recipe(recipe), results, heard) as there:
        assert there.folder != run.resolve() and not there.measurements
    assert "another machine: its cpu differ" in heard.said[0]


def test_more_blocks_reach_a_planned_look(copied: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = SimpleNamespace(blocks_needed=11, workload="chat", rule="merge.gain", hopeless=False)
    monkeypatch.setattr(stopping, "open_races", lambda evidence: [open_])
    monkeypatch.setattr(recipe_run, "race", lambda run, workload: None)
    with recipe_run.reopen(copied[2], Heard()) as run:
        recipe_run.add_blocks(run)
        assert run.evidence.budget == 16, "at 11 blocks nothing would be judged but by bets"


WINNER = """# A race for the winner.
model: {{base: {base}, adapter: {adapter}}}
workloads:
  chat: {{prompts: {prompts}, new_tokens: 2}}
  bulk: {{prompts: {prompts}, new_tokens: 2, batch: 2}}
measure: {{requests: 1, warmup: 0, relaunch: 4, max_blocks: 16, threads: 1, race: winner}}
variants: {{adapter: [], merged: [merge], int8: [merge, int8]}}
tradeoffs:
  merge: {{parity: off, lost: off, critical_errors: off}}
  int8: {{not_slower: off, critical_errors: off}}
minimize: latency.p50@chat
"""


def test_a_race_for_the_winner_leaves_a_slower_variant_open_and_more_has_it_judged(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The times are replaced: merged is far faster, and int8 is at its limit of 15 % until `--more`."""
    took, log = {"adapter": 100.0, "merged": 30.0, "int8": 85.0}, Run.log
    # each arm has its own: the order of the arms in a block is random
    dice = {arm: random.Random(arm) for arm in (*took, f"adapter{TWIN}")}

    def logged(run: Run, values: Values, variant: str = "", workload: str = "", launch: int = 0) -> None:
        if isinstance(values, Turn):
            ms = took[variant.removesuffix(TWIN)] * dice[variant].uniform(0.98, 1.02)
            requests = tuple(replace(request, request_duration_ms=ms) for request in values.requests)
            values = replace(values, requests=requests)
        log(run, values, variant, workload, launch)

    def blocks(name: str, workload: str) -> int:
        turns = [m for m in lines(tmp_path / "results", "speed") if m["variant"] == name]
        return sum(m["workload"] == workload for m in turns)

    def int8() -> tuple[str, str]:
        decision = json.loads((run_folder(tmp_path / "results") / "decision.json").read_text())
        assert decision["chosen"] == "merged"
        return next((v["outcome"], v["decided_by"]) for v in decision["variants"] if v["name"] == "int8")

    monkeypatch.setattr(Run, "log", logged)
    questions = prompts(tmp_path / "eval.jsonl", 12, "eval")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(WINNER.format(base=tiny_base, adapter=tiny_lora, prompts=questions))
    arguments = ("run", recipe, "--results", tmp_path / "results", "--quiet", "--no-forecast")
    assert command(*arguments) == 0
    assert int8() == ("inconclusive", "race.winner")
    left = blocks("int8", "chat")
    assert left < 16 and blocks("int8", "bulk") == 0 and blocks("merged", "bulk")
    assert "race.winner" in (run_folder(tmp_path / "results") / "report.md").read_text()
    took["int8"] = 60.0
    assert command(*arguments, "--more") == 0
    assert int8() == ("accepted", "merge.gain")
    assert blocks("int8", "chat") > left and blocks("int8", "bulk")


def test_the_workers_of_a_race_start_ahead_of_it_and_end_with_it(copied: tuple[Path, Path, Path]) -> None:
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(recipe_run.reopen(copied[2], Heard()))
        run.measurements.clear()
        field = stack.enter_context(Field(run, run.recipe.workloads["chat"]))
        field.start()
        assert field.started.keys() == {"adapter", "adapter" + TWIN, "merged", "int8"}
        assert not field.children, "none has loaded its model"
        workers = [pid for worker in field.started.values() for pid in worker.processes()]
        assert len(workers) >= 4 and all(map(psutil.pid_exists, workers))
    assert not any(map(psutil.pid_exists, workers))


def test_an_interrupted_race_asks_its_workers_nothing_more_and_kills_them(
    copied: tuple[Path, Path, Path], request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(calm)
    with recipe_run.reopen(copied[2], Heard()) as run:
        run.measurements.clear()
        field = Field(run, run.recipe.workloads["chat"])
        with pytest.raises(KeyboardInterrupt), field:
            field.start()
            field.children.update(field.started)
            logged = len(run.measurements)
            workers = [pid for worker in field.started.values() for pid in worker.processes()]
            raise KeyboardInterrupt
        assert len(run.measurements) == logged, "no worker was asked what memory it had"
        assert workers and not any(map(psutil.pid_exists, workers))


@pytest.mark.fault(22, "a run whose adapter has changed since gets no more blocks")
def test_a_run_whose_files_changed_or_that_is_decided_gets_no_more_blocks(
    copied: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied[2]
    (folder / "machine.json").write_text(json.dumps({"cpu": "another"}))
    assert command("bench", "--more", folder) == 2
    assert "measured on another machine" in capsys.readouterr().err
    rows = json.loads((folder / "plan.json").read_text())["recipe"]["workloads"]["chat"]["prompts"]
    text = Path(rows).read_text()
    try:
        Path(rows).write_text(text.replace("lazy", "busy"))
        assert command("bench", "--more", folder) == 2
        assert "have changed since it ran" in capsys.readouterr().err
    finally:
        Path(rows).write_text(text)
    assert command("bench", "--more", folder, "--model", "m") == 2


def test_a_variant_that_cannot_be_built_is_a_record_and_the_run_goes_on(
    ran: tuple[Path, Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, results, _ = ran
    text = recipe.read_text().replace("int8: [merge, int8]", "gptq4: [merge, {fp8: {keep: no_such_layer}}]")
    (tmp_path / "odd.yaml").write_text(text)
    shutil.copytree(results / "artifacts", tmp_path / "results" / "artifacts")
    assert command("run", tmp_path / "odd.yaml", "--results", tmp_path / "results", "--quiet") in (0, 1, 3)
    failed = lines(tmp_path / "results", "failure")
    assert [(m["variant"], m["values"]["reason"]) for m in failed] == [("gptq4", "refused")]
    assert "no_such_layer" in failed[0]["values"]["detail"]
    decision = json.loads((run_folder(tmp_path / "results") / "decision.json").read_text())
    outcomes = {v["name"]: v["outcome"] for v in decision["variants"]}
    assert outcomes["gptq4"] == "not judged" and outcomes["merged"] != "not judged"
    assert "gptq4" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.fault(2, "workers end, what was measured is kept, exit 130")
@pytest.mark.fault(3, "as Ctrl-C")
def test_an_interrupted_run_keeps_what_it_has_and_records_no_failure(
    ran: tuple[Path, Path, int], tmp_path: Path, number: int
) -> None:
    recipe, results, _ = ran
    shutil.copytree(results / "artifacts", tmp_path / "results" / "artifacts")
    asked = ("peftopt.cli", "run", recipe, "--results", tmp_path / "results", "--quiet")
    process = COMMANDS.begin(tmp_path / "said", *asked, workers=workers())

    def at_work() -> bool:
        """A worker is, in a lane."""
        return any((tmp_path / "results").glob("runs/*/logs/quality-*")) and bool(working_in(tmp_path))

    try:
        wait_until(lambda: at_work() or process.poll() is not None, seconds=600)
        assert process.poll() is None
        process.send_signal(number)
        code = process.wait(300)
    finally:
        process.kill()
    said = (tmp_path / "said").read_text()
    assert code == 130 and "interrupted" in said and "Traceback" not in said
    assert lines(tmp_path / "results", "failure") == []
    assert not (run_folder(tmp_path / "results") / "decision.json").exists()
    wait_until(lambda: not working_in(tmp_path))


def working_in(folder: Path) -> list[int]:
    """The processes whose working folder lies there, as those of workers do."""
    found = psutil.process_iter(["cwd"])
    return [process.pid for process in found if str(process.info["cwd"] or "").startswith(str(folder))]
