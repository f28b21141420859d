"""Versions that stop answering as themselves while they are served: asked beside the users, told, and in the log."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
import pytest
from helpers.command_line import command, errors
from helpers.gateway_parts import Gateway, gateway_of
from helpers.gateways import BIG_S, HTTP, changed, serving
from helpers.gateways import Gateway as Served
from helpers.inside import PROMPTS
from helpers.inside import adapter as adapter_of
from helpers.paced import Paced, paced
from helpers.waiting import wait_until
from hypothesis import given
from hypothesis import strategies as st

from peftopt.canary.fingerprint import Wrong
from peftopt.canary.mixed import Round
from peftopt.cli.shared import seconds
from peftopt.errors import REJECTED
from peftopt.gateway import itself, standing
from peftopt.gateway.admission import Ticket
from peftopt.gateway.asking import Asker
from peftopt.gateway.fingerprints import EARLIER
from peftopt.gateway.itself import Check
from peftopt.gateway.limits import Limits
from peftopt.gateway.lines import Line
from peftopt.gateway.rechecks import Rechecks
from peftopt.gateway.said import Vocabulary
from peftopt.loadtest import importers
from peftopt.loadtest.arrivals import trace

# ---- what answers say ----------------------------------------------------------------------------

LIKES = st.sampled_from(["a@old", "a@older", "b@other", "base", ""])


@given(st.lists(st.none() | LIKES, max_size=8), st.integers(0, 3))
def test_a_version_is_its_own_only_where_every_answer_is(likes: list[str | None], failed: int) -> None:
    """None stands for an answer of its own, any other for whose it is."""
    wrong = [Wrong("a@new", "p", like, 1.0, 0.1) for like in likes if like is not None]
    seen = Round(["a@new"] * len(likes), wrong, [("a@new", "HTTP 500")] * failed, {"a@new": 3.0} if likes else {})
    said = itself.judged("a@new", seen)
    assert sum(said.answers.values()) == len(likes) + failed
    if said.verdict == "own":
        assert likes and not wrong and not failed
    elif said.verdict == "stale":
        assert wrong and all(each.like.startswith("a@") for each in wrong)
    elif said.verdict == "wrong":
        assert any(not each.like.startswith("a@") for each in wrong)
    else:
        assert not wrong and (failed or not likes) and said.distance is None
    assert bool(said.why) == (said.verdict != "own")


def test_of_a_round_only_its_own_answers_count() -> None:
    seen = Round(["a@1", "b@1", "b@1"], [Wrong("b@1", "p", "", 1.0, 0.1)], [], {"a@1": 0.5, "b@1": 9.0})
    assert itself.judged("a@1", seen) == itself.Itself("own", 0.5, "", {"own": 1, "unclear": 0})
    assert itself.judged("b@1", seen).verdict == "wrong"


def test_checks_in_a_log_are_no_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither `import` nor `load --trace` takes one for such."""
    check = json.dumps(Check("support", "aa11", "live", "stale", 1.8e9, 7.5, "why").as_json())
    line = Line("r", 0.0, 1.8e9 + 1, adapter="support", version="aa11", arm="live", status=200)
    line.sent, line.done, line.prompt_tokens, line.new_tokens = 0.0, 0.5, 5, 3
    log = tmp_path / "requests.jsonl"
    log.write_text("\n".join([check, json.dumps(line.as_json()), check]) + "\n")
    (request,) = trace(log.read_text().splitlines())
    assert (request.at, request.prompt_tokens) == (0.0, 5)
    (run,) = importers.read(log)
    assert len(run.requests) == 1
    log.write_text(f"{check}\n{check}\n")
    assert command("import", log) == 2
    assert "Traceback" not in capsys.readouterr().err


# ---- beside the users, before a paced engine -----------------------------------------------------


@pytest.fixture
def engine() -> Iterator[Paced]:
    with paced() as engine:
        yield engine


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Adapters of other weights each."""
    return [adapter_of(tmp_path / f"adapter-{scale}", scale) for scale in range(1, EARLIER + 4)]


@dataclass
class Checked:
    """A gateway with one adapter, `support`, and its checks as they were noted."""

    gateway: Gateway
    rechecks: Rechecks
    checks: list[Check] = field(default_factory=list)

    @property
    def live(self) -> str:
        return self.gateway.lives.table.routes["support"].live.served

    def verdicts(self, adapter: str = "support") -> list[str]:
        return [check.verdict for check in self.checks if check.adapter == adapter]

    def counted(self, verdict: str) -> float:
        version = self.live.partition("@")[2]
        return self.gateway.lives.metrics.canary.labels("support", version, verdict)._value.get()

    def events(self) -> list[str]:
        file = self.gateway.lives.registry.root / "events.jsonl"
        return [line for line in file.read_text().splitlines() if "as itself" in line]


@asynccontextmanager
async def checked(engine: Paced, where: Path, *put: Path, refuse: bool = False) -> AsyncIterator[Checked]:
    async with gateway_of(engine, where) as gateway:
        for folder in put:
            await gateway.lives.put("support", folder)
        rechecks = Rechecks(gateway.lives, Asker(gateway.shared, Vocabulary()), refuse)
        found = Checked(gateway, rechecks)
        gateway.lives.loader.write = found.checks.append
        yield found


def test_a_healthy_version_is_its_own_and_near_itself(engine: Paced, folders: list[Path], tmp_path: Path) -> None:
    async def main() -> None:
        async with checked(engine, tmp_path, folders[0]) as found:
            before = found.counted("own")
            await found.rechecks.round()
            assert found.verdicts() == ["own"] and found.verdicts("base") == ["own"]
            assert all(check.arm == "live" and check.distance == 0.0 for check in found.checks)
            assert found.counted("own") == before + len(PROMPTS)
            told = await found.gateway.told()
            assert told["ready"] and not told["doubted"] and not found.events()

    asyncio.run(main())


def test_weights_that_were_exchanged_are_told_of_and_answer_on(
    engine: Paced, folders: list[Path], tmp_path: Path
) -> None:
    """Until they are right again, which is told too."""

    async def main() -> None:
        async with checked(engine, tmp_path, folders[0]) as found:
            right = engine.folders[found.live]
            engine.folders[found.live] = "weights that nobody knows"
            await found.rechecks.round()
            assert found.verdicts() == ["wrong", "wrong"] and found.verdicts("base") == ["own"]
            assert found.counted("wrong") == 2 * len(PROMPTS)
            told = await found.gateway.told()
            assert told["ready"] and told["doubted"].keys() == {found.live} and not told["failed"]
            assert (await found.gateway.answer("support"))[0] == 200
            listed = next(row for row in standing.rows(found.gateway.lives) if row["name"] == "support")
            assert listed["doubted"] and not listed["failed"]
            assert b'state="doubted"' in found.gateway.lives.metrics.text()
            await found.rechecks.round()
            assert len(found.events()) == 1, "what is known is not told again"
            engine.folders[found.live] = right
            await found.rechecks.round()
            assert not (await found.gateway.told())["doubted"] and len(found.events()) == 2

    asyncio.run(main())


@pytest.mark.parametrize("gone", [False, True])
def test_an_earlier_versions_weights_are_stale_ones(
    engine: Paced, folders: list[Path], tmp_path: Path, gone: bool
) -> None:
    """Also where the earlier version is unloaded: its answers are remembered."""

    async def main() -> None:
        async with checked(engine, tmp_path, *folders[:2]) as found:
            before = found.gateway.lives.table.routes["support"].previous
            assert before
            stale = engine.folders[before.served]
            if gone:
                found.gateway.lives.settings.keep_s = 0.0
                await found.gateway.lives.retire()
                assert before.served not in engine.folders
            engine.folders[found.live] = stale
            await found.rechecks.round()
            assert found.verdicts() == ["stale", "stale"] and before.served in found.checks[-1].why
            assert all(check.distance and check.distance > 2 for check in found.checks if check.adapter == "support")

    asyncio.run(main())


def test_only_a_few_earlier_versions_are_remembered(engine: Paced, folders: list[Path], tmp_path: Path) -> None:
    async def main() -> None:
        async with checked(engine, tmp_path) as found:
            lives = found.gateway.lives
            lives.settings.keep_s = 0.0
            weights = {}
            for folder in folders:
                await lives.put("support", folder)
                weights[found.live] = engine.folders[found.live]
                await lives.retire()
            first, *_, before, _ = weights
            for name, remembered in ((first, False), (before, True)):
                engine.folders[found.live] = weights[name]
                await found.rechecks.round()
                assert (name in found.checks[-1].why) == remembered

    asyncio.run(main())


def test_a_version_that_was_rejected_names_no_answer(
    engine: Paced, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answered as the base did, so nothing that answers as the base is an earlier version of it."""

    async def rejected(*_: object) -> list[str]:
        return ["it answers as another"]

    async def main() -> None:
        async with checked(engine, tmp_path, folders[0]) as found:
            engine.twisted = "base"
            with monkeypatch.context() as patched:
                patched.setattr(found.gateway.lives, "wrong", rejected)
                assert (await found.gateway.lives.put("support", folders[1])).exit_code == REJECTED
            engine.folders[found.live] = "base"
            await found.rechecks.round()
            assert found.verdicts()[-1] == "wrong" and "base" in found.checks[-1].why

    asyncio.run(main())


def test_once_may_be_chance(engine: Paced, folders: list[Path], tmp_path: Path) -> None:
    """The line says it, and nothing else comes of it."""

    async def main() -> None:
        async with checked(engine, tmp_path, folders[0]) as found:
            right = engine.folders[found.live]
            engine.folders[found.live] = "something else"

            def noted(check: Check) -> None:
                found.checks.append(check)
                engine.folders[found.live] = right

            found.gateway.lives.loader.write = noted
            await found.rechecks.check(found.live)
            assert found.verdicts() == ["wrong", "own"] and found.counted("wrong") == len(PROMPTS)
            assert not (await found.gateway.told())["doubted"] and not found.events()

    asyncio.run(main())


def test_where_it_is_asked_for_the_version_answers_nobody_until_it_is_itself(
    engine: Paced, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftopt.gateway.failures.AGAIN_S", 0.0)

    async def main() -> None:
        async with checked(engine, tmp_path, folders[0], refuse=True) as found:
            lives, right = found.gateway.lives, engine.folders[found.live]
            engine.folders[found.live] = "something else"
            await found.rechecks.round()
            assert (await found.gateway.answer("support"))[0] == 503
            assert (await found.gateway.answer("base"))[0] == 200
            told = await found.gateway.told()
            assert told["ready"] and told["failed"].keys() == {found.live}
            engine.folders[found.live] = right
            assert await lives.upkeep.mend() == [found.live]
            assert (await found.gateway.answer("support"))[0] == 200

    asyncio.run(main())


def test_what_the_engine_brought_is_only_told_of(engine: Paced, tmp_path: Path) -> None:
    """Nobody could load it again."""

    async def main() -> None:
        async with checked(engine, tmp_path, refuse=True) as found:
            engine.folders["base"] = "another base"
            await found.rechecks.round()
            told = await found.gateway.told()
            assert told["doubted"].keys() == {"base"} and not told["failed"]
            assert (await found.gateway.answer("base"))[0] == 200

    asyncio.run(main())


def test_put_again_it_must_answer_as_itself(engine: Paced, folders: list[Path], tmp_path: Path) -> None:
    async def main() -> None:
        async with checked(engine, tmp_path, folders[0]) as found:
            right = engine.folders[found.live]
            engine.folders[found.live] = "something else"
            await found.rechecks.round()
            assert (await found.gateway.lives.put("support", folders[0])).exit_code != 0
            engine.folders[found.live] = right
            assert (await found.gateway.lives.put("support", folders[0])).exit_code == 0
            assert not (await found.gateway.told())["doubted"]

    asyncio.run(main())


def test_users_go_first(engine: Paced, folders: list[Path], tmp_path: Path) -> None:
    """Nothing is asked while the limit is reached, nor while any user waits; then one prompt at a time."""

    async def main() -> None:
        async with checked(engine, tmp_path, folders[0]) as found:
            admission, users = found.gateway.shared.admission, [Ticket("base"), Ticket("base")]
            admission.limits = Limits(running=1, waiting=1)
            for user in users:
                admission.arrive(user, 0.0)
            before, engine.most = len(engine.seen), 0
            asking = asyncio.ensure_future(found.rechecks.round())
            await asyncio.sleep(0)
            await found.gateway.told()
            found.gateway.shared.let_in(admission.leave(users[0], 0, 1.0))
            assert admission.running == 1 and not asking.done() and len(engine.seen) == before
            found.gateway.shared.let_in(admission.leave(users[1], 0, 2.0))
            await asking
            assert len(engine.seen) == before + 2 * len(PROMPTS) and engine.most == 1
            assert not admission.running and not +found.gateway.lives.in_flight

    asyncio.run(main())


def test_a_version_that_is_removed_meanwhile_says_nothing(
    engine: Paced, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with checked(engine, tmp_path, folders[0]) as found:
            lives, name = found.gateway.lives, found.live
            user, asked = Ticket("base"), found.rechecks.asker.room
            waits = asyncio.Event()

            async def room() -> None:
                waits.set()
                await asked()

            monkeypatch.setattr(found.rechecks.asker, "room", room)
            found.gateway.shared.admission.limits = Limits(running=1, waiting=1)
            found.gateway.shared.admission.arrive(user, 0.0)
            asking = asyncio.ensure_future(found.rechecks.check(name))
            await waits.wait()
            await lives.remove("support")
            found.gateway.shared.let_in(found.gateway.shared.admission.leave(user, 0, 1.0))
            await asking
            assert not found.checks and not lives.doubts

    asyncio.run(main())


def test_an_engine_that_tells_nothing_leaves_it_unclear(engine: Paced, folders: list[Path], tmp_path: Path) -> None:
    engine.mute = True

    async def main() -> None:
        async with checked(engine, tmp_path) as found:
            await found.gateway.lives.put("support", folders[0], certify=False)
            found.checks.clear()
            await found.rechecks.round()
            assert found.verdicts() == ["unclear"] and found.checks[-1].distance is None
            assert not (await found.gateway.told())["doubted"]

    asyncio.run(main())


def test_an_engine_that_does_not_answer_leaves_it_unclear(engine: Paced, folders: list[Path], tmp_path: Path) -> None:
    async def main() -> None:
        async with checked(engine, tmp_path, folders[0]) as found:
            engine.mute = True
            engine.says, engine.status = {"error": "no"}, 500
            await found.rechecks.round()
            assert set(found.verdicts()) == {"unclear"}

    asyncio.run(main())


# ---- the whole gateway ---------------------------------------------------------------------------


def engine_of(gateway: Served) -> str:
    """Where the engine of a gateway is asked: what the gateway itself is connected to."""
    users = int(gateway.url.rpartition(":")[2])

    def asked() -> set[int]:
        connections = psutil.Process(gateway.process.pid).net_connections("tcp")
        return {one.raddr.port for one in connections if one.raddr and one.laddr.port != users}

    wait_until(lambda: len(asked()) == 1)
    return f"http://127.0.0.1:{asked().pop()}"


KEY = "the-key-of-the-engine"
"""By which the engine knows its gateway."""


def test_weights_exchanged_at_a_real_engine_are_found_out_and_in_the_log(
    tiny_base: Path,
    tiny_lora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The adapter is taken away behind the gateway's back, and another is loaded under its name."""
    monkeypatch.setenv("PEFTOPT_ENGINE_KEY", KEY)
    other = changed(tiny_lora, tmp_path / "other", 3.0)
    options = ("--base", tiny_base, "--adapter", f"support={tiny_lora}", "--engine", "eager", "--threads", 1)
    with serving(tmp_path, *options, "--check-every", "50ms") as gateway:

        def verdicts() -> list[str]:
            return [line["verdict"] for line in gateway.checks() if line["adapter"] == "support"]

        wait_until(lambda: len(verdicts()) > 2)
        assert set(verdicts()) == {"own"}
        assert all(line["distance"] < 2 for line in gateway.checks())
        version = gateway.checks()[-1]["version"] or gateway.checks()[-2]["version"]
        own = {"Authorization": f"Bearer {KEY}"}
        with httpx2.Client(base_url=engine_of(gateway), timeout=BIG_S, headers=own) as http:
            name = {"lora_name": f"support@{version}"}
            http.post("/v1/unload_lora_adapter", json=name).raise_for_status()
            http.post("/v1/load_lora_adapter", json={**name, "lora_path": str(other)}).raise_for_status()

        def told() -> dict[str, str]:
            return HTTP.get(f"{gateway.url}/health/ready", timeout=BIG_S).json()["doubted"]

        wait_until(lambda: bool(told()))
        assert told().keys() == {f"support@{version}"} and verdicts()[-1] == "wrong"
        line = next(line for line in gateway.checks() if line["verdict"] == "wrong")
        assert line["distance"] > 2 and line["version"] == version and line["arm"] == "live"
        assert gateway.metric(r'peftopt_canary_answers_total\{.*verdict="wrong".*\}') > 0
        assert gateway.ask("hi", "support", max_tokens=2).status_code == 200
        assert "does not answer as itself" in (tmp_path / "said.txt").read_text()
        assert "itself" in gateway.operate("list")[1]
    out = tmp_path / "measurements.jsonl"
    assert command("import", gateway.log, "--out", out) == 0, "the log is read as before, without its checks"
    capsys.readouterr()


def test_with_several_workers_the_supervisor_asks(engine: Paced, tiny_lora: Path, tmp_path: Path) -> None:
    one = changed(tiny_lora, tmp_path / "one", 1.0)
    options = ("--workers", 2, "--adapters-from", tmp_path, "--check-every", "50ms")
    with serving(tmp_path, "--upstream", engine.url, *options) as gateway:
        assert gateway.operate("put", f"support={one}")[0] == 0
        name = next(name for name in engine.folders)
        engine.folders[name] = "something else"
        wait_until(lambda: any(line["verdict"] == "wrong" for line in gateway.checks()))

        def told() -> dict[str, str]:
            return HTTP.get(f"{gateway.url}/health/ready", timeout=BIG_S).json()["doubted"]

        wait_until(lambda: told().keys() == {name})
        assert gateway.ask("hi", "support").status_code == 200
        wait_until(lambda: len(gateway.lines()) == 1)


@pytest.mark.parametrize("option", [("--check-every", "soon"), ("--check-then", "hope")])
def test_checks_that_cannot_be_are_said(
    option: tuple[str, str], engine: Paced, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("serve", "--upstream", engine.url, "--state", tmp_path / "state", *option) == 2
    assert option[1] in errors(capsys)


@given(st.floats(0, 1e6).map(lambda x: round(x, 3)), st.sampled_from([("s", 1.0), ("m", 60.0), ("h", 3600.0)]))
def test_a_length_of_time_is_read_in_its_unit(number: float, unit: tuple[str, float]) -> None:
    assert math.isclose(seconds(f"{number}{unit[0]}"), number * unit[1])
