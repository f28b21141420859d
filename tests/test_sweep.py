"""A sweep through the command line on tiny models: what it measures, what it leaves alone, and what it says of it."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.command_line import command, errors
from helpers.forked import COMMANDS, workers
from helpers.untimed import write_recipe
from helpers.waiting import wait_until

from peftopt import store
from peftopt.recipe.grid import MachineClass
from peftopt.runner import cells
from peftopt.runner.cells import Job
from peftopt.runner.executors import attempt

GRID = """recipe: tiny.yaml
models: {{tiny: {{base: {base}, adapters: {{good: {adapter}, broken: broken}}}}}}
machines: {{small: {{price_per_hour: 0.20 EUR}}, large: {{memory: 900 TB}}}}
"""


@pytest.fixture
def grid(tmp_path: Path, tiny_base: Path, tiny_lora: Path) -> Path:
    """A grid of two adapters, one of which is an empty folder, and two classes of machines, one of which is none."""
    (tmp_path / "broken").mkdir()
    write_recipe(tmp_path, tiny_base, tiny_lora)
    file = tmp_path / "all.yaml"
    file.write_text(GRID.format(base=tiny_base, adapter=tiny_lora))
    return file


def copied(job: Job) -> tuple[int, bytes]:
    """The command of a job in a copy of a process that has imported everything."""
    said = job.folder / "said"
    with Path(os.devnull).open() as nothing, said.open("w") as out, (job.folder / cells.LOG).open("a") as log:
        streams = (nothing.fileno(), out.fileno(), log.fileno())
        code = COMMANDS.program(("peftopt.cli", *job.arguments), streams, workers=workers()).wait()
    return code, said.read_bytes()


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def by_names(answer: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell["adapter"], cell["machine"]): cell for cell in answer["cells"]}


def test_a_sweep_decides_what_it_can_once_says_what_failed_and_writes_one_page(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "_run", copied)
    results = ("--results", tmp_path / "results")
    assert command("sweep", grid, *results, "--machine", "small", "--json") == 2, "the worst of its cells"
    answer = told(capsys)
    found = by_names(answer)
    good = found["good", "small"]
    assert (good["state"], good["outcome"], good["chosen"]) == ("decided", "accepted", "merged")
    assert found["broken", "small"]["state"] == "failed" and found["broken", "small"]["exit_code"] == 2
    assert "adapter_config.json" in found["broken", "small"]["why"]
    assert {found[adapter, "large"]["state"] for adapter in ("good", "broken")} == {"waiting"}
    runs = sorted((tmp_path / "results" / "runs").iterdir())
    assert [run.name for run in runs] == [good["run"]]
    planned_before = Job(good["cell"], (), MachineClass("small"), tmp_path / "results", tmp_path / "results")
    assert cells.is_decided(planned_before), "another sweep, which began earlier, finds what this one has decided"
    before = (runs[0] / "measurements.jsonl").read_bytes()

    assert command("sweep", "run", grid, *results, "--machine", "small", "--json") == 2
    again = by_names(told(capsys))
    assert sorted((tmp_path / "results" / "runs").iterdir()) == runs, "nothing is measured twice"
    assert (runs[0] / "measurements.jsonl").read_bytes() == before
    assert again["good", "small"] == good
    tried = cells.attempts(tmp_path / "results" / "sweeps" / "all" / again["broken", "small"]["cell"])
    assert [attempt.exit_code for attempt in tried] == [2, 2], "what failed is tried again"

    table = tmp_path / "all.csv"
    assert command("sweep", "report", grid, *results, "--csv", table, "--parquet", tmp_path / "all.parquet") == 0
    shown = capsys.readouterr().out
    place = tmp_path / "results" / "sweeps" / "all"
    page = (place / "report.html").read_text()
    assert [(place / link).resolve() for link in re.findall('href="([^"]+)"', page)] == [runs[0] / "report.html"]
    for word in ("1 of 4 cells decided", "adapter_config.json", "merged", "EUR"):
        assert word in page
    assert "1 of 4 cells decided" in shown
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["variant"] for row in rows if row["state"] == "decided"] == ["adapter", "merged"]
    assert len(rows) == 5 and all(float(row["speed"]) > 0 for row in rows if row["variant"] == "merged")
    assert (tmp_path / "all.parquet").stat().st_size

    (runs[0] / "decision.json").unlink()
    assert command("sweep", "status", grid, *results, "--json") == 0
    assert by_names(told(capsys))["good", "small"]["state"] == "unfinished"
    assert command("sweep", grid, *results, "--machine", "small", "--json") == 2
    assert by_names(told(capsys))["good", "small"]["outcome"] == good["outcome"], "judged from its measurements"
    assert (runs[0] / "measurements.jsonl").read_bytes() == before

    decision = json.loads((runs[0] / "decision.json").read_text())
    (runs[0] / "decision.json").write_text(json.dumps({**decision, "outcome": "inconclusive", "chosen": None}))
    asked: dict[str, bool] = {}
    monkeypatch.setattr(attempt, "_run", lambda job: (asked.update({job.name: "--more" in job.arguments}), (3, b""))[1])
    broken = again["broken", "small"]["cell"]
    for options, wanted in (((), {broken: False}), (("--more",), {broken: False, good["cell"]: True})):
        asked.clear()
        command("sweep", grid, *results, "--machine", "small", "--json", *options)
        assert asked == wanted


def test_an_interrupted_sweep_stops_at_once_and_the_next_goes_on(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def interrupted(job: Job) -> tuple[int, bytes]:
        begun.append(job.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(attempt, "_run", interrupted)
    options = (grid, "--results", tmp_path / "results", "--machine", "small")
    assert command("sweep", *options) == 130
    assert len(begun) == 1, "no other cell was begun"
    monkeypatch.setattr(attempt, "_run", lambda job: (begun.append(job.name), (4, b""))[1])
    assert command("sweep", *options) == 4
    assert begun[0] == begun[1] and len(begun) == 3
    assert "log" in errors(capsys)


def test_a_machine_that_is_less_than_its_class_measures_nothing(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "_run", lambda job: pytest.fail("it was started"))
    assert command("sweep", grid, "--results", tmp_path / "results", "--machine", "large") == 4
    assert "900000 GB of memory" in errors(capsys)


def test_a_dry_run_says_what_there_is_and_leaves_no_file(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("sweep", "--dry-run", grid, "--results", tmp_path / "results", "--machine", "small") == 0
    said = errors(capsys)
    for words in ("2 cells: 1 model, 2 adapters", "2 cells of the class small left, on 1 machine", "2 artifacts"):
        assert words in said
    assert not (tmp_path / "results").exists()


def test_before_the_first_cell_it_is_said_how_long_all_take(
    tmp_path: Path, deep: tuple[Path, Path], tiny_base: Path, tiny_lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, lora = deep
    write_recipe(tmp_path, base, lora, "deep.yaml")
    grid = tmp_path / "all.yaml"

    def said(models: str, *options: object) -> str:
        grid.write_text(f"recipe: deep.yaml\nmodels: {models}\n")
        assert command("sweep", "--dry-run", grid, "--results", tmp_path / "results", *options) == 0
        return errors(capsys)

    large = f"{{base: {base}, adapters: {{one: {lora}, two: {lora}}}}}"
    small = f"{{base: {tiny_base}, adapters: {{one: {tiny_lora}}}}}"
    assert re.search("about .* by the times of first layers", said(f"{{small: {small}, large: {large}}}"))
    assert "by the times of first layers" not in said(f"{{large: {large}}}", "--no-forecast")
    assert "no forecast of cells of the variants all" in said(f"{{small: {small}}}"), "it has too few layers"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 2, "--machine small"),
        (("--machine", "medium"), 2, "known: small, large"),
        (("--on", "moon"), 2, "known: local, ray"),
        (("--on", "ray"), 4, "peftopt[ray]"),
        (("--on", "slurm:gpu"), 4, "peftopt[slurm]"),
    ],
)
def test_where_cells_cannot_run_is_said_before_anything_starts(
    grid: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for library in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, library, None)
    assert command("sweep", grid, *options, "--results", tmp_path / "results") == code
    assert words in errors(capsys)
    assert not (tmp_path / "results").exists()


def test_a_mistake_in_the_grid_is_named_by_line(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid.write_text(grid.read_text().replace("machines:", "machins:"))
    assert command("sweep", "status", grid) == 2
    assert "all.yaml:3" in (said := errors(capsys)) and "'machines'" in said


# ---- one job -------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    folder = tmp_path / "cell"
    folder.mkdir()
    return lambda *words: Job("cell", words, MachineClass("here"), folder, tmp_path / "results")


def test_a_command_that_fails_is_kept_with_what_it_said(job: Callable[..., Job], tmp_path: Path) -> None:
    ended = attempt.attempt(job("run", str(tmp_path / "no.yaml"), "--json"))
    assert ended.exit_code == 2 and "no.yaml" in ended.message and ended.hint
    assert cells.attempts(tmp_path / "cell") == [ended]
    assert "error:" in (tmp_path / "cell" / cells.LOG).read_text()


def test_what_another_process_measures_is_left_alone(job: Callable[..., Job], tmp_path: Path) -> None:
    owner = store.own(tmp_path / "cell")
    try:
        assert store.owner(tmp_path / "cell")
        ended = attempt.attempt(job("list", "--json"))
    finally:
        store.disown(owner)
    assert ended.exit_code == 4 and "being measured" in ended.message
    assert cells.attempts(tmp_path / "cell") == [], "it is no failure of the cell"
    assert store.owner(tmp_path / "cell") == ""


DRIVER = """
import signal, sys
from pathlib import Path
from peftopt.recipe.grid import MachineClass
from peftopt.runner import orphans
from peftopt.runner.cells import Job
from peftopt.runner.executors.attempt import attempt

signal.signal(signal.SIGINT, signal.default_int_handler)
orphans.watched()
folder, sys.executable = Path(sys.argv[1]), sys.argv[2]
attempt(Job("cell", (), MachineClass("here"), folder, folder))
"""
"""Runs a cell, whose command is what stands in the place of Python."""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_ends_takes_its_command_with_it(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    arguments = [sys.executable, "-c", DRIVER, str(tmp_path), str(tmp_path / "python")]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as driver:

        def begun() -> list[psutil.Process]:
            return [each for each in psutil.Process(driver.pid).children() if each.name() == "sleep"]

        wait_until(begun)
        (slept,) = begun()
        driver.send_signal(number)
        driver.wait(60)
    wait_until(lambda: not slept.is_running() or slept.status() == psutil.STATUS_ZOMBIE)


def test_results_that_are_copied_elsewhere_stand_where_they_stood(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "_run", lambda job: (2, b'{"error": {"message": "no", "hint": "yes"}}'))
    assert command("sweep", grid, "--results", tmp_path / "results", "--machine", "small", "--json") == 2
    here = told(capsys)
    shutil.copytree(tmp_path / "results", tmp_path / "copy")
    assert command("sweep", "status", grid, "--results", tmp_path / "copy", "--json") == 0
    assert told(capsys) == here
