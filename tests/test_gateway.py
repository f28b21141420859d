"""`peftopt serve` before a paced engine, over sockets, as users and operators meet it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.gateways import BIG_S, HTTP, Gateway, changed, held, is_ready, serving
from helpers.paced import Paced, paced
from helpers.waiting import wait_until

from peftopt.engines._server import free_port


@pytest.fixture(scope="module")
def engine() -> Iterator[Paced]:
    with paced() as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(engine: Paced, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with serving(tmp_path_factory.mktemp("gateway"), "--upstream", engine.url) as gateway:
        yield gateway


# ---- users -------------------------------------------------------------------------------------


def test_an_answer_passes_as_it_is(gateway: Gateway, engine: Paced) -> None:
    answer = gateway.ask("hello", max_tokens=3)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "x x x "
    assert engine.seen[-1]["messages"][0]["content"] == "hello" and engine.seen[-1]["max_tokens"] == 3


def test_a_stream_passes_byte_for_byte(gateway: Gateway, engine: Paced) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "s"}], "stream": True, "max_tokens": 5}
    through = HTTP.post(f"{gateway.url}/v1/chat/completions", json=body)
    direct = HTTP.post(f"{engine.url}/v1/chat/completions", json=body)
    assert through.content == direct.content and "event-stream" in through.headers["content-type"]


def test_a_line_has_the_seven_fields_and_the_engines_own_account(gateway: Gateway) -> None:
    gateway.ask("line", stream=True, max_tokens=4, stream_options={"include_usage": True})
    wait_until(lambda: bool(gateway.lines()) and gateway.lines()[-1]["prompt_tokens"] == 7)
    line = gateway.lines()[-1]
    seven = ("request_duration_ms", "generation_latency_ms", "queue_time_ms", "model_loading_time")
    assert {*seven, "adapter_switch_time", "gpu_memory_allocated", "gpu_memory_reserved"} <= line.keys()
    assert line["new_tokens"] == 4 and line["finish"] == "length" and line["status"] == 200
    assert line["queue_engine_ms"] == 3.0 and line["generation_latency_ms"] == 11.0
    assert line["sources"] == {"generation_latency_ms": "engine", "new_tokens": "engine"}
    assert line["request_duration_ms"] >= line["ttft_ms"] > 0
    assert "line" not in json.dumps(line["adapter"]), "no text of a user's"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["hold", "slow"])
def test_the_engine_is_let_go_of_when_the_client_goes(
    gateway: Gateway, engine: Paced, stream: bool, prompt: str
) -> None:
    """Before the first byte, in the middle of a stream, and while a whole answer is awaited."""
    before, cancelled = engine.left, gateway.metric("peftopt_cancelled_total")
    content = json.dumps(
        {
            "model": "base",
            "messages": [{"role": "user", "content": prompt}],
            "stream": stream,
            "max_tokens": 100_000 if prompt == "slow" else 4,
        }
    ).encode()
    host, port = gateway.url.removeprefix("http://").split(":")
    running = engine.running
    with socket.create_connection((host, int(port)), timeout=BIG_S) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        client.sendall(head.encode() + content)
        if stream and prompt == "slow":
            assert client.recv(100)
        wait_until(lambda: engine.running > running)
    wait_until(lambda: engine.left == before + 1)
    wait_until(lambda: gateway.metric("peftopt_cancelled_total") == cancelled + 1)
    wait_until(lambda: gateway.lines()[-1]["error_kind"] == "cancelled")


def test_what_goes_wrong_at_the_engine_is_told_and_counted_by_kind(gateway: Gateway) -> None:
    answer = gateway.ask("oom")
    assert answer.status_code == 500 and "out of memory" in answer.text
    wait_until(lambda: gateway.lines()[-1]["error_kind"] == "oom")
    broken = gateway.ask("reset", stream=True, max_tokens=8)
    assert "error" in broken.text and "[DONE]" not in broken.text
    wait_until(lambda: gateway.lines()[-1]["error_kind"] == "upstream")
    assert gateway.ask("after").status_code == 200, "the others are answered"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{not json", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b'{"messages": []}', 400, "missing_model"),
        (b'{"model": 5}', 400, "missing_model"),
        (b'{"model": "nobody", "messages": []}', 404, "model_not_found"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"model": "base", "x": "' + b"a" * (9 * 2**20) + b'"}', 413, "body_too_large"),
    ],
)
def test_a_bad_request_gets_an_error_in_openais_form(gateway: Gateway, content: bytes, status: int, code: str) -> None:
    answer = HTTP.post(f"{gateway.url}/v1/chat/completions", content=content)
    assert answer.status_code == status and answer.json()["error"]["code"] == code
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_paths_that_are_none_and_methods_that_are_none(gateway: Gateway) -> None:
    assert HTTP.get(f"{gateway.url}/v1/files").status_code == 404
    assert HTTP.get(f"{gateway.url}/v1/completions").status_code == 405
    assert HTTP.get(f"{gateway.url}/adapters").status_code == 404, "operators have a socket of their own"
    assert HTTP.get(f"{gateway.url}/health/live").status_code == 200
    assert [m["id"] for m in HTTP.get(f"{gateway.url}/v1/models").json()["data"]] == ["base"]


def test_a_head_without_an_end_is_refused_and_a_body_is_not_taken_for_one(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=BIG_S) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        answer = b""
        with contextlib.suppress(ConnectionError):
            for _ in range(100_000):
                client.sendall(b"x-more: " + b"a" * 4096 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            answer = client.recv(100)
        assert not answer or answer.startswith(b"HTTP/1.1 400")
    assert gateway.ask("long " * 100_000).status_code == 200


def test_openais_own_client_works_unchanged(gateway: Gateway) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none")
    messages = [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(model="base", messages=messages, max_tokens=3)
    assert whole.choices[0].message.content == "x x x " and whole.usage.completion_tokens == 3
    stream = client.chat.completions.create(model="base", messages=messages, max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "yyy"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=messages)


# ---- limits and keys ---------------------------------------------------------------------------


def test_who_is_too_many_is_refused_with_the_time_to_come_again(tmp_path: Path) -> None:
    limits = ("--limits", "running=2,waiting=2,wait=600s")
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, *limits) as gateway:
        with held(gateway, 4):
            wait_until(lambda: (gateway.metric("peftopt_running"), gateway.metric("peftopt_waiting")) == (2, 2))
            wait_until(lambda: engine.running == 2)
            refused = gateway.ask("one too many")
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "waiting"
        assert int(refused.headers["retry-after"]) >= 1
        assert "--limits" in refused.json()["error"]["message"], "it says whose limit that is"
        assert gateway.metric("peftopt_refused_total") == 1
        wait_until(lambda: (gateway.metric("peftopt_running"), gateway.metric("peftopt_waiting")) == (0, 0))
        assert gateway.ask("there is room again").status_code == 200


def test_a_wait_that_lasts_too_long_ends_in_a_refusal(tmp_path: Path) -> None:
    limits = ("--limits", "running=1,waiting=9,wait=100ms")
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, *limits) as gateway, held(gateway, 1):
        wait_until(lambda: engine.running == 1)
        refused = gateway.ask("it waits for one that never ends")
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "wait"
        wait_until(lambda: len(gateway.lines()) == 1)
        assert gateway.lines()[0]["queue_gateway_ms"] > 0


def test_a_key_opens_what_its_line_names_and_nothing_else(engine: Paced, tmp_path: Path) -> None:
    import hashlib

    good, odd, slow = (hashlib.sha256(key).hexdigest() for key in (b"good", b"odd", b"slow"))
    (tmp_path / "keys").write_text(f"{good} team adapters=base\n{odd} odd adapters=x\n{slow} slow rate=0.001/s\n")
    options = ("--keys", tmp_path / "keys", "--metrics", "users")
    with serving(tmp_path, "--upstream", engine.url, *options) as gateway:
        asked = {key: gateway.ask("x", headers={"Authorization": f"Bearer {key}"}) for key in ("good", "odd", "none")}
        assert {key: answer.status_code for key, answer in asked.items()} == {"good": 200, "odd": 403, "none": 401}
        wait_until(lambda: any(line["key"] == "team" for line in gateway.lines()))
        headers = {"Authorization": "Bearer odd"}
        assert HTTP.get(f"{gateway.url}/v1/models", headers=headers).json()["data"] == [], "it may ask none of them"
        headers = {"Authorization": "Bearer slow"}
        assert [gateway.ask("x", headers=headers).status_code for _ in range(2)] == [200, 429]
        wait_until(lambda: gateway.metric("peftopt_refused_total") == 1)
        assert "good" not in gateway.log.read_text()


# ---- timeouts ----------------------------------------------------------------------------------


def test_each_wait_has_a_limit_and_a_counter_of_its_own(engine: Paced, tmp_path: Path) -> None:
    limits = ("--first", 0.5, "--gap", 0.5)
    with serving(tmp_path, "--upstream", engine.url, *limits) as gateway:
        assert gateway.ask("hold").status_code == 504
        stalled = gateway.ask("stall", stream=True, max_tokens=8)
        assert "timeout_gap" in stalled.text
        wait_until(lambda: len(gateway.lines()) == 2)
        kinds = [line["error_kind"] for line in gateway.lines()]
        assert kinds == ["timeout_first", "timeout_gap"]


def test_a_server_that_is_not_there_is_said_at_the_start(tmp_path: Path) -> None:
    with serving(tmp_path, "--upstream", f"http://127.0.0.1:{free_port()}", ready=False) as dead:
        assert dead.process.wait(BIG_S) == 4
    assert "no server at" in (tmp_path / "said.txt").read_text()


def test_a_script_is_told_where_a_gateway_listens(tmp_path: Path) -> None:
    def told() -> list[str]:
        return [line for line in (tmp_path / "said.txt").read_text().splitlines() if line.startswith("{")]

    with paced() as engine, serving(tmp_path, "--upstream", engine.url, "--json") as gateway:
        wait_until(lambda: told() != [])
        (line,) = told()
    ready = json.loads(line)
    assert ready["url"] == gateway.url and "base" in ready["serves"] and str(gateway.state) in ready["admin"]


# ---- operators ---------------------------------------------------------------------------------


@pytest.fixture
def two(tiny_lora: Path, tmp_path: Path) -> tuple[Path, Path]:
    return changed(tiny_lora, tmp_path / "one", 1.0), changed(tiny_lora, tmp_path / "two", 2.0)


def test_an_adapters_life(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Put, answered by its own name at the engine, replaced under load, rolled back, removed."""
    first, second = two
    options = ("--adapters-from", tmp_path, "--keep", 3600)
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, *options) as gateway:
        code, said = gateway.operate("put", f"support={first}")
        assert code == 0, said
        assert gateway.ask("x", "support").status_code == 200
        name = engine.seen[-1]["model"]
        assert name.startswith("support@") and engine.folders[name].startswith(str(gateway.state / "adapters"))

        with ThreadPoolExecutor(4) as users:
            asked = [users.submit(gateway.ask, "y", "support", max_tokens=10) for _ in range(40)]
            code, said = gateway.operate("put", f"support={second}")
            assert code == 0, said
            assert {a.result().status_code for a in asked} == {200}, "nobody is dropped"
        gateway.ask("z", "support")
        newer = engine.seen[-1]["model"]
        assert newer != name and {name, newer} <= engine.folders.keys(), "the one before is kept"

        assert gateway.operate("put", f"support={second}")[1].count("already")
        code, said = gateway.operate("rollback", "support")
        gateway.ask("z", "support")
        assert code == 0 and engine.seen[-1]["model"] == name
        assert gateway.operate("remove", "support")[0] == 0
        assert gateway.ask("x", "support").status_code == 404 and not engine.folders
        assert not list((gateway.state / "adapters").iterdir())


def test_a_canary_answers_its_share_of_users_and_is_promoted(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, "--adapters-from", tmp_path) as gateway:
        assert gateway.operate("put", f"support={first}", "--canary", "10%")[0] == 2, "nothing is there to compare"
        gateway.operate("put", f"support={first}")
        assert gateway.operate("put", f"support={second}", "--canary", "50%")[0] == 0
        for user in range(40):
            gateway.ask("x", "support", user=f"user-{user}", max_tokens=1)
        wait_until(lambda: len(gateway.lines()) == 40)
        arms = [line["arm"] for line in gateway.lines()]
        assert 5 < arms.count("canary") < 35
        assert len({line["version"] for line in gateway.lines()}) == 2
        assert gateway.operate("promote", "support")[0] == 0
        listed = json.loads(gateway.operate("list", "--json")[1])["adapters"]
        assert [row["arm"] for row in listed if row["name"] == "support"] == ["live", "previous"]


def test_what_does_not_load_is_rejected_and_those_that_are_served_stay(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, "--adapters-from", tmp_path) as gateway:
        gateway.operate("put", f"support={first}")
        engine.deaf = True
        code, said = gateway.operate("put", f"support={second}")
        assert code == 1 and "no room" in said
        assert gateway.ask("x", "support").status_code == 200
        assert gateway.operate("put", "support=/etc")[0] == 2, "outside the folders that are allowed"
        assert gateway.operate("put", f"base={second}")[0] == 2
        assert gateway.operate("rollback", "nobody")[0] == 2


def test_weights_that_are_not_finite_never_reach_the_engine(tiny_lora: Path, tmp_path: Path) -> None:
    broken = changed(tiny_lora, tmp_path / "broken", float("nan"))
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, "--adapters-from", tmp_path) as gateway:
        code, said = gateway.operate("put", f"support={broken}")
        assert code == 2 and "NaN or infinity" in said and not engine.folders


def test_a_gateway_that_was_killed_serves_the_same_again(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    options = ("--adapters-from", tmp_path)
    with paced() as engine:
        with serving(tmp_path, "--upstream", engine.url, *options) as gateway:
            gateway.operate("put", f"support={first}")
            gateway.operate("put", f"support={second}")
            gateway.ask("x", "support")
            name = engine.seen[-1]["model"]
            os.kill(gateway.process.pid, signal.SIGKILL)
            gateway.process.wait()
        engine.folders.clear()  # and so was the engine
        with serving(tmp_path, "--upstream", engine.url, *options) as again:
            again.ask("x", "support")
            assert engine.seen[-1]["model"] == name and len(engine.folders) == 2
            with serving(tmp_path, "--upstream", engine.url, ready=False) as other:
                assert other.process.wait(BIG_S) == 2, "one gateway a state"


def test_what_the_engine_has_lost_is_loaded_again(two: tuple[Path, Path], tmp_path: Path) -> None:
    soon = {"peftopt.gateway.run:RECONCILE_EVERY_S": 0.5}
    options = ("--adapters-from", tmp_path)
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, *options, constants=soon) as gateway:
        gateway.operate("put", f"support={two[0]}")
        engine.folders.clear()
        wait_until(lambda: bool(engine.folders))


def test_sigterm_lets_what_runs_end_and_takes_in_no_more(tmp_path: Path) -> None:
    with paced(gap=0.05) as engine, serving(tmp_path, "--upstream", engine.url) as gateway:
        with ThreadPoolExecutor(1) as users:
            long = users.submit(gateway.ask, "x", max_tokens=40)
            wait_until(lambda: engine.running == 1)
            gateway.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not is_ready(gateway))
            assert long.result().status_code == 200
        assert gateway.process.wait(BIG_S) == 0
        assert gateway.lines()[-1]["status"] == 200


# ---- what the log is good for ------------------------------------------------------------------


def test_the_log_is_read_as_loads_and_replayed_as_a_trace(two: tuple[Path, Path], tmp_path: Path) -> None:
    from peftopt.loadtest import importers, runs

    with paced() as engine, serving(tmp_path, "--upstream", engine.url, "--adapters-from", tmp_path) as gateway:
        gateway.operate("put", f"support={two[0]}")
        for _ in range(6):
            gateway.ask("x", "support", stream=True, max_tokens=3, stream_options={"include_usage": True})
        gateway.ask("x", "nobody")
        gateway.ask("x", "base")
        wait_until(lambda: len(gateway.lines()) == 8)
        found = {run.requests[0].model: run for run in importers.read(gateway.log)}
        assert {name: len(run.requests) for name, run in found.items()} == {"support": 6, "base": 1}
        request = found["support"].requests[0]
        line = gateway.lines()[0]
        assert request.request_duration_ms == pytest.approx(line["request_duration_ms"], abs=0.01)
        assert request.ttft_ms == pytest.approx(line["ttft_ms"], abs=0.01) and request.new_tokens == 3
        assert found["support"].raw, "something can be decided on it"
        traced = runs.read_trace(gateway.log)
        assert len(traced) == 7 and traced[0].prompt_tokens == 7 and traced[0].model == "support"


def test_a_canary_that_is_slower_is_rolled_back_by_its_rule(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    options = ("--adapters-from", tmp_path)
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, *options) as gateway:
        gateway.operate("put", f"support={first}")
        live = next(name for name in engine.folders)
        over, users = threading.Event(), ThreadPoolExecutor(16)

        def user(number: int) -> None:
            while not over.is_set():
                for name in set(engine.folders) - {live}:
                    engine.slow[name] = 0.4
                gateway.ask("x", "support", user=f"user-{number}-{time.monotonic_ns()}", max_tokens=2)

        traffic = [users.submit(user, number) for number in range(16)]
        try:
            asked = ("--canary", "50%", "--for", "300s", "--window", "0.5s", "--then", "promote")
            code, said = gateway.operate("put", f"support={second}", *asked)
        finally:
            over.set()
            users.shutdown()
        assert all(each.result() is None for each in traffic)
        assert code == 1 and "canary.latency" in said, said
        listed = json.loads(gateway.operate("list", "--json")[1])["adapters"]
        assert [row["arm"] for row in listed if row["name"] == "support"] == ["live"]
        gateway.ask("x", "support")
        assert engine.seen[-1]["model"] == live
