"""`peftopt serve` in a process of its own, as users and operators meet it."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from helpers.forked import COMMANDS, Copy, workers
from helpers.waiting import wait_until
from peftopt.engines._server import free_port
from peftopt.loadtest.arrivals import SERVE_CHECK, SERVE_LOG

BIG_S = 60.0
HTTP = httpx2.Client(limits=httpx2.Limits(max_keepalive_connections=0), timeout=BIG_S, trust_env=False)
"""Asks on a connection of its own each time, as other users do. A client for each would read all certificates again."""


@dataclass
class Gateway:
    """A gateway that runs, and what it has written."""

    url: str
    state: Path
    log: Path
    process: subprocess.Popen[str] | Copy

    def ask(self, prompt: str = "hi", model: str = "base", **more: Any) -> httpx2.Response:
        headers = more.pop("headers", {})
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], **more}
        return HTTP.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)

    def lines(self, kind: str = SERVE_LOG) -> list[dict[str, Any]]:
        """The lines of users' requests, or of another kind."""
        lines = (
            [json.loads(line) for line in self.log.read_text().rpartition("\n")[0].splitlines()]
            if self.log.exists()
            else []
        )
        return [line for line in lines if line["kind"] == kind]

    def checks(self) -> list[dict[str, Any]]:
        """The lines that say whether a version answers as itself."""
        return self.lines(SERVE_CHECK)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples, whatever their labels."""
        text = HTTP.get(f"{self.url}/metrics").text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}(\{{| )", line))

    def operate(self, *arguments: object) -> tuple[int, str]:
        """An `adapters` verb: its exit code and what it printed."""
        admin = ("--admin", f"unix:{self.state}/admin.sock")
        return COMMANDS.output("peftopt.cli", "adapters", *arguments, *admin, timeout_s=6 * BIG_S)


@contextlib.contextmanager
def serving(
    where: Path, *arguments: object, ready: bool = True, constants: Mapping[str, object] | None = None
) -> Iterator[Gateway]:
    """`peftopt serve` in a process of its own, until this ends; `constants`: other values than its modules have, by
    "module:NAME", such as those of times that it waits."""
    port, state, log = free_port(), where / "state", where / "requests.jsonl"
    command = ["peftopt.cli", "serve", "--port", port, "--state", state, "--log", log, *arguments]
    own = None if "--upstream" in arguments else workers()
    process = COMMANDS.begin(where / "said.txt", *command, constants=constants, workers=own)
    gateway = Gateway(f"http://127.0.0.1:{port}", state, log, process)
    try:
        if ready:
            wait_until(lambda: process.poll() is None and is_ready(gateway), lambda: (where / "said.txt").read_text())
        yield gateway
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(BIG_S)
        finally:
            process.kill()
            process.wait()


def is_ready(gateway: Gateway) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        return HTTP.get(f"{gateway.url}/health/ready", timeout=5.0).status_code == 200
    return False


@contextlib.contextmanager
def held(gateway: Gateway, n: int, model: str = "base") -> Iterator[None]:
    """So many requests that are never answered, until this ends."""
    body = {"model": model, "messages": [{"role": "user", "content": "hold"}]}
    content = json.dumps(body).encode()
    host, port = gateway.url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(n):
            line = stack.enter_context(socket.create_connection((host, int(port)), timeout=BIG_S))
            line.sendall(head + content)
        yield


def changed(adapter: Path, to: Path, scale: float) -> Path:
    """An adapter with other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, to)
    tensors = {name: scale * tensor for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, to / "adapter_model.safetensors")
    return to
