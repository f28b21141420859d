"""Faults that no other file injects: the second Ctrl-C, a death that is tried again, a clock that steps back, models
and adapters that are none. And the list of all: docs/faults.md is made of the marks of the tests."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from helpers.command_line import RECIPE, command, errors, prompts
from helpers.forked import COMMANDS, workers
from helpers.servers import served
from helpers.waiting import wait_until

from peftopt import store
from peftopt.errors import WorkerFailed
from peftopt.runner import run as runs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> Path:
    """A recipe beside copies of its base and adapter, which a test may spoil."""
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copytree(tiny_lora, tmp_path / "lora")
    questions = prompts(tmp_path / "eval.jsonl", 8, "eval")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(base=tmp_path / "base", adapter=tmp_path / "lora", prompts=questions))
    return path


# ---- the list ----------------------------------------------------------------------------------


def test_every_fault_of_the_list_has_a_test() -> None:
    listed = yaml.safe_load((ROOT / "tests" / "data" / "faults.yaml").read_text())
    marked = runpy.run_path(str(ROOT / "docs" / "generate.py"))["marked_faults"]()
    assert list(listed) == list(range(1, 41))
    assert sorted(marked) == list(listed), "a mark of a fault that is not listed, or a fault without a test"


# ---- signals -----------------------------------------------------------------------------------


@pytest.mark.fault(2, "the second one does not wait for what the first would; what was measured is whole")
def test_a_second_ctrl_c_ends_a_run_at_once_and_leaves_nothing_running(recipe: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    asked = ("peftopt.cli", "run", recipe, "--results", results, "--quiet", "--no-forecast")
    process = COMMANDS.begin(tmp_path / "said", *asked, workers=workers())
    try:
        wait_until(lambda: list(results.glob("runs/*/logs/quality-*")) or process.poll() is not None, seconds=300)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (130, -signal.SIGINT)
    finally:
        process.kill()
    assert "Traceback" not in (tmp_path / "said").read_text()
    wait_until(lambda: not working_in(results))
    (run,) = (results / "runs").iterdir()
    said: list[str] = []
    assert store.read(run / "measurements.jsonl", said.append) is not None
    assert not store.is_finished(run)


def working_in(folder: Path) -> list[int]:
    """The processes whose working folder lies there, as those of workers do."""
    found = psutil.process_iter(["cwd"])
    return [process.pid for process in found if str(process.info["cwd"] or "").startswith(str(folder))]


class Heard:
    """A run that remembers its failures and what its listener was told."""

    def __init__(self) -> None:
        self.failed: list[tuple[str, str, str]] = []
        self.warned: list[str] = []
        self.listener = SimpleNamespace(warn=self.warned.append)

    def fail(self, variant: str, stage: str, error: WorkerFailed) -> None:
        self.failed.append((variant, stage, error.reason))


@pytest.mark.fault(14, "one more try in a clean process, then the variant failed")
@pytest.mark.parametrize(
    ("deaths", "tries", "failed"),
    [
        (["killed (SIGSEGV)"], 2, False),
        (["died"], 2, False),
        (["killed (SIGKILL)", "killed (SIGKILL)"], 2, True),
        (["timeout"], 1, True),
        (["out of memory"], 1, True),
    ],
)
def test_a_worker_that_died_is_tried_once_more(deaths: list[str], tries: int, failed: bool) -> None:
    run, count = Heard(), 0

    def attempt() -> None:
        nonlocal count
        count += 1
        if count <= len(deaths):
            raise WorkerFailed(deaths[count - 1])

    assert runs.try_twice(run, "merged", "speed", attempt) is not failed  # type: ignore[arg-type]
    assert count == tries and len(run.warned) == tries - 1
    assert run.failed == ([("merged", "speed", deaths[-1])] if failed else [])


# ---- clocks ------------------------------------------------------------------------------------


@pytest.mark.fault(17, "times are of the monotonic clock: none is negative, and none is another")
def test_a_wall_clock_that_steps_back_changes_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, first = time.time(), time.monotonic()
    monkeypatch.setattr(time, "time", lambda: now - 3600 * (time.monotonic() - first))
    out = tmp_path / "measurements.jsonl"
    questions = prompts(tmp_path / "eval.jsonl", 5, "eval")
    with served() as server:
        words = ("--prompts", questions, "--requests", 20, "--rate", 100, "--model", "support", "--new-tokens", 4)
        assert command("load", server.url, *words, "--out", out, "--quiet") == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    requests = line["values"]["requests"]
    times = [value for each in requests for key, value in each.items() if key.endswith("_ms") and value is not None]
    flat = [number for value in times for number in (value if isinstance(value, list) else [value])]
    assert len(requests) >= 20 and flat and min(flat) >= 0 and max(flat) < 600_000


# ---- models and adapters that are none -----------------------------------------------------------


def settings(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.fault(32, "refused with what is supported")
@pytest.mark.parametrize("names", [["BertForMaskedLM"], ["T5ForConditionalGeneration"], ["WhateverModel"], [], None])
def test_what_is_not_a_causal_language_model_is_refused(
    names: object, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(recipe.parent / "base" / "config.json", architectures=names)
    assert command("check", recipe) == 2
    said = errors(capsys)
    assert "not a causal language model" in said and "ForCausalLM" in said


@pytest.mark.fault(22, "a rank or a target that its weights do not have is refused")
@pytest.mark.parametrize("change", [{"r": 8}, {"target_modules": ["q_proj"]}])
def test_a_config_that_its_weights_do_not_fit_is_refused(
    change: dict[str, Any], tiny_base: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = recipe.parent / "lora"
    settings(lora / "adapter_config.json", **change)
    out = recipe.parent / "out"
    assert command("merge", "--base", tiny_base, "--adapter", lora, "--out", out, "--certify", "blocks") == 2
    assert "lora" in errors(capsys) and not out.exists()
