"""A run's folder has one owner at a time, and reading it never writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import command, errors
from helpers.finished_runs import finished_run

from peftopt import store
from peftopt.errors import MissingEnvironment

HOLDER = """
import sys
from pathlib import Path
from peftopt import store
owner = store.own(Path(sys.argv[1]))
print("mine", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> Path:
    folder = finished_run(tmp_path / "results", tiny_base, tiny_lora, built=False)
    (folder / "machine.json").write_text("{}")
    return folder


@pytest.mark.fault(8, "a second one on the same run is told which process measures, exit 4")
@pytest.mark.fault(9, "the run of a process that has died is taken over, with notice")
def test_a_second_process_is_told_who_measures_and_a_killed_owner_is_taken_over_from(tmp_path: Path) -> None:
    command_line = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "mine\n"
        with pytest.raises(MissingEnvironment, match=f"process {holder.pid} on "):
            store.own(tmp_path)
        holder.kill()
    said: list[str] = []
    owner = store.own(tmp_path, said.append)
    assert len(said) == 1 and f"process {holder.pid}" in said[0]
    store.disown(owner)
    store.disown(store.own(tmp_path, said.append))
    assert len(said) == 1, "who gives it back leaves nothing to take over"


@pytest.mark.fault(7, "who reads drops it with notice, who goes on measuring cuts it off")
def test_reading_leaves_a_torn_line_and_the_owner_cuts_it_off(run: Path) -> None:
    lines = run / "measurements.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole + b'{"format": 1, "pro')
    said: list[str] = []
    kept = store.read(lines, said.append)
    assert len(kept) == whole.count(b"\n") and "torn" in said[0]
    assert lines.read_bytes() != whole, "who only reads changes nothing"
    store.cut_torn_line(lines)
    assert lines.read_bytes() == whole


@pytest.mark.fault(10, "removed where the owner is dead, and only there")
def test_what_killed_processes_left_is_removed_and_the_living_keep_theirs(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    orphan, living = tmp_path / f".a.json.{dead.pid}.tmp", tmp_path / f".a.json.{os.getppid()}.tmp"
    other = tmp_path / f".b.json.{dead.pid}.tmp"
    for file in (orphan, living, other):
        file.write_text("half")
    store.write(tmp_path / "a.json", "whole")
    assert not orphan.exists() and living.exists() and other.exists()


@pytest.mark.fault(11, "an artifact whose manifest is damaged is set aside and built again, with notice")
def test_a_manifest_that_cannot_be_read_is_set_aside_and_built_again(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    home = store.Store(tmp_path / "results")
    run = finished_run(home.root, tiny_base, tiny_lora)
    build = store.read_plan(run / "plan.json").builds[0]
    manifest = home.folder(build.id) / store.MANIFEST
    whole = manifest.read_text()
    flipped = whole.replace('"seconds": 1', '"seconds": 9')
    assert flipped != whole
    for broken in (whole[: len(whole) // 2], "", "[]", '{"content": 5}', flipped, None):
        kept = home.folder(build.id).with_name("kept")
        shutil.copytree(home.folder(build.id), kept)
        manifest.unlink() if broken is None else manifest.write_text(broken)
        said: list[str] = []
        assert store.Store(home.root, said.append).find(build) is None
        assert len(said) == 1 and "building it again" in said[0]
        kept.rename(home.folder(build.id))
    assert home.find(build) is not None


@pytest.mark.parametrize("broken", ["", "[]", "{", '"\\ud800"', "[" * 100_000])
def test_a_broken_machine_file_is_the_users_to_mend(run: Path, broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "machine.json").write_text(broken)
    assert command("decide", run) == 2
    assert "machine.json" in errors(capsys)


def test_a_report_of_a_run_without_a_decision_says_how_to_decide(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "decision.json").unlink()
    assert command("report", run) == 2
    assert "peftopt decide" in errors(capsys)
