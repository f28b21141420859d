"""Asks versions beside the users: only while the gateway has room to spare, and only a few requests at once.

Such a request takes a place of the admission like any other, but it never waits in a queue: users go first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftopt.canary.mixed import TOP
from peftopt.gateway.admission import Ticket
from peftopt.gateway.lines import Line
from peftopt.gateway.said import Said, Vocabulary, read
from peftopt.gateway.upstream import Fault
from peftopt.records import Json

if TYPE_CHECKING:
    from peftopt.gateway.shared import Shared

CHAT = "/v1/chat/completions"
BESIDE = "\0beside"
"""What these requests are called in the waiting room: no adapter and no key has such a name."""
LOOK_AGAIN_S = 0.05


def drawn(line: Line, share: float) -> bool:
    """Whether a user's request is sampled, so that both versions get it again: the live version must have answered
    it."""
    return line.arm == "live" and not line.kind and random.random() < share


class Full(Exception):
    """There is no room beside the users."""


@dataclass
class Place:
    """A place at the engine, and the number of `tokens` taken there; 0 if not known."""

    tokens: int = 0


class Asker:
    """Asks the engine while there is room. `busy`: requests that run or wait; `waiting`: those that wait. Both count
    all processes that answer users; without them, this process."""

    def __init__(
        self,
        shared: Shared,
        vocabulary: Vocabulary,
        busy: Callable[[], int] | None = None,
        waiting: Callable[[], int] | None = None,
    ) -> None:
        self.shared, self.vocabulary = shared, vocabulary
        self._busy = busy or (lambda: shared.admission.running + shared.admission.waiting)
        self._waiting = waiting or (lambda: shared.admission.waiting)
        self.plain = False
        """Whether the engine takes none of the fields that tell more of an answer."""

    @property
    def free(self) -> bool:
        """Whether a request would be admitted at once, while no user waits."""
        most = self.shared.admission.limits.running
        has_room = not self._waiting() and (not most or self._busy() < most)
        return self.shared.open and self.shared.lives.ready and has_room

    async def room(self) -> None:
        """Wait until there is room."""
        while not self.free:
            await asyncio.sleep(LOOK_AGAIN_S)

    async def ask(self, path: str, asked: Mapping[str, Json], served: str) -> Said:
        """A version's whole answer to a request. Raises Full."""
        async with self.place(served) as place:
            said = await self._asked(path, asked, served)
            place.tokens = len(said.tokens)
            return said

    @contextlib.asynccontextmanager
    async def place(self, served: str) -> AsyncIterator[Place]:
        """A place among the users' requests for one to a version. Raises Full."""
        if not self.free:
            raise Full
        shared, ticket, place = self.shared, Ticket(BESIDE, BESIDE), Place()
        shared.let_in(shared.admission.arrive(ticket, time.perf_counter()))
        if ticket.refused or ticket.waits:
            shared.let_in(shared.admission.leave(ticket, 0, time.perf_counter()))
            raise Full
        shared.lives.in_flight[served] += 1
        try:
            yield place
        finally:
            shared.lives.in_flight[served] -= 1
            shared.let_in(shared.admission.leave(ticket, place.tokens, time.perf_counter()))

    async def _asked(self, path: str, asked: Mapping[str, Json], served: str) -> Said:
        body = {name: value for name, value in asked.items() if name not in ("stream", "stream_options", "n")}
        said = await self._sent(path, {**body, **({} if self.plain else _telling(path, asked)), "model": served})
        if said.error in ("HTTP 400", "HTTP 422") and not self.plain:
            without = await self._sent(path, {**body, "model": served})
            self.plain = not without.error
            return without
        return said

    async def _sent(self, path: str, body: Mapping[str, Json]) -> Said:
        upstream, began = self.shared.upstream, time.perf_counter()
        version = self.shared.table.version(str(body["model"]))
        if version and version.url:  # an engine of its own
            upstream = upstream.at(version.url)
        try:
            async with asyncio.timeout(upstream.timeouts.whole or None):
                async with upstream.ask(path, json.dumps(body).encode(), {}) as answer:
                    whole = await answer.whole()
                    ms = 1e3 * (time.perf_counter() - began)
                    return read(answer.status, whole, ms, self.vocabulary.end)
        except (Fault, TimeoutError) as error:
            return Said(1e3 * (time.perf_counter() - began), error=str(error) or "timeout")


def _telling(path: str, asked: Mapping[str, Json]) -> dict[str, Json]:
    """Fields that change no answer and tell more of it: token ids, and a chat's log-probabilities."""
    more: dict[str, Json] = {"return_token_ids": True}
    if path == CHAT and not asked.get("logprobs"):
        more |= {"logprobs": True, "top_logprobs": TOP}
    return more


def labelled_body(messages: Sequence[Mapping[str, str]], new_tokens: int) -> dict[str, Json]:
    """A greedy request of a labelled prompt."""
    return {"messages": [dict(message) for message in messages], "max_tokens": new_tokens, "temperature": 0}


def vocabulary_of(base: Path | None) -> Vocabulary:
    """The special tokens of a base, from its tokenizer.json, and those that end an answer; none if that is not
    known."""
    from peftopt.models import template

    file = base / "tokenizer.json" if base else None
    if base is None or file is None or not file.is_file():
        return Vocabulary()
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or []
    end = frozenset(template.ends(base))
    return Vocabulary(frozenset(token["id"] for token in added if token.get("special")) - end, end)
