"""The gateway where things go wrong: engines that talk nonsense, operators who change their minds, disks that are full.

In this process, before a paced engine: what is tested is what the gateway's parts do with it.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from helpers.inside import PROMPTS, adapter, lives_of, users_of
from helpers.paced import Paced, paced

from peftopt.engines._server import free_port
from peftopt.errors import ACCEPTED, INCONCLUSIVE, REJECTED, BadInput, MissingEnvironment
from peftopt.gateway.admission import Ticket
from peftopt.gateway.lives import Lives, Settings
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.routes import Route, Version
from peftopt.gateway.run import Config, Gateway, run
from peftopt.gateway.trial import Judged, Terms
from peftopt.gateway.upstream import Timeouts
from peftopt.loadtest.arrivals import SERVE_LOG


@pytest.fixture
def engine() -> Iterator[Paced]:
    with paced() as engine:
        yield engine


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three adapters of other weights each."""
    return [adapter(tmp_path / name, scale) for scale, name in enumerate(("a", "b", "c"), 1)]


# ---- engines that talk nonsense ----------------------------------------------------------------


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
        async with users_of(engine, tmp_path) as users:
            engine.says = said
            head, body = await users.ask()
        assert head["status"] == 200 and body["body"] == json.dumps(said).encode()
        (line,) = users.lines()
        assert line["status"] == 200 and not line["error_kind"] and (line["prompt_tokens"] or 0) >= 0
        assert "NaN" not in users.log.read_text()
        assert not users.shared.admission.running

    asyncio.run(main())


def test_a_status_that_http_does_not_have_is_the_engines_fault(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with users_of(engine, tmp_path) as users:
            engine.says, engine.status = {}, 999
            assert (await users.ask())[0]["status"] == 502
        assert users.lines()[0]["error_kind"] == "upstream"

    asyncio.run(main())


def test_a_fault_of_the_gateways_own_is_an_error_in_its_line(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with users_of(engine, tmp_path) as users:
            users.shared.lives.switched = None  # type: ignore[assignment]
            with pytest.raises(AttributeError):
                await users.ask()
        (line,) = users.lines()
        assert line["status"] == 500 and line["error_kind"] == "gateway" and "AttributeError" in line["error"]

    asyncio.run(main())


def test_an_answer_without_an_end_has_a_limit_of_its_own(engine: Paced, tmp_path: Path) -> None:
    """Not one on the pauses in it: an engine on a busy machine makes some."""

    async def main() -> None:
        async with users_of(engine, tmp_path, Timeouts(whole=0.5)) as users:
            sent = await users.ask(stream=True, max_tokens=100_000)
            assert b'"timeout"' in (sent[-2]["body"] if len(sent) > 2 else sent[-1]["body"])
        assert users.lines()[0]["error_kind"] == "timeout"

    asyncio.run(main())


def test_a_client_that_reads_nothing_gives_its_place_up(engine: Paced, tmp_path: Path) -> None:
    """It has its answer, and the next one would wait for its place as long as an answer may take."""

    async def main() -> None:
        async with users_of(engine, tmp_path, Timeouts(gap=0.1), running=1) as users:
            assert await asyncio.wait_for(users.ask(stuck=True), 60) == []
            assert not users.shared.admission.running
        (line,) = users.lines()
        assert line["error_kind"] == "cancelled" and "read nothing" in line["error"]

    asyncio.run(main())


def test_a_request_whose_adapter_is_removed_while_it_waits_is_told_so(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        async with users_of(engine, tmp_path, running=1) as users:
            lives = users.shared.lives
            await lives.put("support", folders[0])
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


# ---- operators who change their minds ----------------------------------------------------------


@pytest.mark.parametrize("change", ["remove", "rollback", "promote", "put", "canary"])
def test_a_trial_ends_with_what_it_judges(engine: Paced, folders: list[Path], tmp_path: Path, change: str) -> None:
    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        await lives.upkeep.begin()
        await lives.put("support", folders[0])
        await lives.put("support", folders[1], 0.5, Terms())
        if change == "put":
            await lives.put("support", folders[2])
        elif change == "canary":
            await lives.put("support", folders[2], 0.5)
        else:
            await getattr(lives, change)("support")
        assert "support" not in lives.trials and lives.registry.ended["support"].exit_code == INCONCLUSIVE
        await lives.trials.judge()

    asyncio.run(main())


@pytest.mark.parametrize("outcome", ["rejected", "accepted"])
def test_a_verdict_that_comes_late_changes_nothing(
    engine: Paced, folders: list[Path], tmp_path: Path, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator promotes while the verdict waits for its turn: the promoted version is not rolled back."""

    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        await lives.upkeep.begin()
        await lives.put("support", folders[0])
        put = await lives.put("support", folders[1], 0.5, Terms(then="promote"))
        verdict = Judged(outcome, "canary.latency", "9 windows")
        monkeypatch.setattr("peftopt.gateway.trial.Trial.judge", lambda *_: verdict)
        promoting = asyncio.ensure_future(lives.promote("support"))
        await asyncio.sleep(0)  # it has the lock, or is the next
        await lives.trials.judge()
        await promoting
        assert lives.registry.table.routes["support"].live.id == put.version
        assert lives.registry.ended["support"].exit_code == INCONCLUSIVE

    asyncio.run(main())


def test_a_put_that_is_rejected_leaves_a_version_that_answers_users_loaded(
    engine: Paced, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        await lives.upkeep.begin()
        await lives.put("support", folders[0])
        await lives.put("support", folders[1], 0.5)
        canary = lives.registry.table.routes["support"].canary
        assert canary

        async def wrong(*_: object) -> list[str]:
            return ["it answers as another"]

        monkeypatch.setattr(lives, "wrong", wrong)
        assert (await lives.put("support", folders[1])).exit_code == REJECTED
        assert canary.served in engine.folders and lives.registry.versions[canary.served].state == "canary"

    asyncio.run(main())


def test_a_rollback_does_not_wait_for_the_requests_of_what_is_removed(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        await lives.upkeep.begin()
        for folder in folders[:2]:
            await lives.put("support", folder)
        await lives.put("sales", folders[2])
        sales = lives.registry.table.routes["sales"].live.served
        lives.in_flight[sales] = 1
        removing = asyncio.ensure_future(lives.remove("sales"))
        while "sales" in lives.registry.table.routes:
            await asyncio.sleep(0)
        assert (await lives.rollback("support")).exit_code == ACCEPTED
        assert not removing.done() and sales in engine.folders, "its requests end on it"
        lives.in_flight[sales] = 0
        assert (await removing).exit_code == ACCEPTED and sales not in engine.folders

    asyncio.run(main())


@pytest.mark.parametrize(
    "terms",
    [{"window_s": 0}, {"window_s": "30s"}, {"for_s": float("nan")}, {"then": "win"}, {"least": 0}, {"slower": -1}],
)
def test_terms_that_nothing_can_be_judged_by_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Terms(**terms)


# ---- what a crash or another engine has left ---------------------------------------------------


def test_a_version_that_a_crash_left_at_the_engine_is_unloaded(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        stored = lives.registry.keep(lives.registry.copy("support", folders[0]), state="loading")
        engine.folders[stored.version.served] = stored.folder
        await lives.upkeep.begin()
        assert not engine.folders and not lives.registry.versions

    asyncio.run(main())


def test_names_that_an_engine_brings_are_those_of_the_engine_that_runs(engine: Paced, tmp_path: Path) -> None:
    """llama.cpp's server calls the base by another name than vLLM: the state of one may be used for the other."""

    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        lives.registry.route("base", Route(Version("", "model")))
        lives.registry.route("other", Route(Version("", "other")))
        await lives.upkeep.begin()
        assert {name: route.live.served for name, route in lives.registry.table.routes.items()} == {"base": "base"}

    asyncio.run(main())


@pytest.mark.fault(4, "a gateway whose disk is full serves on")
def test_a_full_disk_keeps_no_adapter_from_being_loaded_again(
    engine: Paced, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        await lives.upkeep.begin()
        await lives.put("support", folders[0])
        lives.registry.keep(lives.registry.copy("left", folders[1]), state="loading")

        def full(*_: object) -> None:
            raise MissingEnvironment("the disk is full")

        monkeypatch.setattr(lives.registry, "save", full)
        engine.folders.clear()
        await lives.upkeep.begin()
        assert lives.ready and len(engine.folders) == 1
        with pytest.raises(MissingEnvironment):
            await lives.put("sales", folders[2])
        assert lives.ready and "sales" not in lives.registry.table.routes

    asyncio.run(main())


def test_a_version_that_is_on_no_record_is_not_brought(engine: Paced, tmp_path: Path) -> None:
    """Nobody may ask for a version that an earlier gateway left at the engine: it may be one that was rejected."""
    engine.folders["support@0123456789ab"] = "gone"
    how = asyncio.run(Gateway(config(tmp_path, engine.url), print)._how())
    assert how.brings == {"base": "base"}


# ---- the gateway as a whole --------------------------------------------------------------------


def config(where: Path, url: str, **more: Any) -> Config:
    own = {"state": where / "state", "port": free_port(), "upstream": url, "admin": f"unix:{where}/admin.sock"}
    return Config(**{**own, "lives": Settings(prompts=PROMPTS), "log": str(where / "log"), **more})


def test_a_request_that_the_drain_cuts_off_has_its_line(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        gateway = Gateway(config(tmp_path, engine.url, drain_s=0.05), print)
        serving = asyncio.ensure_future(gateway.whole())
        while not (hasattr(gateway, "shared") and gateway.shared.lives.ready):
            await asyncio.sleep(0.01)
        body = b'{"model": "base", "messages": [{"role": "user", "content": "hold"}]}'
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.config.port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        while not engine.running:
            await asyncio.sleep(0.01)
        gateway.ended.set()
        assert await serving == 0
        writer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as it is run
        runner.run(main())
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (line,) = [line for line in lines if line["kind"] == SERVE_LOG]
    assert line["error_kind"] == "cancelled" and "stopped" in line["error"]


def test_an_engine_that_was_started_again_but_not_ready_is_asked_again(
    engine: Paced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process lives, so nobody starts it once more: without this the gateway would never be ready again."""
    monkeypatch.setattr("peftopt.gateway.run.RECONCILE_EVERY_S", 0.0)

    async def main() -> None:
        gateway = Gateway(config(tmp_path, engine.url), print)
        gateway.engine = SimpleNamespace(alive=lambda: True)  # type: ignore[assignment]
        lives = Lives(engine.url, gateway.registry, Settings(prompts=PROMPTS), Metrics(), {"base": "base"}, True, print)
        beside = asyncio.ensure_future(gateway._reconcile(lives))
        while not lives.ready:
            await asyncio.sleep(0.01)
        beside.cancel()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("fails", [MissingEnvironment("the disk is full"), KeyError("id")])
def test_what_cannot_be_cleared_away_keeps_nobody_from_being_answered(
    engine: Paced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Exception
) -> None:
    monkeypatch.setattr("peftopt.gateway.run.RECONCILE_EVERY_S", 0.0)

    async def main() -> None:
        gateway = Gateway(config(tmp_path, engine.url), print)
        lives = Lives(engine.url, gateway.registry, Settings(prompts=PROMPTS), Metrics(), {"base": "base"}, True, print)
        await lives.upkeep.begin()
        tried = []

        async def retire() -> list[str]:
            tried.append(lives.ready)
            raise fails

        monkeypatch.setattr(lives, "retire", retire)
        beside = asyncio.ensure_future(gateway._reconcile(lives))
        while len(tried) < 3:
            await asyncio.sleep(0.01)
        beside.cancel()
        assert all(tried) and lives.ready

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_port_that_is_taken_and_a_socket_that_is_a_file_are_named(engine: Paced, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(BadInput, match="precious"):
        run(config(tmp_path, engine.url, admin=f"unix:{tmp_path}/precious"), print)
    assert (tmp_path / "precious").read_text() == "mine"
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(MissingEnvironment, match="cannot listen"):
        run(config(tmp_path / "more", engine.url, port=other.getsockname()[1]), print)


def test_an_adapter_of_a_higher_rank_than_the_engine_holds_is_told_so(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    """The rank of a single layer counts as well."""
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    (folders[0] / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_proj": 64}}))

    async def main() -> None:
        lives = lives_of(engine, tmp_path / "state")
        lives.settings.max_rank = 8
        await lives.upkeep.begin()
        with pytest.raises(BadInput, match="rank 64"):
            await lives.put("support", folders[0])
        assert (await lives.put("support", folders[1])).exit_code == ACCEPTED

    asyncio.run(main())
