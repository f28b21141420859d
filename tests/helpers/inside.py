"""A gateway's parts in this process, before a paced engine: its lives, and users without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from helpers.paced import Paced
from peftopt.gateway.admission import Admission
from peftopt.gateway.app import App
from peftopt.gateway.keys import Keys
from peftopt.gateway.limits import Limits
from peftopt.gateway.lines import Log
from peftopt.gateway.lives import Lives, Settings
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.registry import open_registry
from peftopt.gateway.shared import Shared
from peftopt.gateway.upstream import Timeouts, Upstream

PROMPTS = {"one": ({"role": "user", "content": "One?"},), "two": ({"role": "user", "content": "Two?"},)}


def adapter(folder: Path, scale: float) -> Path:
    folder.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{layer}.lora_A.weight": (4, 8), f"{layer}.lora_B.weight": (8, 4)}
    tensors = {name: np.full(shape, scale, np.float32) for name, shape in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    return folder


def lives_of(engine: Paced, state: Path, **brings: str) -> Lives:
    settings = Settings(drain_s=5.0, prompts=PROMPTS)
    return Lives(engine.url, open_registry(state), settings, Metrics(), brings or {"base": "base"}, True, print)


class Users:
    """The users' application, asked without sockets. `sent`: the messages of the last answer."""

    def __init__(self, lives: Lives, upstream: Upstream, log: Path, running: int = 0) -> None:
        self.log = log
        self.shared = Shared(
            upstream, lives, Admission(Limits(running, waiting=running)), Keys(), lives.metrics, Log(str(log))
        )

    async def ask(self, model: str = "base", stuck: bool = False, **more: Any) -> list[dict[str, Any]]:
        """The messages of an answer; `stuck`: the client takes none of them."""
        return await self.exchange("POST", "/v1/chat/completions", model, stuck, **more)

    async def exchange(
        self, method: str, path: str, model: str, stuck: bool = False, **more: Any
    ) -> list[dict[str, Any]]:
        """The messages of an answer to any request."""
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "x"}], **more}).encode()
        asked, never = [{"type": "http.request", "body": body}], asyncio.Event()
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not asked:
                await never.wait()
            return asked.pop()

        async def send(message: Any) -> None:
            if stuck:
                await never.wait()
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": []}
        await App(self.shared)(scope, receive, send)
        return sent

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@asynccontextmanager
async def users_of(
    engine: Paced, folder: Path, timeouts: Timeouts | None = None, running: int = 0
) -> AsyncIterator[Users]:
    """Users of a gateway that has begun, its state and its log in the folder."""
    lives = lives_of(engine, folder / "state")
    await lives.upkeep.begin()
    async with Upstream(engine.url, timeouts or Timeouts()) as upstream:
        yield Users(lives, upstream, folder / "log", running)
