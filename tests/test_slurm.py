"""Cells as jobs of Slurm: through submitit's own cluster, and with commands in the place of Slurm's."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.executors import MakeJob, check_a_small_machine_is_named, check_each_runs_once, jobs_below
from helpers.waiting import wait_until

from peftopt import store
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.recipe.grid import ANY, MachineClass
from peftopt.runner import cells
from peftopt.runner.executors import opened, slurm

pytest.importorskip("submitit")

SMALL = MachineClass("small")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "RESULT_S", 0.05)
    monkeypatch.setattr(slurm, "LOOK_S", 0.2)
    monkeypatch.setattr(slurm, "CANCELLED_S", 60.0)


@pytest.fixture
def job(tmp_path: Path) -> MakeJob:
    return jobs_below(tmp_path)


@pytest.fixture
def executor() -> Iterator[Any]:
    found = opened("submitit:local", "small")
    yield found
    found.close()


# ---- what every executor does --------------------------------------------------------------------


def test_each_cell_runs_once_and_says_how_it_ended(executor: Any, job: MakeJob) -> None:
    assert (executor.machines(SMALL), executor.machines(MachineClass("none"))) == (1, 0)
    check_each_runs_once(executor, job, SMALL, SMALL)


def test_a_machine_that_is_less_than_its_class_is_named(executor: Any, job: MakeJob) -> None:
    check_a_small_machine_is_named(executor, job)


def test_a_cell_whose_job_breaks_has_failed_and_the_others_go_on(executor: Any, job: MakeJob) -> None:
    broken, whole = job("broken", SMALL, "--version"), job("whole", SMALL, "--version")
    (broken.folder / ".owner").mkdir()  # where the lock's file would be
    for each in (broken, whole):
        executor.submit(each)
    ended = {each.name: attempt for each, attempt in (executor.wait() for _ in range(2))}
    assert (ended["broken"].exit_code, ended["whole"].exit_code) == (4, 0)
    assert ".owner" in ended["broken"].message


# ---- jobs that are ended from outside ------------------------------------------------------------

STUCK = """import os, pathlib, sys, time
while "peftopt.cli" in sys.orig_argv and pathlib.Path(os.environ["STUCK"]).exists():
    time.sleep(0.02)
"""
"""What each process of Python begins with here: a cell's command stands still as long as a file is there."""


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STUCK)
    file = tmp_path / "stuck"
    file.touch()
    monkeypatch.setenv("STUCK", str(file))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parent.parent, tmp_path / "site"))))
    return file


def running(folder: Path) -> psutil.Process:
    """The process that has taken a cell, once its command runs."""
    wait_until(lambda: store.owner(folder) and (folder / cells.LOG).exists())
    return psutil.Process(int(store.owner(folder).split()[1]))


def scripts(folder: Path) -> list[str]:
    return [each.read_text() for each in (folder / slurm.FOLDER).glob("*_submission.sh")]


@pytest.mark.parametrize(
    ("number", "codes"), [(signal.SIGKILL, [0]), (signal.SIGTERM, [130, 0]), (signal.SIGUSR2, [130, 0])]
)
def test_a_cell_whose_job_is_ended_from_outside_is_run_again(
    executor: Any, job: MakeJob, stuck: Path, number: signal.Signals, codes: list[int]
) -> None:
    cell = job("a", SMALL, "--version")
    executor.submit(cell)
    running(cell.folder).send_signal(number)
    stuck.unlink()
    assert executor.wait()[1].exit_code == 0
    assert [each.exit_code for each in cells.attempts(cell.folder)] == codes
    assert len(list((cell.folder / slurm.FOLDER).glob("*_submitted.pkl"))) == 2


def test_a_cell_whose_job_is_ended_again_and_again_has_failed(
    executor: Any, job: MakeJob, stuck: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "RETRIES", 0)
    cell = job("a", SMALL, "--version")
    executor.submit(cell)
    running(cell.folder).kill()
    assert "1 times from outside" in executor.wait()[1].message
    assert [each.exit_code for each in cells.attempts(cell.folder)] == [4]


# ---- commands in the place of Slurm's ------------------------------------------------------------

SBATCH = """
number = str(1 + len(list(home.glob("*.job"))))
words = {"SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
process = subprocess.Popen(["sh", sys.argv[1]], env={**os.environ, **words}, start_new_session=True, **nowhere)
(home / f"{number}.job").write_text(str(process.pid))
print("Submitted batch job", number)
"""
SQUEUE = """
for job in home.glob("*.job"):
    state, pid = job.with_suffix(".state"), int(job.read_text())
    lives = psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    print(job.stem, state.read_text() if state.exists() else "RUNNING" if lives else "FAILED", sep="|")
"""
SCANCEL = """
(home / f"{sys.argv[1]}.state").write_text("CANCELLED")
os.killpg(int((home / f"{sys.argv[1]}.job").read_text()), signal.SIGKILL)
"""
SRUN = """
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2 if words[0] in ("--output", "--error") else 1 :]
os.execvp(words[0], words)
"""
SINFO = "print((home / 'nodes').read_text())"
"""A Slurm that starts each job at once, on this machine, and says of it what a file says."""

NODES = """n1|p*|idle|8|gpu:a100:2(S:0-1)|small,x|1-00:00:00
n2|p*|mixed~|8|gpu:2|small|1-00:00:00
n3|p*|down*|8|gpu:2|small|1-00:00:00
n4|p*|allocated|4|(null)|mixed|infinite
n5|p*|idle|8|(null)|mixed|infinite
n5|q|idle|8|(null)|mixed|infinite
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the commands and of what they know."""
    home = tmp_path / "slurm"
    home.mkdir()
    (home / "nodes").write_text(NODES)
    head = f"#!{sys.executable}\nimport os, pathlib, signal, subprocess, sys\nimport psutil\n"
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL), ("srun", SRUN), ("sinfo", SINFO)):
        (home / name).write_text(f"{head}home = pathlib.Path({str(home)!r})\n{text}")
        (home / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    yield home
    for each in home.glob("*.job"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(each.read_text()), signal.SIGKILL)


def test_a_class_is_the_nodes_of_that_feature_that_take_jobs(home: Path) -> None:
    executor = opened("slurm:p", "")
    assert executor.machines(SMALL) == 2
    assert executor.machines(MachineClass("none")) == 0
    with pytest.raises(BadInput, match="4 processors and 0 GPUs, 8"):
        executor.machines(MachineClass("mixed"))
    assert len({node.name for node in executor.cluster.nodes(MachineClass(ANY))}) == 4


def test_a_job_takes_a_whole_node_of_its_class(home: Path, job: MakeJob, stuck: Path) -> None:
    stuck.unlink()
    executor, cell = opened("slurm:p", ""), job("a", SMALL, "--version")
    executor.submit(cell)
    (script,) = scripts(cell.folder)
    for line in ("exclusive", "partition=p", "constraint=small", "gpus-per-node=2", "mem=0", "time=1-00:00:00"):
        assert f"#SBATCH --{line}\n" in script
    assert executor.wait()[1].exit_code == 0


def test_the_job_of_a_sweep_that_was_killed_is_found_again(home: Path, job: MakeJob, stuck: Path) -> None:
    cell = job("a", SMALL, "--version")
    assert not opened("slurm:p", "").found(cell.folder)
    opened("slurm:p", "").submit(cell)
    running(cell.folder)
    again = opened("slurm:p", "")
    assert again.found(cell.folder)
    again.submit(cell)
    stuck.unlink()
    assert again.wait()[1].exit_code == 0
    assert len(scripts(cell.folder)) == 1
    assert len(cells.attempts(cell.folder)) == 1


@pytest.mark.parametrize(("state", "jobs", "code"), [("PREEMPTED", 2, 0), ("NODE_FAIL", 2, 0), ("CANCELLED", 1, 4)])
def test_only_what_the_cluster_did_is_tried_again(
    home: Path, job: MakeJob, stuck: Path, state: str, jobs: int, code: int
) -> None:
    executor, cell = opened("slurm:p", ""), job("a", SMALL, "--version")
    executor.submit(cell)
    running(cell.folder)
    os.killpg(int((home / "1.job").read_text()), signal.SIGKILL)
    (home / "1.state").write_text(state)
    stuck.unlink()
    assert executor.wait()[1].exit_code == code
    assert len(scripts(cell.folder)) == jobs


def test_a_cell_that_slurm_refuses_waits_for_the_end_of_another(home: Path, job: MakeJob, stuck: Path) -> None:
    executor = opened("slurm:p", "")
    refusal = "if list(home.glob('*.job')) and os.path.exists(os.environ['STUCK']):\n    sys.exit('too many')\n"
    (home / "sbatch").write_text((home / "sbatch").read_text().replace("number =", f"{refusal}number =", 1))
    for name in ("a", "b"):
        executor.submit(job(name, SMALL, "--version"))
    assert not (home / "2.job").exists()
    stuck.unlink()
    assert {executor.wait()[0].name, executor.wait()[0].name} == {"a", "b"}


class Submitted:
    """A job of submitit's of which it is counted how often somebody looks for its result."""

    def __init__(self, number: int, is_over: bool, state: str) -> None:
        self.job_id, self.is_over, self.state, self.looks = str(number), is_over, state, 0
        self.paths = self.result_pickle = self

    def exists(self) -> bool:
        self.looks += 1
        return self.is_over

    def result(self) -> cells.Attempt:
        return cells.Attempt("", 1.0, 0, "here")


def test_of_many_jobs_those_that_wait_are_hardly_looked_at(
    home: Path, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor: Any = opened("slurm:p", "")
    waiting = [Submitted(n, False, "PENDING") for n in range(20)]
    over = [Submitted(n, True, "COMPLETED") for n in range(20, 40)]
    jobs = {each: job(f"c{each.job_id}", SMALL) for each in (*waiting, *over)}
    executor.running = {its.name: (its, each) for each, its in jobs.items()}
    monkeypatch.setattr(executor.cluster, "states", lambda handles: {each.job_id: each.state for each in jobs})
    assert {executor.wait()[0].name for _ in over} == {jobs[each].name for each in over}
    assert {each.looks for each in jobs} == {1}, "one look finds all that have ended"
    monkeypatch.setattr(slurm, "LOOK_S", -1.0)
    waiting[0].is_over, waiting[0].state = True, "COMPLETED"
    assert executor.wait()[0] == jobs[waiting[0]]
    assert {each.looks for each in waiting[1:]} <= {1, 2}, "until Slurm has said that they wait"


def test_a_sweep_that_is_interrupted_cancels_its_jobs_and_names_those_that_go_on(
    home: Path, job: MakeJob, stuck: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "CANCELLED_S", 0.0)
    first, second = opened("slurm:p", ""), opened("slurm:p", "")
    first.submit(ends := job("a", SMALL, "--version"))
    running(ends.folder)
    assert first.close() == ""
    assert (home / "1.state").read_text() == "CANCELLED"
    second.submit(job("b", SMALL, "--version"))
    (home / "scancel").write_text("#!/bin/sh\n")
    assert "jobs 2;" in second.close()


def test_what_slurm_lacks_is_said_before_anything_starts(
    home: Path, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "nodes").write_text("")
    with pytest.raises(MissingEnvironment, match="no partition p"):
        opened("slurm:p", "")
    (home / "sinfo").write_text("#!/bin/sh\necho unreachable >&2\nexit 1\n")
    with pytest.raises(MissingEnvironment, match="sinfo failed: unreachable"):
        opened("slurm", "")
    (home / "sinfo").write_text(f"#!/bin/sh\ncat {home}/nodes\n")
    (home / "nodes").write_text(NODES)
    (home / "sbatch").write_text("#!/bin/sh\necho no such account >&2\nexit 1\n")
    with pytest.raises(MissingEnvironment, match="no such account"):
        opened("slurm:p", "").submit(job("a", SMALL, "--version"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingEnvironment, match="no Slurm here"):
        opened("slurm", "")
