"""Asks a cell once: sends its requests, and records the time of every token."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from peftopt import stats
from peftopt.corpus import Row
from peftopt.diagnose.measuring.cells import BATCH, Load
from peftopt.errors import WorkerFailed
from peftopt.loadtest import arrivals
from peftopt.loadtest.client import Client, Reply
from peftopt.loadtest.protocols import Prompt

SHARED = 7_919
"""The seed of the tokens that prompts have in common."""

MOST = 64
"""Requests of a load, and cells of a block, at most: they number the prompts."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The times of a cell's requests. `ttft_ms` and `tpot_ms` of each answered request, in the order of the load;
    `tpot_ms` is the median gap between tokens, in time per token; `longest_gap_ms` the longest; `latency_ms` the whole
    request. `whole_ms`: from sending the first to the end of the last. `failed`: why others were not answered."""

    names: tuple[str, ...]
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    longest_gap_ms: tuple[float, ...]
    latency_ms: tuple[float, ...]
    whole_ms: float
    new_tokens: int
    prompt_tokens: int
    failed: tuple[str, ...] = ()

    def value(self, phase: str) -> float | None:
        """The time that is compared, in ms: for "prefill" the median TTFT, for "decode" the median TPOT, else the
        whole. None if a request failed, or if no token's time is known."""
        if self.failed:
            return None
        times = {"prefill": self.ttft_ms, "decode": self.tpot_ms}.get(phase, (self.whole_ms,))
        value = stats.median(times) if times else 0.0
        return value or None


class Asker:
    """Asks one server. `served`: the server's names for the names of loads. Prompts are those of `rows`, or made up:
    then no two requests of a diagnosis have the same prompt, and no prefix cache can help."""

    def __init__(self, client: Client, served: Mapping[str, str], rows: Sequence[Row] = ()) -> None:
        self._client, self._served, self._rows = client, served, rows

    async def warm(self, name: str) -> None:
        """Ask a name once, so that no measured request is a server's first, and the fields that it refuses are known.
        Raises WorkerFailed if it does not answer."""
        load = Load((name,), 8, (2,))
        reply = await self._client.ask(self._prompt(load, 0, 0), self._served.get(name, name), 2, stop=False)
        if reply.error:
            raise WorkerFailed("request failed", f"{name}: {reply.error}", "the server's log is in the folder's logs")

    async def ask(self, load: Load, block: int, cell: int = 0) -> Turn:
        """Send the load and follow every answer to its end."""
        asked = zip(load.names, load.answers, range(len(load.names)), strict=True)
        bodies = [
            self._client.encoded(
                self._prompt(load, block * MOST + number, cell), self._served.get(name, name), tokens, stop=False
            )
            for name, tokens, number in asked
        ]
        started = time.perf_counter_ns()
        replies = await _sent(load, [_sending(self._client, body) for body in bodies])
        return turn(load, replies, started)

    def _prompt(self, load: Load, number: int, cell: int) -> Prompt:
        """A request's prompt. Cells of a block get the same of a file's rows, or as many made-up words each its own."""
        if self._rows:
            return Prompt(messages=self._rows[number % len(self._rows)].messages)
        own = arrivals.made_up(load.prompt_tokens, number * MOST + cell)
        if load.shared_tokens:
            own = f"{arrivals.made_up(load.shared_tokens, SHARED)} {own}"
        return Prompt(({"role": "user", "content": own},), own)


Send = Callable[[], Awaitable[Reply]]


def _sending(client: Client, body: bytes) -> Send:
    return lambda: client.send(body)


async def _sent(load: Load, sends: Sequence[Send]) -> list[Reply]:
    """The replies, in the load's order, sent as it says."""
    if load.order == "one by one":
        return [await send() for send in sends]
    if load.order == "together":
        return list(await asyncio.gather(*(send() for send in sends)))
    if load.order == "waves":
        waves = [sends[start : start + BATCH] for start in range(0, len(sends), BATCH)]
        return [reply for wave in waves for reply in await asyncio.gather(*(send() for send in wave))]
    room = asyncio.Semaphore(BATCH)

    async def joining(send: Send) -> Reply:
        async with room:
            return await send()

    return list(await asyncio.gather(*(joining(send) for send in sends)))


def turn(load: Load, replies: Sequence[Reply], started: int) -> Turn:
    """The times of replies; `started` in perf_counter_ns."""
    answered = [reply for reply in replies if not reply.error]
    return Turn(
        names=load.names,
        ttft_ms=tuple((reply.times[0] - reply.sent) / 1e6 for reply in answered if reply.times),
        tpot_ms=tuple(gap for reply in answered if (gap := _gap_ms(reply)) is not None),
        longest_gap_ms=tuple(max(gaps_ms(reply), default=0.0) for reply in answered),
        latency_ms=tuple((reply.done - reply.sent) / 1e6 for reply in answered),
        whole_ms=(max((reply.done for reply in replies), default=started) - started) / 1e6,
        new_tokens=sum(reply.new_tokens for reply in answered),
        prompt_tokens=sum(reply.prompt_tokens or 0 for reply in answered),
        failed=tuple(reply.error for reply in replies if reply.error),
    )


def unanswered(load: Load, error: str) -> Turn:
    """The turn of a load that could not be sent."""
    return turn(load, [Reply(sent=0, error=error)], 0)


def gaps_ms(reply: Reply) -> list[float]:
    """Between messages."""
    return [(after - before) / 1e6 for before, after in itertools.pairwise(reply.times)]


def _gap_ms(reply: Reply) -> float | None:
    """The median gap between messages, as time per token: a pause of the machine hardly moves it. The mean, where
    messages came together."""
    gaps = gaps_ms(reply)
    if not gaps or reply.new_tokens < 2:
        return None
    gap = stats.median(gaps) if min(gaps) > 0 else sum(gaps) / len(gaps)
    return gap * len(gaps) / (reply.new_tokens - 1)
