"""A worker that hangs, dies or refuses becomes a named failure; nothing of it is left behind."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers.waiting import wait_until

from peftopt import environments, machine
from peftopt.errors import WorkerFailed
from peftopt.jobs import AliveJob, Answered, MemoryJob, OpenJob, QualityJob
from peftopt.measurements import Answer, as_json
from peftopt.progress import Reached
from peftopt.records import Model
from peftopt.runner import process
from peftopt.runner.process import WorkerProcess
from peftopt.worker import _failure

OPEN = OpenJob(plugin="eager", params={}, model=Model("x"))
ANSWER = Answer(
    row="1", tokens=(5, 6), new_tokens=3, stopped=True, correct=True, valid=True, score=1.0, critical=False, flags=()
)

pytestmark = pytest.mark.fresh_workers


def lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def fake(tmp_path: Path, script: str) -> WorkerProcess:
    """A stand-in for the worker's Python that runs a shell script instead."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return WorkerProcess(tmp_path / "logs" / "fake.log", 1, python=str(path))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sleep 60", "timeout"),
        ("kill -KILL $$", "killed (SIGKILL)"),
        ("kill -SEGV $$", "killed (SIGSEGV)"),
        ("exit 7", "died"),
        ("echo 'terminate called after throwing an instance of std::bad_alloc' >&2; kill -ABRT $$", "out of memory"),
        ("kill -ABRT $$", "killed (SIGABRT)"),
        ("ulimit -v 100000; exec {python} -c 'x = bytearray(10**10)'", "out of memory"),
        ("""read line; echo '{"failed": {"reason": "out of memory", "detail": "", "hint": ""}}'""", "out of memory"),
    ],
)
@pytest.mark.fault(12, "the variant failed: out of memory")
@pytest.mark.fault(13, "ended at its deadline: timeout")
@pytest.mark.fault(14, "the signal is named")
def test_each_way_to_fail_has_its_name(tmp_path: Path, script: str, reason: str) -> None:
    script = script.replace("{python}", sys.executable)
    with fake(tmp_path, script) as child, pytest.raises(WorkerFailed) as caught:
        child.ask(OPEN, 0.5 if reason == "timeout" else 30)
    assert caught.value.reason == reason


@pytest.mark.fault(2, "a worker that starts while the interrupt comes ends too")
def test_a_worker_that_starts_while_an_interrupt_comes_is_ended(tmp_path: Path) -> None:
    process.interrupt()
    try:
        with pytest.raises(KeyboardInterrupt), fake(tmp_path, "sleep 60") as child:
            child.ask(OPEN, 30)
        assert not lives(child.process.pid)
    finally:
        process.calm()


def test_what_an_earlier_worker_wrote_to_the_log_is_not_why_this_one_died(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "fake.log").write_text("MemoryError\n")
    with fake(tmp_path, "kill -ABRT $$") as child, pytest.raises(WorkerFailed, match="SIGABRT"):
        child.ask(OPEN, 30)


def test_a_worker_that_the_kernel_ended_for_lack_of_memory_is_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its control group counts; a worker that somebody else has killed is not one."""
    counts = iter([3, 4, 4, 4])
    monkeypatch.setattr(machine, "oom_kills", lambda: next(counts))
    for reason in ("out of memory", "killed (SIGKILL)"):
        with fake(tmp_path, "kill -KILL $$") as child, pytest.raises(WorkerFailed) as caught:
            child.ask(OPEN, 30)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("groups", "file", "text"),
    [
        ("0::/a/b\n", "a/b/memory.events", "low 0\noom 9\noom_kill 2\n"),
        ("0::/host/path\n", "memory.events", "oom_kill 2\n"),
        ("9:cpu:/a\n4:memory,hugetlb:/a\n", "memory/a/memory.oom_control", "under_oom 0\noom_kill 2\n"),
    ],
)
def test_the_kernels_own_count_is_read_from_either_version_of_control_groups(
    groups: str, file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    read, own = Path.read_text, Path("/proc/self/cgroup")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda path, *how: groups if path == own else read(path, *how))
    assert machine.oom_kills() == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
            "out of memory",
        ),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (ImportError("libgomp.so.1: cannot allocate memory in static TLS block"), "error"),
        (ValueError("a shape that does not fit"), "error"),
    ],
)
def test_a_lack_of_memory_is_called_so_with_the_workers_peak(error: Exception, reason: str) -> None:
    failed = _failure(error)
    assert failed.reason == reason and ("GiB at most" in failed.detail) == (reason == "out of memory")


def test_torchs_own_words_for_a_lack_of_memory_are_known() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert _failure(caught.value).reason == "out of memory"


def test_records_are_heard_before_the_answer(tmp_path: Path) -> None:
    heard: list[Answer] = []
    progress: list[Reached] = []
    answers = [ANSWER, replace(ANSWER, row="2")]
    first, second = (json.dumps({"record": as_json(answer)}) for answer in answers)
    script = f"""read line; echo '{first}'; echo '{{"progress": {{"phase": "asking", "done": 1, "total": 2}}}}'
    echo '{second}'; echo '{{"done": {{"rows": 2}}}}'"""
    with fake(tmp_path, script) as child:
        job = QualityJob(rows=(), new_tokens=4, batch=2)
        assert child.ask(job, 30, heard.append, progress.append) == Answered(2)
    assert (heard, progress) == (answers, [Reached("asking", 1, 2)])


def test_a_reply_that_is_not_what_the_job_answers_is_a_failure_that_names_the_field(tmp_path: Path) -> None:
    reply = """read line; echo '{"done": {"model_loading_time": 1.5, "threads": "all"}}'"""
    with fake(tmp_path, reply) as child, pytest.raises(WorkerFailed, match=r"open\.threads is not a whole number"):
        child.ask(OPEN, 30)


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_of_a_worker_wait_as_the_user_says_or_briefly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, str]
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    script = """read line; echo "{\\"done\\": {\\"problem\\": \\"$OMP_WAIT_POLICY/$GOMP_SPINCOUNT\\"}}" """
    with fake(tmp_path, script) as child:
        seen = child.ask(AliveJob(()), 30).problem
    assert seen == {(): "/2000", ("OMP_WAIT_POLICY",): "passive/", ("GOMP_SPINCOUNT",): "/7"}[tuple(own)]
    assert machine.describe()["openmp"] == (own or {"GOMP_SPINCOUNT": "2000"})


@pytest.mark.fault(15, "its whole group is ended")
def test_grandchildren_go_with_the_worker(tmp_path: Path) -> None:
    started = tmp_path / "grandchild"
    with fake(tmp_path, f"sleep 600 & echo $! > {started}; exit 0") as child, pytest.raises(WorkerFailed):
        wait_until(lambda: started.exists() and started.read_text().endswith("\n"))
        child.ask(OPEN, 0.1)  # the grandchild holds the pipe, so no end of it is read
    wait_until(lambda: not lives(int(started.read_text())))  # the kernel takes a moment to reap what was killed


@pytest.mark.fault(15, "the next one waits until the GPU has its memory back; what stays is flagged in each turn")
@pytest.mark.parametrize("looks", [3, 10**6], ids=["freed late", "never freed"])
def test_the_memory_that_a_worker_held_on_a_gpu_is_waited_for(
    looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that lists the ended worker for a few more looks, and one that lists it for ever."""
    asked, worker = tmp_path / "asked", tmp_path / "worker"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f'#!/bin/sh\necho >> {asked}\n[ $(wc -l < {asked}) -le {looks} ] && echo "$(cat {worker}), 512 MiB"\nexit 0\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine, "FREED_S", 0.5 if looks > 100 else 60.0)
    with fake(tmp_path, "cat > /dev/null") as child:
        worker.write_text(str(child.process.pid))
    told = len(asked.read_text().splitlines())
    assert told == looks + 1 if looks < 100 else 1 < told < looks


def test_a_real_worker_names_an_unknown_plug_in_and_goes_on(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path / "logs" / "real.log", 1) as child:
        with pytest.raises(WorkerFailed, match="no_such_engine"):
            child.ask(replace(OPEN, plugin="no_such_engine"), 120)
        assert child.ask(MemoryJob(), 120).peak_memory_bytes > 0


def test_a_worker_runs_in_another_environments_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTOPT_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(WorkerFailed, match="missing environment"):
        environments.python("bare")
    venv.create(tmp_path / "bare", symlinks=True)
    bare = WorkerProcess(tmp_path / "logs" / "bare.log", 1, python=environments.python("bare"))
    with bare as child, pytest.raises(WorkerFailed) as caught:  # nothing is installed there, and it says so itself
        assert child.ask(MemoryJob(), 120).peak_memory_bytes > 0
        child.ask(OPEN, 120)
    assert (caught.value.reason, caught.value.hint) == ("missing library", "pip install torch")


def test_another_environments_python_finds_peftopt_and_none_of_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an installed peftopt lie the main environment's libraries, other versions of the environment's own."""
    monkeypatch.setenv("PEFTOPT_ENVIRONMENTS", str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    venv.create(tmp_path / "bare", symlinks=True)
    there = environments.python("bare")
    code = "import importlib.util as u; print([u.find_spec(name) is not None for name in ('peftopt', 'torch')])"
    for found in (environments.variables(there), environments.variables(there)):  # the second finds the first's link
        said = subprocess.run([there, "-P", "-c", code], env=found, capture_output=True, text=True, check=True).stdout
        assert said.strip() == "[True, False]"


LOADED = """
import signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
from peftopt import machine
from peftopt.engines._server import Server, free_port

if sys.argv[1] == "parent":
    subprocess.run([sys.executable, __file__, "worker", sys.argv[2]])
machine.die_with_parent(signal.SIGKILL)  # as a worker does
url = f"http://127.0.0.1:{free_port()}"
server = Server([sys.executable, "-c", "import time; time.sleep(600)"], {}, url, Path(sys.argv[2]))
print(server.processes()[0], flush=True)
time.sleep(600)
"""


@pytest.mark.fault(1, "a server ends with its worker, and that with peftopt")
def test_a_killed_parent_leaves_no_server_behind(tmp_path: Path) -> None:
    """The parent has no chance to say goodbye; its worker goes with it, and the worker's server with that."""
    script = tmp_path / "loaded.py"
    script.write_text(LOADED)
    command = [sys.executable, str(script), "parent", str(tmp_path / "server.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        server = int(parent.stdout.readline())
        assert lives(server)
        parent.kill()
        wait_until(lambda: not lives(server))  # it does not outlive the process that it was started for
