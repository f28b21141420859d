"""A server that is started here is known to be the one that answers, and asks for its key."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.our_server import serving
from helpers.waiting import wait_until

from peftopt.engines import _rows
from peftopt.engines._server import Server, free_port
from peftopt.errors import MissingEnvironment, WorkerFailed

SERVE = """
import http.server, socket, subprocess, sys
if sys.argv[2] == "parent":
    sys.exit(subprocess.run([sys.executable, "-c", sys.argv[3], sys.argv[1], "plain", ""]).returncode)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
class Shared(http.server.HTTPServer):
    def server_bind(self):
        if sys.argv[2] == "shared":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()
Shared(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Foreign(HTTPServer):
    """Answers 200 to everything, as a program does that has nothing to do with peftopt."""

    shared = False

    def server_bind(self) -> None:
        if self.shared:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def foreign(port: int, shared: bool = False) -> Iterator[None]:
    kind = type("Foreign", (Foreign,), {"shared": shared})
    server = kind(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def started(port: int, script: str, *words: str, folder: Path) -> Iterator[Server]:
    command = [sys.executable, "-c", script, str(port), *words]
    server = Server(command, {}, f"http://127.0.0.1:{port}", folder / "server.log")
    try:
        yield server
    finally:
        server.kill()
        server.stop()


@pytest.mark.parametrize("words", [("plain", ""), ("parent", SERVE)], ids=["itself", "its child"])
def test_a_server_that_listens_itself_or_by_its_child_is_ready(words: tuple[str, str], tmp_path: Path) -> None:
    with started(free_port(), SERVE, *words, folder=tmp_path) as server:
        assert server.ready(60) >= 0


def test_no_server_is_started_where_another_program_listens(tmp_path: Path) -> None:
    port = free_port()
    with foreign(port), pytest.raises(MissingEnvironment, match=f"port {port} is taken"):
        Server(["false"], {}, f"http://127.0.0.1:{port}", tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_another_program_that_answers_in_its_place_is_not_taken_for_it(tmp_path: Path) -> None:
    """It took the port between the look at it and the server's start; the server is still loading."""
    port = free_port()
    asleep = started(port, "import time; time.sleep(600)", folder=tmp_path)
    with asleep as server, foreign(port), pytest.raises(WorkerFailed, match="another process listens") as caught:
        server.ready(60)
    assert caught.value.reason == "port taken"


def test_a_port_that_is_shared_with_another_program_is_not_taken_for_its_own(tmp_path: Path) -> None:
    """As SO_REUSEPORT allows to processes of one user: every other request would go there."""
    port = free_port()
    with started(port, SERVE, "shared", "", folder=tmp_path) as server:
        wait_until(lambda: _listens(port))
        with foreign(port, shared=True), pytest.raises(WorkerFailed, match="another process listens"):
            server.ready(60)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_our_own_server_asks_for_its_key(tiny_base_fp32: Path) -> None:
    with serving(_rows.Served(str(tiny_base_fp32), "cpu"), key="the-key-of-the-server") as server:
        asked = {"model": "base", "prompt": [5, 6], "max_tokens": 1}
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "the-key-of-the-server"}):
            for answer in (
                server.http.get("/v1/models", headers=headers),
                server.http.post("/v1/completions", json=asked, headers=headers),
                server.http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/"}, headers=headers),
            ):
                assert answer.status_code == 401 and "key" in answer.json()["error"]["message"]
        own = {"Authorization": "Bearer the-key-of-the-server"}
        assert server.http.post("/v1/completions", json=asked, headers=own).status_code == 200
        assert server.http.get("/health").status_code == server.http.get("/metrics").status_code == 200


def test_a_server_that_lacked_memory_says_so(tmp_path: Path) -> None:
    script = "import sys; sys.stderr.write('DefaultCPUAllocator: can\\'t allocate memory: you tried'); sys.exit(1)"
    with started(free_port(), script, folder=tmp_path) as server, pytest.raises(WorkerFailed) as caught:
        server.ready(60)
    assert caught.value.reason == "out of memory" and "exit status 1" in caught.value.detail


def test_a_server_of_nobody_is_asked_nothing(tmp_path: Path) -> None:
    """A redirect of /health to one that answers is no answer."""

    class Moved(Handler):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", f"http://127.0.0.1:{other}/health")
            self.end_headers()

    other, port = free_port(), free_port()
    with foreign(other), started(port, "import time; time.sleep(600)", folder=tmp_path) as server:
        moved = HTTPServer(("127.0.0.1", port), Moved)
        threading.Thread(target=moved.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(WorkerFailed) as caught:
            server.ready(1.0)
        moved.shutdown()
        moved.server_close()
    assert caught.value.reason == "timeout"
