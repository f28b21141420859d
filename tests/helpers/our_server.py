"""A server of ours in this process, over a real socket, and a gate before each of its model's steps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from peftopt.engines import _rows
from peftopt.engines._server import free_port
from peftopt.server import app
from peftopt.server.scheduler import Scheduler

TOKENS = 20
PATIENCE_S = 600.0
"""Until something that must come has come; no test asks how long it took."""


@dataclass
class Running:
    """A server in this process."""

    url: str
    scheduler: Scheduler
    stop: Callable[[], None]
    http: httpx2.Client

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.http.post(f"/v1/{path}", json=body)

    def ids(self, model: str, prompt: list[int], **more: Any) -> list[int]:
        """The tokens of a greedy answer."""
        fixed = {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
        answer = self.post("completions", model=model, prompt=prompt, **{**fixed, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]


@contextmanager
def serving(
    model: Any, adapters: dict[str, Path] | None = None, max_batch: int = 8, max_queued: int = 0, key: str = ""
) -> Iterator[Running]:
    port, begun, box = free_port(), threading.Event(), {}

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        box["scheduler"] = scheduler = Scheduler(model, "base", max_batch, max_queued=max_queued)
        for name, folder in (adapters or {}).items():
            await scheduler.load(name, str(folder))
        box["stop"] = lambda: loop.call_soon_threadsafe(stop.set)
        await app.serve(scheduler, "127.0.0.1", port, stop, 0.0, begun.set, key)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert begun.wait(PATIENCE_S)
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, trust_env=False) as http:
        try:
            yield Running(f"http://127.0.0.1:{port}", box["scheduler"], box["stop"], http)
        finally:
            box["stop"]()
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.005)


class Gate:
    """Lets so many steps through as the test says; `reached` counts those that have come to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._turns, step = threading.Semaphore(0), _rows.Rows.step
        self.reached = self.released = 0

        def gated(rows: Any, tokens: Any) -> None:
            self.reached += 1
            assert self._turns.acquire(timeout=PATIENCE_S)
            step(rows, tokens)

        monkeypatch.setattr(_rows.Rows, "step", gated)

    def steps(self, count: int) -> None:
        self.released += count
        self._turns.release(count)

    def taken(self) -> bool:
        """Whether the model stands at the gate again, after all steps that it may take."""
        return self.reached > self.released

    def open(self) -> None:
        self.steps(100_000)
