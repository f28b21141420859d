"""An adapter's life where something breaks in it: loads that take long, copies that are torn, engines that forget."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from helpers.gateway_parts import comes, gateway_of
from helpers.inside import adapter as adapter_of
from helpers.paced import Paced, paced
from helpers.waiting import wait_until

from peftopt.engines._server import free_port
from peftopt.errors import ACCEPTED, INCONCLUSIVE, REJECTED, BadInput, WorkerFailed
from peftopt.gateway import copies, standing
from peftopt.gateway.listening import private
from peftopt.gateway.registry import open_registry


@pytest.fixture
def engine() -> Iterator[Paced]:
    with paced() as engine:
        yield engine


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three adapters of other weights each."""
    return [adapter_of(tmp_path / name, scale) for scale, name in enumerate(("a", "b", "c"), 1)]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftopt.gateway.loading.AGAIN_S", 0.0)


def damage(folder: str) -> None:
    """Cut the weights of a copy off, as a power cut may do to what was not synced."""
    with (Path(folder) / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)


# ---- a change of a route waits for nothing -----------------------------------------------------


@pytest.mark.parametrize("name", ["support", "sales"])
def test_a_rollback_takes_effect_while_a_put_is_loading(
    engine: Paced, folders: list[Path], tmp_path: Path, name: str
) -> None:
    """Of the same route it counts: what is put comes too late, and is unloaded."""

    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            lives = gateway.lives
            for folder in folders[:2]:
                await lives.put(name, folder)
            before = lives.registry.table.routes[name].previous
            engine.loads_held = True
            putting = asyncio.ensure_future(lives.put("support", folders[2]))
            await comes(lambda: engine.loads_waiting)
            assert (await lives.rollback(name)).exit_code == ACCEPTED
            await gateway.answer(name)
            assert before and engine.seen[-1]["model"] == before.served and not putting.done()
            engine.loads_held = False
            outcome = await putting
            assert outcome.exit_code == (INCONCLUSIVE if name == "support" else ACCEPTED), outcome.said
            await gateway.answer(name)
            assert engine.seen[-1]["model"] == before.served
            assert (f"support@{outcome.version}" in engine.folders) == (name == "sales")

    asyncio.run(main())


def test_a_name_that_is_removed_while_a_put_is_loading_stays_removed(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            await gateway.lives.put("support", folders[0])
            engine.loads_held = True
            putting = asyncio.ensure_future(gateway.lives.put("support", folders[1]))
            await comes(lambda: engine.loads_waiting)
            removing = asyncio.ensure_future(gateway.lives.remove("support"))
            await comes(lambda: "support" not in gateway.lives.registry.table.routes)
            assert (await gateway.answer("support"))[0] == 404
            engine.loads_held = False
            assert (await putting).exit_code == INCONCLUSIVE and (await removing).exit_code == ACCEPTED
            assert not engine.folders and not gateway.lives.registry.versions

    asyncio.run(main())


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.fault(19, "a served copy that is damaged is noticed, and the version before answers")
def test_a_torn_copy_is_noticed_at_the_start_and_the_version_before_answers(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            for folder in folders[:2]:
                await gateway.lives.put("support", folder)
            route = gateway.lives.registry.table.routes["support"]
            assert route.previous
            damage(engine.folders[route.live.served])
            gateway.end()
        engine.folders.clear()
        async with gateway_of(engine, tmp_path) as again:
            assert route.live.served not in engine.folders, "it was not loaded"
            assert any("damaged" in note for note in again.notes)
            assert (await again.answer("support"))[0] == 200 and engine.seen[-1]["model"] == route.previous.served
            assert (await again.lives.put("support", folders[1])).exit_code == ACCEPTED
            await again.answer("support")
            assert engine.seen[-1]["model"] == route.live.served
            assert copies.whole(Path(engine.folders[route.live.served])), "its copy is whole again"

    asyncio.run(main())


def test_a_torn_copy_without_a_version_before_is_said_and_the_others_are_served(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            await gateway.lives.put("support", folders[0])
            await gateway.lives.put("sales", folders[1])
            torn = gateway.lives.registry.table.routes["support"].live.served
            damage(engine.folders[torn])
            gateway.end()
        engine.folders.clear()
        async with gateway_of(engine, tmp_path) as again:
            status, told = await again.answer("support")
            assert status == 503 and "damaged" in told["error"]["message"]
            assert (await again.answer("sales"))[0] == 200 and (await again.told())["failed"].keys() == {torn}
            assert (await again.lives.put("support", folders[0])).exit_code == ACCEPTED
            assert (await again.answer("support"))[0] == 200 and not (await again.told())["failed"]

    asyncio.run(main())


def test_a_copy_that_was_cut_off_is_cleared_away(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "state" / "adapters" / ".123.tmp").mkdir(parents=True)
    registry = open_registry(tmp_path / "state")
    stored = registry.copy("support", folders[0])
    assert [path.name for path in (tmp_path / "state" / "adapters").iterdir()] == [stored.id]
    assert copies.whole(Path(stored.folder))
    assert registry.copy("support", folders[0]) == stored


# ---- what fails, fails alone -------------------------------------------------------------------


def test_a_version_that_does_not_load_at_the_start_fails_alone_and_is_tried_again(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            await gateway.lives.put("support", folders[0])
            gateway.end()
        engine.folders.clear()
        engine.deaf = True
        async with gateway_of(engine, tmp_path) as again:
            lives = again.lives
            assert lives.ready and len((await again.told())["failed"]) == 1
            status, told = await again.answer("support")
            assert status == 503 and "no room" in told["error"]["message"]
            assert (await again.answer("base"))[0] == 200
            assert [row["failed"] != "" for row in standing.rows(lives) if row["name"] == "support"] == [True]
            assert await lives.upkeep.mend() == []
            engine.deaf = False
            mended: list[str] = []
            while not mended:
                await asyncio.sleep(0.01)
                mended = await lives.upkeep.mend()
            assert (await again.answer("support"))[0] == 200 and not (await again.told())["failed"]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_users_of_a_canary_that_has_failed_are_answered_by_the_live_version(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            lives = gateway.lives
            await lives.put("support", folders[0])
            put = await lives.put("support", folders[1], 0.999)
            lives.fails(f"support@{put.version}", "it is gone")
            assert (await gateway.answer("support"))[0] == 200
            assert gateway.lines()[-1]["arm"] == "live"

    asyncio.run(main())


def test_what_the_engine_had_lost_is_asked_before_it_is_served_again(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            lives = gateway.lives
            await lives.put("support", folders[0])
            name = lives.registry.table.routes["support"].live.served
            asked = engine.answers[name]
            engine.folders.clear()
            assert await lives.upkeep.reconcile() == [name] and engine.answers[name] > asked
            assert (await gateway.answer("support"))[0] == 200
            engine.folders.clear()
            engine.twisted = "base"
            with pytest.raises(WorkerFailed, match="wrong answers"):
                await lives.upkeep.reconcile()
            assert (await gateway.answer("support"))[0] == 503, "another's weights answer nobody"

    asyncio.run(main())


def test_an_engine_that_has_an_adapter_already_is_not_told_to_load_it_in_vain(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    """vLLM refuses a name that it knows: after a kill -9 of the gateway the engine may still have them all."""

    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            await gateway.lives.put("support", folders[0])
            gateway.end()
        engine.deaf = True
        async with gateway_of(engine, tmp_path) as again:
            assert (await again.answer("support"))[0] == 200 and not (await again.told())["failed"]

    asyncio.run(main())


# ---- engines that tell nothing -----------------------------------------------------------------


def test_an_engine_that_cannot_be_asked_is_served_with_a_notice_and_every_line_says_so(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    engine.mute = True

    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            lives = gateway.lives
            assert any("no log-probabilities" in note for note in gateway.notes)
            await gateway.answer("base")
            assert gateway.lines()[-1]["certified"] is False
            assert (await lives.put("support", folders[0])).exit_code == REJECTED and not engine.folders
            put = await lives.put("support", folders[0], certify=False)
            assert put.exit_code == ACCEPTED and "log-probabilities" in put.said
            await gateway.answer("support")
            assert gateway.lines()[-1]["certified"] is False

    asyncio.run(main())


def test_what_was_put_uncertified_stays_so_after_a_restart(engine: Paced, folders: list[Path], tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            await gateway.lives.put("support", folders[0], certify=False)
            gateway.end()
        async with gateway_of(engine, tmp_path) as again:
            await again.answer("support")
            await again.answer("base")
        assert [line["certified"] for line in again.lines()] == [False, True]

    asyncio.run(main())


def test_an_engine_that_does_not_answer_leaves_the_gateway_not_ready(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            gateway.lives.loader.url = f"http://127.0.0.1:{free_port()}"
            with pytest.raises(WorkerFailed):
                await gateway.lives.upkeep.begin()
            assert not gateway.lives.ready

    asyncio.run(main())


def test_what_was_put_uncertified_is_certified_when_it_is_put_again(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            for certify in (False, True):
                assert (await gateway.lives.put("support", folders[0], certify=certify)).exit_code == ACCEPTED
                await gateway.answer("support")
        assert [line["certified"] for line in gateway.lines()] == [False, True]

    asyncio.run(main())


# ---- the operators' socket ---------------------------------------------------------------------


def test_the_operators_socket_is_its_owners_from_its_first_moment_on(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    before = os.umask(0)
    try:
        with private(path, "--admin"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with private(path, "--admin") as again, socket.socket(socket.AF_UNIX) as other:  # one that was left is replaced
            again.listen()
            other.connect(str(path))
    finally:
        assert os.umask(before) == 0, "what others make is left alone"
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(BadInput):
        private(tmp_path / "precious", "--admin")


def test_a_gateway_that_listens_has_a_socket_of_its_owners(engine: Paced, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peftopt.cli", "serve", "--upstream", engine.url, "--port", str(free_port())]
    path = tmp_path / "admin.sock"
    with subprocess.Popen([*command, "--state", tmp_path / "state", "--admin", f"unix:{path}"]) as process:
        try:
            transport = httpx2.HTTPTransport(uds=str(path))
            with httpx2.Client(transport=transport, base_url="http://gateway") as operators:

                def listed() -> bool:
                    with contextlib.suppress(httpx2.HTTPError):
                        return operators.get("/adapters").status_code == 200
                    return False

                wait_until(listed)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    assert not path.exists()
