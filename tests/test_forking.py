"""Workers and servers that begin as copies of a fork server: processes of their own that end with it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers.forked import workers
from helpers.waiting import wait_until

from peftopt import environments, forking
from peftopt.corpus import Row
from peftopt.engines._server import Server, free_port
from peftopt.errors import WorkerFailed
from peftopt.forking import Copy, ForkServer, pages
from peftopt.jobs import MemoryJob, OpenJob, PrepareJob, QualityJob
from peftopt.measurements import Answer
from peftopt.records import Model
from peftopt.runner import process
from peftopt.runner.process import WorkerProcess

pytestmark = [
    pytest.mark.fresh_workers,
    pytest.mark.skipif(not workers(), reason="processes cannot begin as copies here"),
]

PROGRAM = """
import json, os, signal, sys, time
print(json.dumps({"arguments": sys.argv[1:], "folder": os.getcwd(), "variable": os.environ.get("OWN"),
                  "pid": os.getpid(), "session": os.getsid(0), "json": "json.decoder" in sys.modules}), flush=True)
what = sys.stdin.readline().strip()
if what == "raise": raise ValueError("by itself")
if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
if what == "sleep": time.sleep(600)
sys.exit(int(what))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkServer]:
    """A fork server whose copies can run `program`."""
    (tmp_path / "program.py").write_text(PROGRAM)
    with ForkServer(["json.decoder"], {**environments.variables(), "OWN": "its"}, tmp_path / "forks.log") as server:
        yield server


def program(server: ForkServer, folder: Path, *arguments: str) -> Copy:
    variables = {**environments.variables(), "PYTHONPATH": str(folder), "OWN": "mine"}
    with (folder / "errors").open("wb") as errors:
        return server.piped(["program", *arguments], errors.fileno(), variables, folder)


def told(copy: Copy, line: str) -> int:
    assert copy.stdin
    copy.stdin.write(f"{line}\n".encode())
    copy.stdin.flush()
    return copy.wait(30)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("line", "code"), [("0", 0), ("7", 7), ("kill", -signal.SIGKILL), ("raise", 1)])
def test_a_copy_is_a_process_of_its_own_that_tells_how_it_ended(
    server: ForkServer, tmp_path: Path, line: str, code: int
) -> None:
    copy = program(server, tmp_path, "--one", "two")
    assert copy.stdout
    said = json.loads(copy.stdout.readline())
    assert said == {
        **{"arguments": ["--one", "two"], "folder": str(tmp_path), "variable": "mine"},
        **{"pid": copy.pid, "session": copy.pid, "json": True},
    }
    assert copy.poll() is None
    assert told(copy, line) == copy.returncode == copy.poll() == code
    assert ("by itself" in (tmp_path / "errors").read_text()) == (line == "raise")


def test_a_copy_that_runs_can_be_killed_and_waited_for(server: ForkServer, tmp_path: Path) -> None:
    first, second = program(server, tmp_path), program(server, tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.1)
    first.kill()
    assert first.wait(30) == -signal.SIGKILL
    assert lives(second.pid), "the other copy goes on"
    first.kill()  # nothing is there any more
    assert told(second, "3") == 3


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_copies_end_with_their_fork_server(server: ForkServer, tmp_path: Path, how: str) -> None:
    copy = program(server, tmp_path)
    assert copy.stdout and copy.stdout.readline()
    assert server.process
    if how == "closed":
        server.close()
    else:
        server.process.kill()
    assert copy.wait(30) == -signal.SIGKILL
    wait_until(lambda: not lives(copy.pid))
    with pytest.raises(ChildProcessError):
        program(server, tmp_path)


OWNER = """
import sys, time
from pathlib import Path
from peftopt import forking
from peftopt.runner.process import WorkerProcess, fork_server
with fork_server(Path(sys.argv[1]) / "forks.log", 1) as forks:
    forks.imported = ()
    with WorkerProcess(Path(sys.argv[1]) / "worker.log", 1, forks=forks) as worker:
        print(forks.process.pid, worker.process.pid, flush=True)
        time.sleep(600)
"""


def test_nothing_outlives_a_peftopt_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environments.variables()) as owner:
        assert owner.stdout
        started = [int(word) for word in owner.stdout.readline().split()]
        assert len(started) == 2 and all(map(lives, started))
        owner.kill()
    wait_until(lambda: not any(map(lives, started)))


def answers(worker: WorkerProcess, model: Model) -> list[Answer]:
    said: list[Answer] = []
    worker.ask(PrepareJob(plugin="eager", model=model), 300)
    worker.ask(OpenJob(plugin="eager", model=model, params={}), 300)
    rows = (Row("1", ({"role": "user", "content": "hello there"},)),)
    job = QualityJob(rows=rows, new_tokens=8, batch=1)
    worker.ask(job, 300, said.append)
    return said


def test_a_worker_that_is_a_copy_answers_like_one_from_nothing(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    model = Model(str(tiny_base), (str(tiny_lora),))
    with process.fork_server(tmp_path / "forks.log", 1) as forks, WorkerProcess(tmp_path / "a", 1) as fresh:
        assert forks
        with WorkerProcess(tmp_path / "b", 1, forks=forks) as copied:
            assert copied.process.pid in {c.pid for c in psutil.Process(forks.process.pid).children(recursive=True)}
            assert answers(copied, model) == answers(fresh, model)
            peaks = [each.ask(MemoryJob(), 30).peak_memory_bytes for each in (copied, fresh)]
            assert peaks[0] == pytest.approx(peaks[1], rel=0.05), "a copy has the pages of libraries too"
            assert 0 < copied.cpu_s() < fresh.cpu_s(), "the imports are not its own"
            copied.kill()
            with pytest.raises(WorkerFailed) as caught:
                copied.ask(MemoryJob(), 30)
            assert caught.value.reason == "killed (SIGKILL)"
        forks.process.kill()
        with WorkerProcess(tmp_path / "c", 1, forks=forks) as anyway:
            assert anyway.ask(MemoryJob(), 60).peak_memory_bytes


def test_a_server_that_is_a_copy_answers_and_ends(tiny_base: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [*environments.module("peftopt.server"), "--base", str(tiny_base), "--port", str(port), "--threads", "1"]
    with process.fork_server(tmp_path / "forks.log", 1) as forks:
        assert forks
        server = Server(command, environments.variables(), f"http://127.0.0.1:{port}", tmp_path / "log", forks)
        try:
            server.ready(120)
            assert server.alive() and forks.process
            family = {child.pid for child in psutil.Process(forks.process.pid).children(recursive=True)}
            assert set(server.processes()) <= family
        finally:
            server.stop()
        assert not server.alive()
        assert "exit status 0" in server.why()


def test_the_read_only_pages_of_files_are_found() -> None:
    maps = """\
7f0000000000-7f0000004000 r--p 00000000 fe:00 123 /lib/libtorch.so
7f0000004000-7f0000008000 r-xp 00004000 fe:00 123 /lib/libtorch.so
7f0000008000-7f000000c000 rw-p 00008000 fe:00 123 /lib/libtorch.so
7f000000c000-7f0000010000 r--p 00000000 00:00 0
7ffff7fc1000-7ffff7fc5000 r--p 00000000 00:00 0 [vvar]"""
    assert list(pages.mapped(maps)) == [(0x7F0000000000, 0x7F0000004000), (0x7F0000004000, 0x7F0000008000)]
    found = pages.resident()
    assert found and all(start < end and not (end - start) % pages.PAGE for start, end in found)
    pages.populate(found)


def test_no_process_is_a_copy_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(forking.machine, "gpus", lambda: [object()])
    with process.fork_server(tmp_path / "forks.log", 1) as forks:
        assert forks is None
