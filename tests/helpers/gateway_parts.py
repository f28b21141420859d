"""A gateway's parts in this process before a paced engine: adapters' lives, and the users' side without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from helpers.inside import PROMPTS, Users
from helpers.paced import Paced
from peftopt.gateway.engines import Engines, Starter
from peftopt.gateway.lives import Lives, Settings
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.registry import open_registry
from peftopt.gateway.upstream import Timeouts, Upstream


class Gateway(Users):
    """Users and their gateway's parts, of which some may be told at its start: `notes`."""

    def __init__(self, lives: Lives, upstream: Upstream, log: Path, notes: list[str]) -> None:
        super().__init__(lives, upstream, log)
        self.lives, self.notes = lives, notes

    async def answer(self, model: str, path: str = "/v1/chat/completions", **more: Any) -> tuple[int, dict[str, Any]]:
        """The status and the body of an answer."""
        sent = await self.exchange("POST" if path.startswith("/v1") else "GET", path, model, **more)
        return sent[0]["status"], json.loads(sent[-1]["body"])

    async def told(self) -> dict[str, Any]:
        """What /health/ready says."""
        return (await self.answer("", "/health/ready"))[1]

    def end(self) -> None:
        """Let go of the state, as the end of the process would."""
        assert self.lives.registry._lock
        self.lives.registry._lock.close()


@asynccontextmanager
async def gateway_of(engine: Paced, where: Path, starter: Starter | None = None) -> AsyncIterator[Gateway]:
    """A gateway that has begun, its state and its log in the folder."""
    settings = Settings(drain_s=5.0, prompts=PROMPTS)
    own = Engines(starter, where)
    lives = Lives(
        engine.url, open_registry(where / "state"), settings, Metrics(), {"base": "base"}, True, print, engines=own
    )
    notes = await lives.upkeep.begin()
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
