"""A gateway's parts in this process before a paced engine: adapters' lives, and the users' side without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from helpers.inside import PROMPTS
from helpers.paced import Paced
from peftopt.gateway.admission import Admission
from peftopt.gateway.app import App
from peftopt.gateway.engines import Engines, Starter
from peftopt.gateway.keys import Keys
from peftopt.gateway.limits import Limits
from peftopt.gateway.lines import Log
from peftopt.gateway.lives import Lives, Settings
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.registry import open_registry
from peftopt.gateway.shared import Shared
from peftopt.gateway.upstream import Timeouts, Upstream


class Gateway:
    """A gateway's parts: users ask it, and its log is kept."""

    def __init__(self, lives: Lives, upstream: Upstream, log: Path, notes: list[str]) -> None:
        self.lives, self.log, self.notes = lives, log, notes
        self.app = App(Shared(upstream, lives, Admission(Limits()), Keys(), lives.metrics, Log(str(log))))

    async def ask(self, model: str, path: str = "/v1/chat/completions", **more: Any) -> tuple[int, dict[str, Any]]:
        """The status and the body of an answer."""
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "x"}], **more}).encode()
        asked, never, sent = [{"type": "http.request", "body": body}], asyncio.Event(), list[dict[str, Any]]()

        async def receive() -> dict[str, Any]:
            if not asked:
                await never.wait()
            return asked.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        method = "POST" if path.startswith("/v1") else "GET"
        await self.app({"type": "http", "method": method, "path": path, "headers": []}, receive, send)
        return sent[0]["status"], json.loads(sent[-1]["body"])

    async def told(self) -> dict[str, Any]:
        """What /health/ready says."""
        return (await self.ask("", "/health/ready"))[1]

    def end(self) -> None:
        """Let go of the state, as the end of the process would."""
        assert self.lives.registry._lock
        self.lives.registry._lock.close()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@asynccontextmanager
async def gateway_of(engine: Paced, where: Path, starter: Starter | None = None) -> AsyncIterator[Gateway]:
    """A gateway that has begun, its state and its log in the folder."""
    settings = Settings(drain_s=5.0, prompts=PROMPTS)
    own = Engines(starter, where)
    lives = Lives(
        engine.url, open_registry(where / "state"), settings, Metrics(), {"base": "base"}, True, print, engines=own
    )
    notes = await lives.begin()
    async with Upstream(engine.url, Timeouts()) as upstream:
        try:
            yield Gateway(lives, upstream, where / "log", notes)
        finally:
            await own.stop_all()


async def comes(true: Callable[[], object]) -> None:
    """Wait for something that must come true."""
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)
