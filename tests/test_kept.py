"""Runs and artifacts of a results folder: what is listed, and what may go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.command_line import command, errors
from helpers.finished_runs import finished_run

from peftopt import store
from peftopt.records import Build, Model, Step
from peftopt.runner import kept

DAY = 86_400


@pytest.fixture
def results(tmp_path: Path, tiny_base: Path, tiny_lora: Path) -> Path:
    """A finished run with its artifact, and an artifact that no run uses, two days old."""
    finished_run(tmp_path, tiny_base, tiny_lora)
    build = Build("ff" * 32, "", Step("int8", "transform", "quantize"))

    def make(out: Path) -> tuple[Model, dict[str, float]]:
        out.mkdir()
        (out / "weights").write_bytes(bytes(1000))
        return Model(str(out)), {"seconds": 1.0}

    store.Store(tmp_path).build(build, make)
    age(store.Store(tmp_path).folder(build.id), 2 * DAY)
    return tmp_path


def age(folder: Path, seconds: float) -> None:
    for entry in (*folder.iterdir(), folder):
        then = entry.stat().st_mtime - seconds
        os.utime(entry, (then, then))


def folders(results: Path) -> set[str]:
    return {manifest.parent.name[:4] for manifest in (results / "artifacts").glob("*/*/artifact.json")}


def cleaned(results: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, list[str]]:
    capsys.readouterr()
    assert command("clean", "--results", results, "--json", *options) == 0
    listed: dict[str, list[str]] = json.loads(capsys.readouterr().out)
    return listed


def test_only_what_no_run_uses_goes_and_only_when_asked(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = folders(results)
    listed = cleaned(results, capsys)
    assert [Path(folder).name[:4] for folder in listed["artifacts"]] == ["ffff"] and listed["runs"] == []
    assert folders(results) == before, "nothing is touched without --delete"
    cleaned(results, capsys, "--delete")
    assert folders(results) == before - {"ffff"} and folders(results)


@pytest.mark.parametrize(
    ("options", "goes"),
    [(("--older", "3d"), False), (("--older", "1d"), True), (("--over", "1GB"), False), (("--over", "0MB"), True)],
)
def test_age_and_size_say_how_much_goes(
    results: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], goes: bool
) -> None:
    assert bool(cleaned(results, capsys, *options)["artifacts"]) == goes


def test_old_runs_go_with_what_only_they_use_and_the_newest_stays(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = (results / "runs").iterdir()
    newer = run.with_name("20261129T120000-tiny")
    newer.mkdir()
    (newer / "plan.json").write_text((run / "plan.json").read_text())
    for folder in (run, newer):
        age(folder, 9 * DAY)
    listed = cleaned(results, capsys, "--runs-older", "7d", "--delete")
    assert [Path(folder).name for folder in listed["runs"]] == [run.name]
    assert [folder.name for folder in (results / "runs").iterdir()] == [newer.name]
    assert len(folders(results)) == 1, "the newest run uses the same merge"


def test_a_run_that_cannot_be_read_keeps_everything(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = (results / "runs").iterdir()
    (run / "plan.json").write_text("{")
    assert cleaned(results, capsys)["artifacts"] == []
    (found,) = kept.runs(results)
    assert found.outcome == "unreadable"


def test_what_a_dead_builder_left_goes_and_a_living_ones_stays(results: Path) -> None:
    dead, living = (results / "artifacts" / "ff" / f"abcd.tmp.{pid}" for pid in (2**22 + 1, os.getpid()))
    for folder in (dead, living):
        folder.mkdir()
    assert [each.folder for each in kept.artifacts(results, []) if each.what == "half built"] == [dead]


def test_runs_are_listed_with_what_they_decided(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("runs", "--results", results, "--json") == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["outcome"] == "accepted" and run["chosen"] == "merged" and run["variants"] == 3 and run["artifacts"]
    assert command("runs", "--results", results) == 0
    assert "merged" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["", "50", "120"])
def test_a_list_is_as_wide_as_the_terminal(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert command("list", "--json") == 0
    named = json.loads(capsys.readouterr().out)
    assert command("list") == 0
    out = capsys.readouterr().out
    widths = [len(line) for line in out.splitlines()]
    assert max(widths) <= int(columns or 80) and max(widths) > int(columns or 80) - 20
    words = " ".join(out.split())
    assert all(f"{name} {' '.join(text.split())}" in words for kind in named.values() for name, text in kind.items())


def test_list_names_what_a_recipe_can_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("list", "--json") == 0
    named = json.loads(capsys.readouterr().out)
    assert "merge" in named["techniques"] and "vllm" in named["engines"] and "quick" in named["recipes"]
    assert all(text for names in named.values() for text in names.values())
    assert command("list", "engines") == 0
    assert "vllm" in capsys.readouterr().out
    assert command("list", "nothing") == 2
    assert "engines" in errors(capsys)
    assert command("clean", "--over", "much") == 2


def test_a_run_that_was_interrupted_stays_unfinished_whatever_was_decided_of_it(results: Path) -> None:
    (run,) = kept.runs(results)
    assert run.outcome != "unfinished"
    (run.folder / store.OWNER).touch()
    assert [each.outcome for each in kept.runs(results)] == ["unfinished"]
    (run.folder / store.FINISHED).touch()
    assert [each.outcome for each in kept.runs(results)] == [run.outcome]
