"""The gateway where things go wrong: engines that talk nonsense, operators who change their minds, disks that are full.

In this process, before a paced engine: what is tested is what the gateway's parts do with it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.paced import Paced, paced
from safetensors.numpy import save_file

from peftopt.gateway.admission import Admission, Ticket
from peftopt.gateway.app import App, Shared
from peftopt.gateway.keys import Keys
from peftopt.gateway.limits import Limits
from peftopt.gateway.lines import Log
from peftopt.gateway.lives import Lives, Settings
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.registry import open_registry
from peftopt.gateway.upstream import Timeouts, Upstream

PROMPTS = {"one": ({"role": "user", "content": "One?"},), "two": ({"role": "user", "content": "Two?"},)}


@pytest.fixture
def engine() -> Iterator[Paced]:
    with paced() as engine:
        yield engine


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three adapters of other weights each."""
    return [adapter(tmp_path / name, scale) for scale, name in enumerate(("a", "b", "c"), 1)]


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


# ---- engines that talk nonsense ----------------------------------------------------------------


class Users:
    """The users' application, asked without sockets. `sent`: the messages of the last answer."""

    def __init__(self, lives: Lives, upstream: Upstream, log: Path, running: int = 0) -> None:
        self.log = log
        self.shared = Shared(
            upstream, lives, Admission(Limits(running, waiting=running)), Keys(), lives.metrics, Log(str(log))
        )

    async def ask(self, model: str = "base", stuck: bool = False, **more: Any) -> list[dict[str, Any]]:
        """The messages of an answer; `stuck`: the client takes none of them."""
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

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        await App(self.shared)(scope, receive, send)
        return sent

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.mark.parametrize(
    "said",
    [
        {"choices": [], "usage": {"prompt_tokens": -5, "completion_tokens": -2}},
        {"choices": [], "usage": {"prompt_tokens": 10**400, "completion_tokens": 1}},
        {"choices": 5},
        {"choices": [], "metrics": {"queue_time_ms": float("nan"), "time_to_first_token_ms": "soon"}},
    ],
)
def test_an_answer_of_nonsense_passes_and_has_its_line(engine: Paced, tmp_path: Path, said: dict[str, Any]) -> None:
    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        await lives.begin()
        engine.says = said
        async with Upstream(engine.url, Timeouts()) as upstream:
            users = Users(lives, upstream, tmp_path / "log")
            head, body = await users.ask()
        assert head["status"] == 200 and body["body"] == json.dumps(said).encode()
        (line,) = users.lines()
        assert line["status"] == 200 and not line["error_kind"] and (line["prompt_tokens"] or 0) >= 0
        assert "NaN" not in users.log.read_text()
        assert not users.shared.admission.running

    asyncio.run(main())


def test_a_status_that_http_does_not_have_is_the_engines_fault(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        await lives.begin()
        engine.says, engine.status = {}, 999
        async with Upstream(engine.url, Timeouts()) as upstream:
            users = Users(lives, upstream, tmp_path / "log")
            assert (await users.ask())[0]["status"] == 502
        assert users.lines()[0]["error_kind"] == "upstream"

    asyncio.run(main())


def test_a_fault_of_the_gateways_own_is_an_error_in_its_line(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        await lives.begin()
        async with Upstream(engine.url, Timeouts()) as upstream:
            users = Users(lives, upstream, tmp_path / "log")
            users.shared.lives.switched = None  # type: ignore[assignment]
            with pytest.raises(AttributeError):
                await users.ask()
        (line,) = users.lines()
        assert line["status"] == 500 and line["error_kind"] == "gateway" and "AttributeError" in line["error"]

    asyncio.run(main())


def test_a_client_that_reads_nothing_gives_its_place_up(engine: Paced, tmp_path: Path) -> None:
    """It has its answer, and the next one would wait for its place as long as an answer may take."""

    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        await lives.begin()
        async with Upstream(engine.url, Timeouts(gap=0.1)) as upstream:
            users = Users(lives, upstream, tmp_path / "log", running=1)
            assert await asyncio.wait_for(users.ask(stuck=True), 60) == []
            assert not users.shared.admission.running
        (line,) = users.lines()
        assert line["error_kind"] == "cancelled" and "read nothing" in line["error"]

    asyncio.run(main())


def test_a_request_whose_adapter_is_removed_while_it_waits_is_told_so(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        await lives.begin()
        await lives.put("support", folders[0])
        async with Upstream(engine.url, Timeouts()) as upstream:
            users = Users(lives, upstream, tmp_path / "log", running=1)
            other = Ticket("base")
            users.shared.admission.arrive(other, 0.0)
            waits = asyncio.ensure_future(users.ask("support"))
            while not users.shared.admission.waiting:
                await asyncio.sleep(0)
            await lives.remove("support")
            users.shared.let_in(users.shared.admission.leave(other, 0, 1.0))
            assert (await waits)[0]["status"] == 404
        assert users.lines()[0]["error_kind"] == "request" and not users.shared.admission.running

    asyncio.run(main())
