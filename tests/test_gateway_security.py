"""What a gateway keeps to itself, and what it lets nobody do to it."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from helpers.gateways import BIG_S, HTTP, Gateway, held, is_ready, serving
from helpers.paced import Paced, paced
from helpers.waiting import wait_until
from hypothesis import given
from hypothesis import strategies as st

from peftopt.engines._server import free_port
from peftopt.gateway import keys, run, texts
from peftopt.gateway.errors import without_places
from peftopt.gateway.upstream import Fault, Timeouts, Upstream

SECRETS = [
    "sk-proj-abcdefghijklmnop1234",
    "hf_AbCdEfGhIjKlMnOpQrStUv",
    "ghp_0123456789abcdefghijABCDEFGHIJ",
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "dGhpcyBpcyBhIHNlY3JldCBvZiAzMiBieXRlcyBvciBtb3JlIQ==",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Paced]:
    with paced() as engine:
        yield engine


# ---- requests that never come in ---------------------------------------------------------------


@contextmanager
def connected(gateway: Gateway) -> Iterator[socket.socket]:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=BIG_S) as client:
        yield client


def dripped(client: socket.socket, first: bytes, drop: bytes) -> bytes:
    """What is answered to a client that sends a byte now and then; it goes on until the gateway closes."""
    closed = threading.Event()

    def drip() -> None:
        while not closed.wait(0.1):
            try:
                client.sendall(drop)
            except OSError:
                return

    client.sendall(first)
    dripping = threading.Thread(target=drip)
    dripping.start()
    answer = b""
    try:
        while piece := client.recv(4096):
            answer += piece
    except ConnectionError:  # closed while bytes were on their way
        pass
    finally:
        closed.set()
        dripping.join()
    return answer


@pytest.fixture(scope="module")
def hasty(engine: Paced, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that waits half a second for a request."""
    with serving(tmp_path_factory.mktemp("hasty"), "--upstream", engine.url, "--read", 0.5) as gateway:
        yield gateway


@pytest.mark.parametrize("first", [b"", b"\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nx-slow: "])
def test_a_head_that_drips_in_is_given_up(hasty: Gateway, first: bytes) -> None:
    with connected(hasty) as client:
        answer = dripped(client, first, b"a" if b"POST" in first else b"\r\n")
        assert answer.startswith(b"HTTP/1.1 408"), answer
    assert hasty.ask("the others are answered").status_code == 200


def test_a_body_that_drips_in_is_given_up_and_has_its_line(hasty: Gateway) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with connected(hasty) as client:
        answer = dripped(client, head, b" ")
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer
    wait_until(lambda: any(line["status"] == 408 for line in hasty.lines()))


def test_a_body_that_nobody_asked_for_keeps_no_connection(hasty: Gateway) -> None:
    """What needs no body is answered without it, and then the rest is not waited for."""
    head = b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with connected(hasty) as client:
        assert dripped(client, head, b" ").startswith(b"HTTP/1.1 200")


def test_an_answer_may_take_longer_than_its_request(hasty: Gateway, engine: Paced) -> None:
    with connected(hasty) as client:
        content = json.dumps({"model": "base", "prompt": "x", "max_tokens": 1000, "stream": True}).encode()
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content))
        client.sendall(content)
        answer = b""
        while b"[DONE]" not in answer:
            piece = client.recv(65_536)
            assert piece, "it was closed before its end"
            answer += piece


# ---- who may read what -------------------------------------------------------------------------


def a_key(secret: str, rest: str) -> str:
    return f"{hashlib.sha256(secret.encode()).hexdigest()} {rest}\n"


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def operators(gateway: Gateway) -> httpx2.Client:
    """A client of the operators' socket."""
    return httpx2.Client(transport=httpx2.HTTPTransport(uds=str(gateway.state / "admin.sock")), base_url="http://x")


WORKERS = pytest.mark.parametrize("workers", [1, 2])


@WORKERS
def test_with_keys_the_metrics_are_the_operators(engine: Paced, tmp_path: Path, workers: int) -> None:
    (tmp_path / "keys").write_text(a_key("good", "team"))
    options = ("--keys", tmp_path / "keys", "--workers", workers)
    with serving(tmp_path, "--upstream", engine.url, *options) as gateway:
        assert gateway.ask("x", headers=bearer("good")).status_code == 200
        assert HTTP.get(f"{gateway.url}/metrics", headers=bearer("good")).status_code == 404
        with operators(gateway) as client:
            text = client.get("/metrics").text
        assert re.search(r'peftopt_requests_total\{.*code="200".*\} 1', text)


@WORKERS
def test_keys_that_change_are_read_again_and_a_bad_file_changes_nothing(
    engine: Paced, tmp_path: Path, workers: int
) -> None:
    file = tmp_path / "keys"
    file.write_text(a_key("old", "team") + a_key("kept", "other"))
    with serving(tmp_path, "--upstream", engine.url, "--keys", file, "--workers", workers) as gateway:

        def statuses(times: int = 8 * workers) -> list[set[int]]:
            """What each key gets, from every worker."""
            asked = [
                [gateway.ask("x", headers=bearer(secret)).status_code for secret in ("old", "kept", "new")]
                for _ in range(times)
            ]
            return [set(each) for each in zip(*asked, strict=True)]

        assert statuses() == [{200}, {200}, {401}]
        file.write_text(a_key("new", "team") + a_key("kept", "other adapters=nothing"))
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: statuses() == [{401}, {403}, {200}])  # revoked, allowed less, new
        file.write_text("nonsense\n")
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "stay as they were" in (tmp_path / "said.txt").read_text())
        assert statuses() == [{401}, {403}, {200}]


def test_a_rate_is_not_given_again_when_the_file_is_read_again() -> None:
    text = a_key("slow", "team rate=1/s")
    before = keys.parse(text, "keys")
    (used,) = before.known.values()
    assert used.wait_s(0.0) == 0 and used.wait_s(0.0) > 0
    (same,) = keys.renewed(before, keys.parse(text, "keys")).known.values()
    assert same.wait_s(0.0) > 0
    (other,) = keys.renewed(before, keys.parse(a_key("slow", "team rate=2/s"), "keys")).known.values()
    assert other.wait_s(0.0) == 0, "a rate that was changed begins anew"


# ---- what is told to whom ----------------------------------------------------------------------


def test_where_the_engine_is_stands_in_the_log_and_not_to_users(tmp_path: Path) -> None:
    with paced() as engine, serving(tmp_path, "--upstream", engine.url) as gateway:
        gateway.ask("x")
        port = engine.url.rpartition(":")[2]
        broken = gateway.ask("reset", stream=True, max_tokens=8)
        assert "error" in broken.text and port not in broken.text
        engine.says, engine.status = {"error": {"message": f"{engine.url}/x at /opt/engine/lib/model.py failed"}}, 500
        answer = gateway.ask("x")
        assert answer.status_code == 500 and port not in answer.text and "/opt" not in answer.text
        wait_until(lambda: any("/opt/engine" in line["error"] for line in gateway.lines()))


def test_where_no_engine_answers_its_address_is_for_the_log() -> None:
    port = free_port()

    async def main() -> None:
        async with Upstream(f"http://127.0.0.1:{port}", Timeouts()) as upstream, upstream.ask("/v1", b"{}", {}):
            pass

    with pytest.raises(Fault) as fault:
        asyncio.run(main())
    assert fault.value.kind == "engine_dead" and str(port) in fault.value.detail and str(port) not in str(fault.value)


def test_places_are_hidden_and_words_are_not() -> None:
    said = b'{"error": "CUDA out of memory: 3/4 of 2.5 GiB, see and/or http://10.0.0.7:8000/v1?x=1 or ~/models/a.bin"}'
    hidden = without_places(said)
    assert json.loads(hidden) and b"10.0.0.7" not in hidden and b"a.bin" not in hidden
    assert b"out of memory: 3/4 of 2.5 GiB, see and/or" in hidden


def test_an_answer_that_would_not_fit_is_refused_and_a_stream_of_that_length_passes() -> None:
    async def main(url: str, stream: bool) -> int:
        body = json.dumps({"model": "base", "prompt": "x", "max_tokens": 5000, "stream": stream}).encode()
        async with Upstream(url, Timeouts()) as upstream, upstream.ask("/v1/completions", body, {}) as answer:
            if stream:
                return sum([len(piece) async for piece in answer.pieces()])
            return len(await answer.whole(most_bytes=1000))

    with paced(gap=0.0) as engine:
        with pytest.raises(Fault) as fault:
            asyncio.run(main(engine.url, stream=False))
        assert fault.value.kind == "upstream"
        assert asyncio.run(main(engine.url, stream=True)) > 1000


# ---- texts in the log --------------------------------------------------------------------------


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("around", ["{}", "my key is {}, use it", 'curl -H "Authorization: Bearer {}"', "KEY={}\n"])
@pytest.mark.fault(36, "what looks like a key is not kept in the log")
def test_what_looks_like_a_key_is_not_kept(secret: str, around: str) -> None:
    kept = texts.redacted(around.format(secret))
    assert secret not in kept and texts.HIDDEN in kept


@pytest.mark.parametrize(
    "plain", ["What is the capital of Australia?", "Donaudampfschifffahrtsgesellschaft", "13 000 000 EUR", "日本語" * 9]
)
def test_words_are_kept(plain: str) -> None:
    assert texts.redacted(plain) == plain


@given(st.text(max_size=200), st.sampled_from(SECRETS), st.integers(0, 40_000))
def test_no_part_of_a_key_is_kept_where_a_text_is_cut(before: str, secret: str, at: int) -> None:
    kept = texts.redacted(f"{(before + ' word ') * (at // 10)} {secret}")
    assert len(kept) <= texts.MOST_CHARACTERS
    assert all(secret[i : i + 12] not in kept for i in range(len(secret) - 11) if secret[i : i + 12] not in before)


def test_texts_are_logged_only_where_that_is_asked_for(engine: Paced, tmp_path: Path) -> None:
    (tmp_path / "silent").mkdir()
    with serving(tmp_path / "silent", "--upstream", engine.url) as gateway:
        gateway.ask("my-secret-prompt", user="maria@example.org")
        wait_until(lambda: bool(gateway.lines()))
        written = gateway.log.read_text()
        assert "my-secret-prompt" not in written and "maria" not in written and "x x" not in written
    with serving(tmp_path, "--upstream", engine.url, "--log-text") as gateway:
        gateway.ask(f"hello {SECRETS[0]}", user="maria@example.org", max_tokens=3)
        half = rb'{"model": "base", "prompt": "half a letter \ud800", "stream": true, "max_tokens": 3}'
        HTTP.post(f"{gateway.url}/v1/completions", content=half)
        wait_until(lambda: len(gateway.lines()) == 2)
        whole, streamed = gateway.lines()
        assert "hello" in whole["prompt"] and SECRETS[0] not in whole["prompt"]
        assert whole["answer"] == "x x x " and streamed["answer"] == "yyy"
        assert "maria" not in gateway.log.read_text()


# ---- the end -----------------------------------------------------------------------------------


def test_a_terminal_that_is_closed_ends_what_runs_in_it(engine: Paced, tmp_path: Path) -> None:
    """SIGHUP from an operator reads files again; from a terminal that is gone it is the end."""
    ours, its = os.openpty()

    def lead() -> None:
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)

    port = str(free_port())
    command = [sys.executable, "-m", "peftopt.cli", "serve", "--upstream", engine.url, "--port", port]
    command += ["--state", str(tmp_path / "state")]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=its, stdout=quiet, stderr=quiet, start_new_session=True, preexec_fn=lead)
    gateway = Gateway(f"http://127.0.0.1:{port}", tmp_path / "state", tmp_path / "log", process)  # type: ignore[arg-type]
    try:
        os.close(its)
        wait_until(lambda: is_ready(gateway))
        process.send_signal(signal.SIGHUP)
        assert gateway.ask("x").status_code == 200, "the terminal is there"
        os.close(ours)
        assert process.wait(BIG_S) == 0
    finally:
        process.kill()
        process.wait()


def test_an_engine_is_ended_at_once_when_the_end_is_asked_for_twice(engine: Paced, tmp_path: Path) -> None:
    killed = threading.Event()
    slow = SimpleNamespace(stop=lambda: killed.wait(BIG_S), kill=killed.set)

    async def main() -> None:
        gateway = run.Gateway(run.Config(tmp_path / "state", upstream=engine.url), print)
        stopping = asyncio.ensure_future(gateway._stop(slow))  # type: ignore[arg-type]
        gateway._end()
        await asyncio.sleep(0)
        assert not killed.is_set()
        gateway._end()
        await stopping

    asyncio.run(main())
    assert killed.is_set()


def test_who_asks_twice_for_the_end_does_not_wait_for_the_drain(tmp_path: Path) -> None:
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, "--drain", 100_000) as gateway:
        with held(gateway, 1):
            wait_until(lambda: engine.running == 1)
            gateway.process.send_signal(signal.SIGTERM)
            wait_until(lambda: HTTP.get(f"{gateway.url}/health/ready").status_code == 503)
            refused = gateway.ask("too late")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            text = HTTP.get(f"{gateway.url}/metrics").text
            assert re.search(r'peftopt_refused_total\{.*reason="draining".*\} 1', text)
            gateway.process.send_signal(signal.SIGTERM)
            assert gateway.process.wait(BIG_S) == 0
        kinds = {line["error_kind"] for line in gateway.lines()}
        assert kinds == {"refused", "cancelled"}
