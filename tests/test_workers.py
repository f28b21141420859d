"""`peftopt serve --workers`: several processes on one port are one gateway, over sockets, before a paced engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.gateways import BIG_S, HTTP, Gateway, changed, held, is_ready, serving
from helpers.paced import Paced, paced
from helpers.waiting import wait_until
from hypothesis import given
from hypothesis import strategies as st

from peftopt.engines._server import free_port
from peftopt.errors import BadInput
from peftopt.gateway.keys import Key, Keys
from peftopt.gateway.limits import Limits
from peftopt.gateway.lines import Line, Log
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.workers import shares, sums

WORKERS = 2


@pytest.fixture
def engine() -> Iterator[Paced]:
    with paced() as engine:
        yield engine


@pytest.fixture
def two(tiny_lora: Path, tmp_path: Path) -> tuple[Path, Path]:
    return changed(tiny_lora, tmp_path / "one", 1.0), changed(tiny_lora, tmp_path / "two", 2.0)


@contextlib.contextmanager
def several(where: Path, engine: Paced, *arguments: object, **more: Any) -> Iterator[Gateway]:
    """A gateway of two workers, which have both joined."""
    with serving(where, "--upstream", engine.url, "--workers", WORKERS, *arguments, **more) as gateway:
        wait_until(lambda: len(by_worker(gateway)) == WORKERS)
        yield gateway


def by_worker(gateway: Gateway) -> dict[str, float]:
    """Requests that run, by worker."""
    lines = HTTP.get(f"{gateway.url}/metrics").text.splitlines()
    found = [line.rsplit(" ", 1) for line in lines if line.startswith("peftopt_running{")]
    return {name.partition('worker="')[2].rstrip('"}'): float(value) for name, value in found}


def processes(gateway: Gateway) -> list[psutil.Process]:
    found = psutil.Process(gateway.process.pid).children(recursive=True)
    return [process for process in found if "peftopt.gateway.workers" in process.cmdline()]


@contextlib.contextmanager
def held_by_all(gateway: Gateway, model: str = "base") -> Iterator[int]:
    """Requests that are never answered, at least one in each worker, until this ends; how many."""
    with contextlib.ExitStack() as stack:
        n = 0
        while min(by_worker(gateway).values()) < 1:
            n += 1
            stack.enter_context(held(gateway, 1, model))
            wait_until(lambda n=n: sum(by_worker(gateway).values()) == n)  # type: ignore[misc]
        yield n


# ---- over sockets ------------------------------------------------------------------------------


def test_every_worker_follows_a_change_before_it_is_said_to_be_done(
    engine: Paced, two: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = two
    with several(tmp_path, engine, "--adapters-from", tmp_path) as gateway:
        assert gateway.operate("put", f"support={first}")[0] == 0
        gateway.ask("x", "support")
        older = engine.seen[-1]["model"]
        with ThreadPoolExecutor(4) as users:
            asked = [users.submit(gateway.ask, "y", "support") for _ in range(20)]
            assert gateway.operate("put", f"support={second}")[0] == 0
            before = engine.answers[older]
            asked += [users.submit(gateway.ask, "z", "support") for _ in range(30)]
            assert {each.result().status_code for each in asked} == {200}, "nobody is dropped"
        assert not [b for b in engine.seen if b["messages"][-1]["content"] == "z" and b["model"] == older]
        assert engine.answers[older] >= before
        assert gateway.operate("rollback", "support")[0] == 0
        for _ in range(10):
            gateway.ask("back", "support")
        assert {b["model"] for b in engine.seen if b["messages"][-1]["content"] == "back"} == {older}


def test_a_version_is_unloaded_when_the_last_request_of_the_last_worker_has_ended(
    engine: Paced, two: tuple[Path, Path], tmp_path: Path
) -> None:
    with several(tmp_path, engine, "--adapters-from", tmp_path, "--drain", 600) as gateway:
        assert gateway.operate("put", f"support={two[0]}")[0] == 0
        with ThreadPoolExecutor(1) as operator:
            with held_by_all(gateway, "support") as n:
                removing = operator.submit(gateway.operate, "remove", "support")
                wait_until(lambda: gateway.ask("x", "support").status_code == 404)
                assert not removing.done() and engine.folders and engine.running == n
            assert removing.result()[0] == 0
        assert not engine.folders


def test_metrics_are_those_of_all_workers_whoever_is_asked(engine: Paced, tmp_path: Path) -> None:
    with several(tmp_path, engine) as gateway:
        for _ in range(12):
            gateway.ask("x")
        with held_by_all(gateway) as n:
            assert [gateway.metric("peftopt_requests_total") for _ in range(6)] == [12] * 6
            assert gateway.metric("peftopt_request_duration_seconds_count") == 12
            assert sum(by_worker(gateway).values()) == n == engine.running
            assert gateway.metric("peftopt_ready") == 1, "what the supervisor knows is told once"
        wait_until(lambda: len(gateway.lines()) == 12 + n)


def test_what_dead_workers_have_counted_of_a_version_goes_with_the_version(
    engine: Paced, two: tuple[Path, Path], tmp_path: Path
) -> None:
    with several(tmp_path, engine, "--adapters-from", tmp_path) as gateway:
        assert gateway.operate("put", f"support={two[0]}")[0] == 0
        with held_by_all(gateway, "support"):
            pass
        wait_until(lambda: gateway.metric("peftopt_requests_total") == len(gateway.lines()) > 0)
        for process in processes(gateway):
            os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: gateway.metric("peftopt_worker_restarts_total") == WORKERS == len(by_worker(gateway)))
        assert gateway.metric("peftopt_requests_total") > 0, "a sum never falls"
        assert gateway.operate("remove", "support")[0] == 0
        assert 'adapter="support"' not in HTTP.get(f"{gateway.url}/metrics", timeout=BIG_S).text


def test_a_worker_that_is_killed_is_started_again_and_the_others_go_on(engine: Paced, tmp_path: Path) -> None:
    with several(tmp_path, engine) as gateway:
        for _ in range(8):
            gateway.ask("x")
        wait_until(lambda: gateway.metric("peftopt_requests_total") == 8)
        with held_by_all(gateway) as n:
            running = by_worker(gateway)
            process = processes(gateway)[0]
            os.kill(process.pid, signal.SIGKILL)
            wait_until(lambda: gateway.metric("peftopt_worker_restarts_total") == 1)
            wait_until(lambda: len(processes(gateway)) == WORKERS and len(by_worker(gateway)) == WORKERS)
            wait_until(lambda: engine.running == sum(by_worker(gateway).values()) < n)
            assert engine.running in running.values(), "those of the other are held still"
            assert {gateway.ask("y").status_code for _ in range(10)} == {200}
            assert gateway.metric("peftopt_requests_total") >= 18, "a sum never falls"
            listed = json.loads(gateway.operate("list", "--json")[1])["adapters"]
            wait_until(
                lambda: json.loads(gateway.operate("list", "--json")[1])["adapters"][0]["in_flight"] == engine.running
            )
            assert listed[0]["name"] == "base"


def test_sigterm_lets_what_runs_in_all_workers_end(engine: Paced, tmp_path: Path) -> None:
    engine.gap = 0.05
    with several(tmp_path, engine) as gateway:
        with ThreadPoolExecutor(8) as users:
            long = [users.submit(gateway.ask, "x", max_tokens=40) for _ in range(8)]
            wait_until(lambda: engine.running == 8)
            ours = processes(gateway)
            gateway.process.send_signal(signal.SIGTERM)
            for process in ours:  # as all processes of a control group get it
                process.send_signal(signal.SIGTERM)
            wait_until(lambda: not is_ready(gateway))
            assert {each.result().status_code for each in long} == {200}
        assert gateway.process.wait(BIG_S) == 0
        assert [line["status"] for line in gateway.lines()] == [200] * 8
        assert not any(process.is_running() for process in ours)


def test_workers_end_with_a_supervisor_that_is_killed(engine: Paced, tmp_path: Path) -> None:
    with several(tmp_path, engine) as gateway:
        ours = processes(gateway)
        os.kill(gateway.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(process.is_running() for process in ours))


def test_a_worker_that_follows_no_change_is_killed_and_the_change_is_made(
    engine: Paced, two: tuple[Path, Path], tmp_path: Path
) -> None:
    soon = {"peftopt.gateway.workers.supervisor:ACK_S": 5.0}
    with several(tmp_path, engine, "--adapters-from", tmp_path, constants=soon) as gateway:
        stuck = processes(gateway)[0]
        stuck.send_signal(signal.SIGSTOP)
        assert gateway.operate("put", f"support={two[0]}")[0] == 0
        wait_until(lambda: stuck.pid not in {process.pid for process in processes(gateway)})
        wait_until(lambda: len(by_worker(gateway)) == WORKERS)
        assert {gateway.ask("x", "support").status_code for _ in range(10)} == {200}


def test_no_more_run_than_all_workers_together_may(engine: Paced, tmp_path: Path) -> None:
    with several(tmp_path, engine, "--limits", "running=4,waiting=2,wait=60s") as gateway:
        engine.most = 0  # the start asks all prompts at once
        with ThreadPoolExecutor(24) as users:
            answers = list(users.map(lambda _: gateway.ask("x", max_tokens=100).status_code, range(24)))
        assert set(answers) <= {200, 429} and 200 in answers
        assert engine.most <= 4


def test_limits_that_cannot_be_divided_are_refused(engine: Paced, tmp_path: Path) -> None:
    few = ("--limits", "running=2", "--workers", 3)
    with serving(tmp_path, "--upstream", engine.url, *few, ready=False) as gateway:
        assert gateway.process.wait(BIG_S) == 2
    assert "running" in (tmp_path / "said.txt").read_text()


def test_a_canary_is_judged_by_what_all_workers_hear(engine: Paced, two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    with several(tmp_path, engine, "--adapters-from", tmp_path) as gateway:
        gateway.operate("put", f"support={first}")
        live, over, users = next(iter(engine.folders)), threading.Event(), ThreadPoolExecutor(16)

        def user(number: int) -> None:
            n = 0
            while not over.is_set():
                for name in set(engine.folders) - {live}:
                    engine.slow[name] = 0.4
                gateway.ask("x", "support", user=f"user-{number}-{n}", max_tokens=2)
                n += 1

        traffic = [users.submit(user, number) for number in range(16)]
        try:
            asked = ("--canary", "50%", "--for", "300s", "--window", "0.5s")
            code, said = gateway.operate("put", f"support={second}", *asked)
        finally:
            over.set()
            users.shutdown()
        assert all(each.result() is None for each in traffic)
        assert code == 1 and "canary.latency" in said, said


def test_workers_that_somebody_else_starts_join_and_leave_with_the_supervisor(engine: Paced, tmp_path: Path) -> None:
    """As gunicorn does: an ASGI server with the application of peftopt.gateway.asgi."""
    port, path = free_port(), tmp_path / "workers.sock"
    variables = {**os.environ, "PEFTOPT_JOIN": str(path)}
    uvicorn = (sys.executable, "-m", "uvicorn", "peftopt.gateway.asgi:app", "--lifespan", "on", "--port", str(port))
    joins = ("--upstream", engine.url, "--workers", WORKERS, "--join", path)
    with serving(tmp_path, *joins, ready=False) as supervisor:
        users = Gateway(f"http://127.0.0.1:{port}", supervisor.state, supervisor.log, supervisor.process)
        with subprocess.Popen([*uvicorn, "--log-level", "error"], env=variables) as worker:
            try:
                wait_until(lambda: is_ready(users))
                assert users.ask("x").status_code == 200 and users.metric("peftopt_requests_total") == 1
                assert by_worker(users).keys() == {"1"}
                supervisor.process.kill()
                assert worker.wait(BIG_S) is not None, "it has nothing to answer by"
            finally:
                worker.kill()


# ---- the pure parts ----------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 32))
def test_parts_add_up_and_differ_by_one_at_most(number: int, workers: int) -> None:
    parts = [shares.part(number, workers, index) for index in range(1, workers + 1)]
    assert sum(parts) == number and max(parts) - min(parts) <= 1


@given(st.integers(1, 64), st.integers(0, 64), st.integers(1, 8))
def test_limits_are_divided_or_refused_and_none_becomes_no_limit(running: int, per_key: int, workers: int) -> None:
    limits = Limits(running, 5, 400.0, 2.0)
    try:
        shares.check(workers, limits, 0, per_key)
    except BadInput:
        assert running < workers or 0 < per_key < workers
        return
    parts = [shares.limits_of(limits, workers, index) for index in range(1, workers + 1)]
    assert all(part.running for part in parts) and sum(part.running for part in parts) == running
    assert sum(part.rate for part in parts) == pytest.approx(2.0) and {part.wait_ms for part in parts} == {400.0}


def test_a_key_has_its_part_of_the_rate_in_each_worker() -> None:
    keys = shares.keys_of(Keys({"h": Key("team", ("a",), 5.0)}), 2)
    assert (keys.known["h"].rate, keys.known["h"].adapters) == (2.5, ("a",))


def counted(n: int) -> Metrics:
    metrics = Metrics()
    for _ in range(n):
        metrics.requests.labels("a", "v", "live", "200").inc()
        metrics.ttft.labels("a", "v", "live").observe(0.03)
    metrics.running.set(n)
    return metrics


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 3))
def test_counters_and_histograms_add_up_and_gauges_stay_apart(workers: list[int], dead: int) -> None:
    living = {i: sums.read(json.loads(json.dumps(sums.written(sums.account(counted(n).registry)))))
              for i, n in enumerate(workers, 1)}  # fmt: skip
    own = counted(0)
    own.ready.set(1)
    past = sums.added_up([sums.account(counted(dead).registry)])
    text = sums.text(sums.whole(sums.account(own.registry), living, past, ("peftopt_running",))).decode()
    total = sum(workers) + dead
    lines = set(text.splitlines())
    if total:
        assert f'peftopt_requests_total{{adapter="a",arm="live",code="200",version="v"}} {total}.0' in lines
        assert f'peftopt_ttft_seconds_count{{adapter="a",arm="live",version="v"}} {total}.0' in lines
        assert f'peftopt_ttft_seconds_bucket{{adapter="a",arm="live",le="+Inf",version="v"}} {total}.0' in lines
    assert {f'peftopt_running{{worker="{i}"}} {n}.0' for i, n in enumerate(workers, 1)} <= lines
    assert "peftopt_ready 1.0" in lines and "peftopt_running 0.0" not in lines


def test_several_processes_lose_no_line_of_a_log_that_is_set_aside(tmp_path: Path) -> None:
    path, each = tmp_path / "log.jsonl", 200

    def write(name: str) -> None:
        log = Log(str(path), rotate_bytes=5000, shared=True)  # a file that is opened twice has two locks
        for n in range(each):
            log.write(Line(f"{name}-{n}", arrived=0.0, at=0.0))
        assert (log.written, log.lost) == (each, 0)
        log.close()

    with ThreadPoolExecutor(3) as writers:
        assert list(writers.map(write, ("a", "b", "c"))) == [None] * 3
    files = [path, *tmp_path.glob("log.jsonl.*")]
    ids = [json.loads(line)["request_id"] for file in files for line in file.read_text().splitlines()]
    assert sorted(ids) == sorted(f"{name}-{n}" for name in "abc" for n in range(each))
    assert len(files) > 10 and max(file.stat().st_size for file in files) <= 5000
