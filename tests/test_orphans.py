"""What is left of processes that were killed: no process lives on, what they wrote half is removed and its size told,
and their locks hold nobody up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.command_line import RECIPE, command, errors, prompts
from helpers.forked import COMMANDS, workers
from helpers.sweeps import lives
from helpers.waiting import wait_until

from peftopt import scratch, store
from peftopt.errors import WorkerFailed
from peftopt.jobs import MemoryJob
from peftopt.records import Build, Step
from peftopt.runner.judged import read_recipe
from peftopt.runner.process import WorkerProcess
from peftopt.runner.run import planned

BUILD = Build("ab" + "0" * 62, "", Step("merge", "transform", "merge"))

PARENT = """
import sys, time
from pathlib import Path
from peftopt.runner.process import WorkerProcess

worker = WorkerProcess(Path(sys.argv[1]) / "worker.log", 1, python=sys.argv[2])
print(worker.process.pid, flush=True)
time.sleep(600)
"""
"""A peftopt that has just started a worker."""

HOLDER = """
import sys
from pathlib import Path
from peftopt import store
from peftopt.records import Build, Step

build = Build(sys.argv[2], "", Step("merge", "transform", "merge"))
with store.Store(Path(sys.argv[1])).locked(build):
    print("mine", flush=True)
    sys.stdin.read()
"""


def python(tmp_path: Path, script: str) -> Path:
    """A stand-in for a worker's Python that runs a shell script instead."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@contextmanager
def holding(results: Path, build: str) -> Iterator[subprocess.Popen[str]]:
    """A process that builds an artifact for as long as this goes on."""
    words = [sys.executable, "-c", HOLDER, str(results), build]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "mine\n"
        try:
            yield holder
        finally:
            holder.kill()


# ---- processes ---------------------------------------------------------------------------------


@pytest.mark.fresh_workers
@pytest.mark.fault(15, "what it has started is ended with it, in whatever session it is")
def test_a_grandchild_in_a_session_of_its_own_ends_with_the_worker(tmp_path: Path) -> None:
    started = tmp_path / "grandchild"
    script = f"setsid sh -c 'echo $$ > {started}; exec sleep 600' </dev/null >/dev/null 2>&1 & read line; exit 0"
    with WorkerProcess(tmp_path / "logs" / "fake.log", 1, python=str(python(tmp_path, script))) as worker:
        wait_until(lambda: started.exists() and started.read_text().endswith("\n"))
        with pytest.raises(WorkerFailed):
            worker.ask(MemoryJob(), 30)
    assert not lives(int(started.read_text()))


@pytest.mark.fault(1, "no worker and nothing that a worker has started outlives a killed peftopt")
def test_nothing_outlives_a_peftopt_that_is_killed_when_it_has_just_started_a_worker(tmp_path: Path) -> None:
    """The worker is a shell script: it asks for no signal at its parent's death, and reads no input that ends."""
    started = tmp_path / "grandchild"
    script = f"setsid sh -c 'echo $$ > {started}; exec sleep 600' </dev/null >/dev/null 2>&1 & exec sleep 600"
    words = [sys.executable, "-c", PARENT, str(tmp_path), str(python(tmp_path, script))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        worker = int(parent.stdout.readline())
        wait_until(lambda: started.exists() and started.read_text().endswith("\n"))
        grandchild = int(started.read_text())
        assert lives(worker) and lives(grandchild)
        parent.kill()
    wait_until(lambda: not lives(worker) and not lives(grandchild))


# ---- locks -------------------------------------------------------------------------------------


@pytest.mark.fault(8, "the second waits, and says for which process")
def test_who_waits_for_an_artifact_is_told_who_builds_it_and_may_stop_waiting(tmp_path: Path) -> None:
    said: list[str] = []
    home = store.Store(tmp_path, said.append)
    with holding(tmp_path, BUILD.id) as holder:
        with pytest.raises(KeyboardInterrupt), home.locked(BUILD, lambda within: True):
            pytest.fail("another process has it")
        assert len(said) == 1 and f"is being built by process {holder.pid} on " in said[0]


@pytest.mark.fault(9, "the lock of a process that has died is taken over, with notice")
def test_the_lock_of_a_dead_builder_is_taken_over_and_a_finished_ones_is_not_mentioned(tmp_path: Path) -> None:
    said: list[str] = []
    home = store.Store(tmp_path, said.append)
    with holding(tmp_path, BUILD.id) as holder:
        pass
    with home.locked(BUILD):
        assert len(said) == 1 and f"process {holder.pid} on " in said[0] and "taken over" in said[0]
    with pytest.raises(WorkerFailed), home.locked(BUILD):
        raise WorkerFailed("timeout")
    with home.locked(BUILD):
        assert len(said) == 1, "who fails and lives has left nothing"


@pytest.mark.fault(2, "a run that waits for another's build stops too")
def test_a_run_that_waits_for_anothers_build_stops_at_ctrl_c(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    questions = prompts(tmp_path / "eval.jsonl", 8, "eval")
    recipe.write_text(RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=questions))
    first = planned(read_recipe(recipe)[0]).plan.builds[0]
    results = tmp_path / "results"
    with holding(results, first.id) as holder:
        asked = ("peftopt.cli", "run", recipe, "--results", results, "--quiet", "--no-forecast")
        process = COMMANDS.begin(tmp_path / "said", *asked, workers=workers())
        try:
            waits = f"is being built by process {holder.pid} on "
            wait_until(lambda: waits in " ".join((tmp_path / "said").read_text().split()), seconds=300)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said and "interrupted" in said


# ---- files -------------------------------------------------------------------------------------


def dead() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


@pytest.mark.fault(10, "temporary folders of the dead are removed when the next one starts, and their size told")
def test_what_a_killed_peftopt_left_in_the_temporary_folder_is_removed_with_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    gone, log, others = (tmp_path / f"peftopt-{number}-abc" for number in (dead(), dead(), os.getppid()))
    for folder, name in ((gone, "model.safetensors"), (log, "merge.log"), (others, "model.safetensors")):
        folder.mkdir()
        (folder / name).write_bytes(b"x" * 2_000_000)
    stranger = tmp_path / "peftopt-mine"
    stranger.mkdir()
    said: list[str] = []
    with scratch.temporary(said.append) as mine:
        assert not gone.exists() and log.exists() and others.exists() and stranger.exists()
        assert len(said) == 1 and "2.00 MB" in said[0] and str(tmp_path) in said[0]
        os.utime(log / "merge.log", (0, 0))
        renamed = mine.rename(tmp_path / f"peftopt-{dead()}-mine")
        scratch.folder(said.append)
        assert not log.exists() and renamed.exists(), "a lock tells who lives, though the number says otherwise"


@pytest.mark.fault(10, "what an interrupted build left is removed when the next run starts, and its size told")
def test_half_built_artifacts_are_removed_at_the_start_and_those_being_built_stay(tmp_path: Path) -> None:
    said: list[str] = []
    home = store.Store(tmp_path, said.append)
    other = Build("cd" + "0" * 62, "", Step("merge", "transform", "merge"))
    halves = [home.folder(build.id).with_name(f"{build.id}.tmp.{os.getppid()}") for build in (BUILD, other)]
    for half in halves:
        half.mkdir(parents=True)
        (half / "model.safetensors").write_bytes(b"x" * 1_000_000)
    with holding(tmp_path, other.id):
        home.clear()
    assert [half.exists() for half in halves] == [False, True]
    assert len(said) == 1 and "1.00 MB" in said[0]


@pytest.mark.fault(10, "what an interrupted merge left beside its folder is removed by the next, and its size told")
def test_a_merge_says_how_much_a_killed_one_had_left(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / f".out.{dead()}.abc"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"x" * 3_000_000)
    words = ("--base", tiny_base, "--adapter", tiny_lora, "--out", tmp_path / "out", "--certify", "blocks")
    assert command("merge", *words) == 0
    assert not left.exists() and "removed 3.00 MB" in errors(capsys)
