"""Versions asked beside the users, in this process: after the user's answer, only where there is room."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.inside import Users, adapter, users_of
from helpers.paced import Paced, paced

from peftopt.corpus import Row
from peftopt.errors import INCONCLUSIVE, REJECTED
from peftopt.gateway import trials
from peftopt.gateway.admission import Ticket
from peftopt.gateway.asking import Asker, Full
from peftopt.gateway.lines import Line
from peftopt.gateway.said import Vocabulary
from peftopt.gateway.trial import Terms

ASK = "/v1/chat/completions"
EVERY = Terms(shadow=1.0)
BODY = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}


@pytest.fixture
def engine() -> Iterator[Paced]:
    with paced() as engine:
        yield engine


@asynccontextmanager
async def tried(engine: Paced, where: Path, running: int = 0, terms: Terms = EVERY) -> AsyncIterator[Users]:
    """Users of a gateway with a version on trial that answers none of them."""
    async with users_of(engine, where, running=running) as users:
        lives = users.shared.lives
        lives.trials.asker = Asker(users.shared, Vocabulary())
        await lives.put("support", adapter(where / "a", 1))
        await lives.put("support", adapter(where / "b", 2), terms=terms)
        yield users
        lives.trials.end("support", "the test is over")


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


def asked(engine: Paced) -> list[str]:
    """Whom the gateway has asked beside the users."""
    return [body["model"] for body in engine.seen if body.get("return_token_ids")]


def answered() -> Line:
    """The line of a user whom the live version has answered."""
    return Line("r", arrived=0.0, at=0.0, adapter="support", arm="live", version="a", status=200, done=1.0)


def counted(users: Users, what: str) -> float:
    return users.shared.metrics.shadow.labels("support", what)._value.get()


def test_both_are_asked_once_the_user_has_an_answer_and_not_before(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with tried(engine, tmp_path) as users:
            waits = asyncio.ensure_future(users.ask("support", messages=[{"role": "user", "content": "hold"}]))
            await until(lambda: engine.running == 1)
            await users.ask("base")
            assert not asked(engine), "one has no answer yet, the other's route has no trial"
            await users.ask("support", temperature=0)
            await until(lambda: counted(users, "asked") == 1)
            live, new = users.shared.lives.registry.table.routes["support"].versions()[:2]
            assert sorted(asked(engine)) == sorted([live.served, live.served, new.served])
            trial = users.shared.lives.registry.trials["support"]
            assert trial.shadow.critical.n == trial.shadow.changed.n == 1
            assert trial.shadow.apart[0][0] > trial.shadow.apart[0][1] == 0, "log-probabilities tell them apart"
            assert len(users.lines()) == 2, "a shadow has no line in the users' log"
            waits.cancel()

    asyncio.run(main())


def test_where_there_is_no_room_nobody_is_asked_and_it_is_counted(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with tried(engine, tmp_path, running=2) as users:
            admission, others = users.shared.admission, [Ticket("base") for _ in range(2)]
            asker = Asker(users.shared, Vocabulary())
            admission.arrive(others[0], 0.0)
            assert asker.free
            admission.arrive(others[1], 0.0)
            assert not asker.free
            with pytest.raises(Full):
                await asker.ask(ASK, BODY, "base")
            assert admission.running == 2 and not admission.waiting
            users.shared.lives.heard(answered(), "user", ASK, BODY)
            assert counted(users, "dropped") == 1 and not asked(engine)

    asyncio.run(main())


def test_more_than_a_few_at_once_are_dropped(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with tried(engine, tmp_path) as users:
            for _ in range(trials.AT_ONCE + 3):
                users.shared.lives.heard(answered(), "user", ASK, BODY)
            assert counted(users, "dropped") == 3
            await until(lambda: counted(users, "asked") == trials.AT_ONCE)
            assert not users.shared.admission.running

    asyncio.run(main())


def test_an_engine_that_takes_no_more_fields_is_asked_without_them(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with users_of(engine, tmp_path) as users:
            asker, lenient = Asker(users.shared, Vocabulary()), engine.generate

            async def strict(body: dict, writer: asyncio.StreamWriter) -> None:
                if body.get("return_token_ids"):
                    engine.whole(writer, 400, {"error": {"message": "unknown field"}})
                else:
                    await lenient(body, writer)

            engine.generate = strict  # type: ignore[method-assign]
            said = await asker.ask(ASK, BODY, "base")
            assert said.text and not said.ids and asker.plain

    asyncio.run(main())


def test_a_version_that_no_longer_answers_as_itself_is_rolled_back_at_once(
    engine: Paced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "ITSELF_EVERY_S", 0.0)
    monkeypatch.setattr(trials, "ITSELF_SHARE", math.inf)

    async def main() -> None:
        async with tried(engine, tmp_path, terms=EVERY) as users:
            lives = users.shared.lives
            await lives.trials.judge()
            assert "support" in lives.trials, "both answer as themselves"
            live, new = lives.registry.table.routes["support"].versions()[:2]
            engine.folders[new.served] = engine.folders[live.served]  # the engine takes one for the other
            await lives.trials.judge()
            ended = lives.registry.ended["support"]
            assert ended.exit_code == REJECTED and "canary.wrong_adapter" in ended.said
            assert lives.registry.table.routes["support"].canary is None

    asyncio.run(main())


def test_who_asks_while_the_verdict_is_being_done_is_told_to_wait(
    engine: Paced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All workers have to follow the change of the route before the verdict is told, and one may be busy."""

    async def main() -> None:
        async with tried(engine, tmp_path) as users:
            lives, gate = users.shared.lives, asyncio.Event()
            (trial,), change = lives.registry.trials.values(), lives.change
            trial.wrong = "an answer was another's"

            async def slowly(*changed: Any) -> None:
                await gate.wait()
                await change(*changed)

            monkeypatch.setattr(lives, "change", slowly)
            judging = asyncio.ensure_future(lives.trials.judge())
            await until(lambda: not lives.registry.trials)
            told = lives.trials.report("support")
            assert "support" in lives.trials and lives.trials.replaced("support", trial.version.split("@")[1]) is None
            assert told and told.exit_code == INCONCLUSIVE and "canary.wrong_adapter" in told.said
            gate.set()
            await judging
            told = lives.trials.report("support")
            assert "support" not in lives.trials and told and told.exit_code == REJECTED

    asyncio.run(main())


def test_a_gateway_that_ends_lets_go_of_what_it_asks_and_the_trial_goes_on(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with users_of(engine, tmp_path) as users:
            lives = users.shared.lives
            lives.trials.asker = Asker(users.shared, Vocabulary())
            await lives.put("support", adapter(tmp_path / "a", 1))
            rows = [Row("p", ({"role": "user", "content": "hold"},), "x")]
            await lives.put("support", adapter(tmp_path / "b", 2), terms=Terms(), rows=rows)
            await until(lambda: users.shared.admission.running)
            lives.trials.close()
            await until(lambda: not users.shared.admission.running)
        again = json.loads((tmp_path / "state" / "registry.json").read_text())
        assert again["trials"]["support"]["prompts"] == 1

    asyncio.run(main())


def test_who_waits_for_a_version_is_not_told_what_came_of_another(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with tried(engine, tmp_path) as users:
            lives = users.shared.lives
            first = lives.registry.table.routes["support"].canary
            assert first and lives.trials.replaced("support", first.id) is None
            await lives.put("support", adapter(tmp_path / "c", 3), terms=EVERY)
            ended = lives.trials.replaced("support", first.id)
            assert ended and ended.exit_code == INCONCLUSIVE and "support" in lives.trials

    asyncio.run(main())


def test_prompts_wait_for_room_and_are_asked_when_there_is_some(engine: Paced, tmp_path: Path) -> None:
    async def main() -> None:
        async with users_of(engine, tmp_path, running=1) as users:
            lives, user = users.shared.lives, Ticket("base")
            lives.trials.asker = Asker(users.shared, Vocabulary())
            await lives.put("support", adapter(tmp_path / "a", 1))
            users.shared.admission.arrive(user, 0.0)
            rows = [Row(f"p{n}", ({"role": "user", "content": f"prompt {n}"},), "x") for n in range(2)]
            await lives.put("support", adapter(tmp_path / "b", 2), terms=Terms(), rows=rows)
            await lives.trials.judge()
            assert not asked(engine) and "support" in lives.trials
            users.shared.let_in(users.shared.admission.leave(user, 0, 1.0))
            await until(lambda: len(asked(engine)) == 6)
            lives.trials.end("support", "the test is over")

    asyncio.run(main())


def test_windows_that_a_request_closes_are_judged_at_the_next_look(
    engine: Paced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load it is a request, and seldom a look at the trial, that comes first in a new window."""

    async def main() -> None:
        async with users_of(engine, tmp_path) as users:
            lives, now = users.shared.lives, 0.0
            await lives.put("support", adapter(tmp_path / "a", 1))
            await lives.put("support", adapter(tmp_path / "b", 2), 0.5, Terms(window_s=1.0, least=1))
            monkeypatch.setattr(lives.trials, "_passed", lambda _: now)
            await lives.trials.judge()
            assert "support" in lives.trials
            for window in range(40):
                now = window + 0.5
                lives.trials.heard(answered(), "user")
                lives.trials.heard(replace(answered(), arm="canary", done=9.0), "user")
            await lives.trials.judge()
            ended = lives.registry.ended["support"]
            assert ended.exit_code == REJECTED and "canary.latency" in ended.said

    asyncio.run(main())
