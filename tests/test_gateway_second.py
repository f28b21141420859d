"""Merged models behind the gateway: each on an engine of its own, a process that is started, asked and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from helpers.gateway_parts import comes, gateway_of
from helpers.gateways import HTTP
from helpers.inside import adapter as adapter_of
from helpers.paced import Paced, paced
from helpers.waiting import wait_until
from helpers.weights import plain_model
from hypothesis import given
from hypothesis import strategies as st

from peftopt.canary.fingerprint import Known
from peftopt.engines._server import free_port
from peftopt.errors import ACCEPTED, REJECTED, BadInput, MissingEnvironment
from peftopt.gateway import engines, merged
from peftopt.gateway.asking import Asker
from peftopt.gateway.backends import Start
from peftopt.gateway.failures import AGAIN_AT_MOST_S, AGAIN_S, Failures
from peftopt.gateway.lives import Lives
from peftopt.gateway.routes import Route, Version
from peftopt.gateway.run import Config, Gateway
from peftopt.gateway.said import Vocabulary
from peftopt.gateway.sampling import Engine, Sampler


@pytest.fixture
def engine() -> Iterator[Paced]:
    with paced() as engine:
        yield engine


class Started:
    """Starts paced engines for merged models. `weights`: what the next ones answer as; `ports` that they got."""

    def __init__(self) -> None:
        self.weights = "merged"
        self.ports: list[int] = []

    def __call__(self, engine: str, folder: Path, name: str) -> Start:
        if engine == "nobody":
            raise BadInput("nothing serves the engine 'nobody'")
        port = free_port()
        self.ports.append(port)
        command = [sys.executable, "-m", "helpers.paced", str(port), name, self.weights]
        variables = {"PYTHONPATH": os.pathsep.join(sys.path)}
        return Start(command, variables, f"http://127.0.0.1:{port}", {name: name}, engine=engine or "eager")


def process_of(lives: Lives, name: str) -> psutil.Process:
    return psutil.Process(lives.engines._running[name].server.processes()[0])


def test_a_merged_model_goes_an_adapters_way_on_an_engine_of_its_own(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        starter = Started()
        async with gateway_of(engine, tmp_path, starter) as gateway:
            lives, adapter = gateway.lives, adapter_of(tmp_path / "a", 1)
            await lives.put("support", adapter)
            live = lives.registry.table.routes["support"].live
            starter.weights = engine.folders[live.served]  # it answers as the adapter does
            put = await lives.put("support", plain_model(tmp_path / "m", 1, adapter))
            assert put.exit_code == ACCEPTED and "names the adapter" in put.said, put.said
            before = len(engine.seen)
            status, told = await gateway.answer("support")
            assert status == 200 and len(engine.seen) == before, "the first engine was not asked"
            now = lives.registry.table.routes["support"]
            assert told["model"] == now.live.served, "as the first engine would name it"
            assert now.live.id == put.version and now.previous == live
            line = gateway.lines()[-1]
            assert (line["version"], line["arm"], line["certified"]) == (put.version, "live", True)
            assert line["model_loading_time"] > 0 and line["kv_usage"] is None
            text = lives.metrics.text().decode()
            assert any(put.version in row and "adapter_info" in row for row in text.splitlines())

            process = process_of(lives, now.live.served)
            await lives.rollback("support")
            await gateway.answer("support")
            assert engine.seen[-1]["model"] == live.served and process.is_running(), "it is kept for a rollback"
            assert (await lives.remove("support")).exit_code == ACCEPTED
            assert not process.is_running() and not engine.folders
            assert not list((tmp_path / "state" / "adapters").iterdir())

    asyncio.run(main())


@pytest.mark.parametrize("certificate", ["none", "this", "another"])
@pytest.mark.parametrize("certify", [True, False])
def test_a_merged_model_that_is_not_the_adapter_is_rejected_where_it_should_be(
    engine: Paced, tmp_path: Path, certificate: str, certify: bool
) -> None:
    """Without a certificate it has to be the adapter's; a merge of another adapter is a new version."""

    async def main() -> None:
        async with gateway_of(engine, tmp_path, Started()) as gateway:
            lives, adapter = gateway.lives, adapter_of(tmp_path / "a", 1)
            other = adapter_of(tmp_path / "b", 2)
            await lives.put("support", adapter)
            of = {"none": None, "this": adapter, "another": other}[certificate]
            put = await lives.put("support", plain_model(tmp_path / "m", 1, of), certify=certify)
            passes = not certify or certificate == "another"
            assert put.exit_code == (ACCEPTED if passes else REJECTED), put.said
            assert "nats" in put.said or certificate == "another"
            await gateway.answer("support")
            assert (gateway.lines()[-1]["version"] == put.version) == passes
            assert gateway.lines()[-1]["certified"] == (certify or not passes)
            if not passes:
                assert lives.engines.where(f"support@{put.version}") is None, "its engine has ended"
            assert len(lives.registry.versions) == 1 + passes

    asyncio.run(main())


def test_a_line_has_the_sample_of_the_engine_that_answered(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        engine.kv_usage = 0.5
        async with gateway_of(engine, tmp_path, Started()) as gateway:
            lives, upstream = gateway.lives, gateway.shared.upstream
            sampler, own = Sampler(lives.metrics), Engine("", upstream.get)
            put = await lives.put("support", plain_model(tmp_path / "m", 1))
            gateway.shared.samples = await sampler.sample([own, *lives.engines.sampled(upstream)])
            await gateway.answer("base")
            await gateway.answer("support")
            assert [line["kv_usage"] for line in gateway.lines()] == [0.5, 0.25]
            of_second = f'peftopt_kv_cache_usage_ratio{{engine="support@{put.version}"}} 0.25'
            assert of_second in lives.metrics.text().decode()
            await lives.remove("support")
            await sampler.sample([own, *lives.engines.sampled(upstream)])
            assert of_second not in lives.metrics.text().decode(), "its engine has ended"

    asyncio.run(main())


def test_what_the_gateway_was_started_with_is_put_over_and_comes_back(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        newer, newest = plain_model(tmp_path / "m", 1), plain_model(tmp_path / "n", 2)
        async with gateway_of(engine, tmp_path, Started()) as gateway:
            lives = gateway.lives

            async def answers() -> str:
                return str((await gateway.answer("base"))[1]["model"])

            with pytest.raises(BadInput):
                await lives.remove("base")
            with pytest.raises(BadInput) as refused:
                await lives.put("base", adapter_of(tmp_path / "a", 1))
            assert "peftopt merge" in refused.value.hint
            put = await lives.put("base", newer, 0.999)
            assert put.exit_code == ACCEPTED and await answers() == f"base@{put.version}"
            await lives.promote("base")
            await lives.rollback("base")
            assert await answers() == "base", "the first engine, which has never ended"
            await lives.rollback("base")
            assert await answers() == f"base@{put.version}"
            gateway.end()
        async with gateway_of(engine, tmp_path, Started()) as gateway:
            lives = gateway.lives
            assert await answers() == f"base@{put.version}", "a restart takes nothing back"
            assert any("base" in note and "remove" in note for note in gateway.notes)
            assert (await lives.put("base", newest)).exit_code == ACCEPTED
            assert (await lives.remove("base")).exit_code == ACCEPTED
            assert await answers() == "base" and not lives.registry.versions and not lives.engines._running

    asyncio.run(main())


def test_an_adapter_of_the_command_line_takes_the_name_that_another_engine_brought(
    engine: Paced, tmp_path: Path
) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path) as gateway:
            gateway.end()
        config = Config(tmp_path / "state", adapters={"base": adapter_of(tmp_path / "a", 1)})
        again = Gateway(config, print)
        again._bring()
        assert again.registry.table.routes["base"].live.id

    asyncio.run(main())


def test_a_request_ends_on_the_engine_that_it_began_with(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path, Started()) as gateway:
            lives = gateway.lives
            first = await lives.put("support", plain_model(tmp_path / "m", 1))
            held = asyncio.ensure_future(gateway.answer("support", max_tokens=500))
            await comes(lambda: lives.in_flight[f"support@{first.version}"])
            second = await lives.put("support", plain_model(tmp_path / "n", 2))
            assert second.exit_code == ACCEPTED, "a version that is merged itself is not compared"
            assert (await held)[0] == 200
            await gateway.answer("support")
        assert [line["version"] for line in gateway.lines()] == [first.version, second.version]

    asyncio.run(main())


def test_an_engine_that_dies_is_started_again_and_asked_before_it_answers(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        starter = Started()
        async with gateway_of(engine, tmp_path, starter) as gateway:
            lives = gateway.lives
            put = await lives.put("support", plain_model(tmp_path / "m", 1))
            name = f"support@{put.version}"
            process = process_of(lives, name)
            process.kill()
            await comes(lambda: lives.engines.dead())
            assert not await lives.upkeep.mend(), "not at once: it may die again"
            status, told = await gateway.answer("support")
            assert status == 503 and told["error"]["code"] == "adapter_failed" and name in told["error"]["message"]
            assert (await gateway.told())["failed"].keys() == {name}
            assert (await gateway.answer("base"))[0] == 200, "the others are answered"
            mended: list[str] = []
            while not mended:
                await asyncio.sleep(0.01)
                mended = await lives.upkeep.mend()
            assert mended == [name] and (await gateway.answer("support"))[0] == 200
            assert len(set(starter.ports)) == len(starter.ports), "each has a port of its own"
            assert process_of(lives, name).pid != process.pid

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_merged_model_on_trial_is_asked_on_its_own_engine(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path, Started()) as gateway:
            put = await gateway.lives.put("support", plain_model(tmp_path / "m", 1))
            before = len(engine.seen)
            asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            asker = Asker(gateway.shared, Vocabulary())
            said = await asker.ask("/v1/chat/completions", asked, f"support@{put.version}")
            assert not said.error and len(engine.seen) == before

    asyncio.run(main())


def test_a_gateway_that_starts_again_starts_the_engines_of_its_versions(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        model = plain_model(tmp_path / "m", 1)
        async with gateway_of(engine, tmp_path, Started()) as gateway:
            put = await gateway.lives.put("support", model)
            old = process_of(gateway.lives, f"support@{put.version}")
        assert not old.is_running()
        gateway.end()
        async with gateway_of(engine, tmp_path, Started()) as again:
            assert (await again.answer("support"))[0] == 200
            assert gateway.lines()[-1]["version"] == put.version

    asyncio.run(main())


def test_a_model_that_the_memory_does_not_hold_is_refused_with_the_numbers(
    engine: Paced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftopt.machine.free_memory", lambda: engines.LEAST_BYTES)

    async def main() -> None:
        starter = Started()
        async with gateway_of(engine, tmp_path, starter) as gateway:
            with pytest.raises(MissingEnvironment, match=r"0\.50 GiB are free"):
                await gateway.lives.put("support", plain_model(tmp_path / "m", 1))
            assert not gateway.lives.registry.versions and not gateway.lives.engines._running

    asyncio.run(main())


@pytest.mark.parametrize("wrong", ["engine", "adapter", "code", "none"])
def test_what_is_no_safe_model_is_refused_before_an_engine_starts(engine: Paced, tmp_path: Path, wrong: str) -> None:
    async def main() -> None:
        async with gateway_of(engine, tmp_path, None if wrong == "none" else Started()) as gateway:
            folder, named = plain_model(tmp_path / "m", 1), ""
            if wrong == "engine":
                named = "nobody"
            elif wrong == "adapter":
                folder, named = adapter_of(tmp_path / "a", 1), "eager"
            elif wrong == "code":
                config = json.loads((folder / "config.json").read_text())
                (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.py"}}))
            with pytest.raises(BadInput):
                await gateway.lives.put("support", folder, engine=named)
            assert not gateway.lives.engines._running and not engine.folders

    asyncio.run(main())


def test_an_engine_dies_with_a_gateway_that_is_killed(tmp_path: Path) -> None:
    """kill -9 of the process that has started it: the kernel ends it."""
    code = f"""
import asyncio, pathlib, sys
sys.path[:0] = {sys.path!r}
from test_gateway_second import Started, plain_model
from peftopt.gateway.engines import Engines
from peftopt.gateway.registry import Stored
async def main():
    folder = plain_model(pathlib.Path({str(tmp_path / "m")!r}), 1)
    engines = Engines(Started(), folder.parent)
    stored = Stored("support", "0" * 64, str(folder), engine="eager")
    await engines.start(stored)
    print(engines._running[stored.version.served].server.processes()[0], flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout
        own = psutil.Process(int(gateway.stdout.readline()))
        os.kill(gateway.pid, signal.SIGKILL)
        gateway.wait()
    gone, _ = psutil.wait_procs([own], 60)
    assert gone


class Served:
    """`peftopt serve` before real engines, in a process of its own."""

    def __init__(self, where: Path, base: Path) -> None:
        self.port, self.admin = free_port(), f"unix:{where}/admin.sock"
        options = ["--engine", "eager", "--threads", 1, "--adapters-from", where, "--admin", self.admin]
        command = ["serve", "--base", base, "--state", where / "state", "--port", self.port, *options]
        self.process = subprocess.Popen([sys.executable, "-m", "peftopt.cli", *map(str, command)])
        wait_until(self.ready, seconds=300)

    def ready(self) -> bool:
        assert self.process.poll() is None
        with contextlib.suppress(httpx2.HTTPError):
            return HTTP.get(f"http://127.0.0.1:{self.port}/health/ready").status_code == 200
        return False

    def ask(self, model: str) -> str:
        """The name that the answer has for the model."""
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        answer = HTTP.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body, timeout=300)
        return str(answer.raise_for_status().json()["model"])

    def operate(self, *arguments: object) -> Any:
        command = [sys.executable, "-m", "peftopt.cli", "adapters", *arguments, "--admin", self.admin, "--json"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
        return json.loads(done.stdout)

    def engines(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def end(self, number: int) -> None:
        engines = self.engines()
        self.process.send_signal(number)
        self.process.wait(300)
        _, left = psutil.wait_procs(engines, 60)
        assert not left, "no engine outlives its gateway"


def test_real_engines_come_back_after_a_kill_of_their_gateway(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "merged")
    served = Served(tmp_path, tiny_base)
    try:
        put = served.operate("put", f"support={tmp_path}/merged")
        assert put["exit_code"] == 0, put
        name = f"support@{put['version']}"
        assert served.ask("support") == name and len(served.engines()) == 2
        served.end(signal.SIGKILL)
        served = Served(tmp_path, tiny_base)
        assert served.ask("support") == name and served.ask("base") == "base"
        (row,) = [row for row in served.operate("list")["adapters"] if row["name"] == "support"]
        assert row["version"] == put["version"] and row["engine"] == "eager" and not row["failed"]
        assert served.operate("remove", "support")["exit_code"] == 0
        assert len(served.engines()) == 1 and served.ask("base") == "base"
        served.end(signal.SIGTERM)
    finally:
        served.process.kill()
        served.process.wait()


# ---- pure ----------------------------------------------------------------------------------------


def shifted(by: float) -> list[tuple[str, Mapping[str, float]]]:
    return [("a", {"a": -0.1 - by, "b": -3.0 - by})]


def test_a_merged_model_is_told_from_the_base_however_noisy_the_merge_was() -> None:
    prints = {"base": {"p": shifted(0.4)}, "adapter": {"p": shifted(0.0)}, "merged": {"p": shifted(0.4)}}
    known = Known(prints, dict.fromkeys(prints, 0.0))
    found = merged.apart(known, "merged", "adapter", "base", nats=10.0)
    assert found.nats == pytest.approx(0.4) and found.limit == pytest.approx(0.2)


@given(st.floats(0, 1), st.floats(0, 0.2))
def test_a_merged_model_as_far_as_its_noise_is_the_adapters(by: float, noise: float) -> None:
    prints = {"adapter": {"p": shifted(0.0)}, "merged": {"p": shifted(by)}}
    found = merged.apart(Known(prints, {"adapter": noise, "merged": 0.0}), "merged", "adapter", "base", nats=0.0)
    assert found.limit >= 2 * noise and found.nats == pytest.approx(by)


def test_a_route_without_a_version_that_cannot_answer_falls_back_to_the_one_before() -> None:
    a, b, c = (Version(id_, f"x@{id_}") for id_ in "abc")
    assert Route(a, b, 0.5, c).without(a) == Route(c, b, 0.5)
    assert Route(a, b, 0.5, c).without(b) == Route(a, previous=c)
    assert Route(a, b, 0.5, c).without(c) == Route(a, b, 0.5)
    assert Route(a, b, 0.5).without(a) is None


def test_what_another_engine_brings_takes_the_place_of_what_the_one_before_brought() -> None:
    old, new, put = Version("", "base"), Version("", "support"), Version("a", "x@a")
    assert Route(put, previous=old).bringing(new) == Route(put, previous=new)
    assert Route(old, put, 0.5).bringing(new) == Route(new, put, 0.5)
    assert Route(put, previous=old).bringing(None) == Route(put)
    assert Route(old, previous=put).bringing(None) == Route(put)
    assert Route(old).bringing(None) is None and Route(put).bringing(None) == Route(put)


def test_a_version_is_where_it_runs_now_in_every_arm() -> None:
    a, moved = Version("a", "x@a", "http://old"), Version("a", "x@a", "http://new")
    route = Route(Version("b", "x@b"), a, 0.5, a).at(moved)
    assert route.canary and route.previous and {route.canary.url, route.previous.url} == {"http://new"}
    assert not route.live.url and a == moved


@given(st.integers(1, 40))
def test_what_fails_again_and_again_is_tried_more_and_more_rarely_and_never_not(times: int) -> None:
    failures, now = Failures(), 0.0
    for n in range(times):
        failures.note("x", "why", now)
        pause = min(AGAIN_S * 2**n, AGAIN_AT_MOST_S)
        assert not failures.due(now + pause - 0.01) and failures.due(now + pause) == ["x"]
        now += pause
    failures.clear("x")
    assert "x" not in failures and not failures.due(1e9)
