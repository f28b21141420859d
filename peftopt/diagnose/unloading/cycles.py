"""Loads, uses and unloads adapters on a running server, over and over, and reads its memory at rest after each cycle.

Every cycle is the same, and has all steps that unloads are known to fail at: a request that is answered, a client that
disconnects during its answer, an unload during a request, the same name again with the weights and the rank of another
adapter. Each step has a time limit. A step without an answer in time is a result, and ends the cycles.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit

from peftopt import machine
from peftopt.canary import reloads
from peftopt.diagnose.records import Row
from peftopt.diagnose.unloading import leaks, resting
from peftopt.diagnose.unloading.cycled import Cycled, Step, decided, grows, leaky, rows, so_far
from peftopt.errors import PeftoptError, WorkerFailed
from peftopt.loadtest.client import Client, Reply
from peftopt.loadtest.protocols import Prompt, Target

SHOWN = (1, *leaks.LOOKS)
"""Cycles after which a log says how they go."""

FEWEST = 3
"""Cycles that are gone through even where time is over: an unload that never returns is seen in one."""

NEW_TOKENS, LONG = 4, 16
"""Tokens of an answer that is waited for, and of one that is left or is under way at an unload."""

FAILING = 3
"""So many cycles in a row whose load or unload fails: the server does not work, and more of them would tell nothing."""

PROBE = 12
"""Cycles with one kind of use alone, once a leak was found: which kind is it?"""

Kind = Literal["aborted", "in flight", "same name"]

KINDS: dict[Kind, str] = {
    "aborted": "a client leaves amid its answer",
    "in flight": "an unload while a request is under way",
    "same name": "another adapter under the same name",
}
"""What a cycle does beside a load, a request that is answered, and an unload."""


class Server(Protocol):
    """A running server: its client, and its processes on this machine ((): not known)."""

    @property
    def target(self) -> Target:
        """Its address and form for the client."""

    def processes(self) -> Sequence[int]:
        """Its process ids."""


@dataclass(frozen=True)
class Elsewhere:
    """A server that runs already. On this machine its processes are those that listen at its port, with their
    descendants."""

    target: Target

    def processes(self) -> Sequence[int]:
        """Its process ids; () if they are not visible."""
        address = urlsplit(self.target.url)
        if address.hostname not in ("127.0.0.1", "localhost", "::1"):
            return ()
        return resting.listening(address.port or (443 if address.scheme == "https" else 80))


@dataclass(frozen=True)
class Limits:
    """The longest that a step may take, in seconds."""

    load_s: float = 60.0
    use_s: float = 60.0
    unload_s: float = 30.0


PATIENT = Limits()
"""What is waited for where nothing else is said."""


async def measure(
    server: Server,
    adapters: Sequence[Path],
    prompts: Sequence[Prompt],
    budget_s: float,
    show: Callable[[int, str], None],
    limits: Limits = PATIENT,
) -> tuple[Row, ...]:
    """The rows of the bottleneck "unloading", within about `budget_s` seconds. `show` gets the number of finished
    cycles and their progress. Raises MissingEnvironment if no server answers."""
    until = time.monotonic() + budget_s
    seen = await cycles(server, adapters, prompts, budget_s, show, limits)
    blamed = await blame(server, adapters, prompts, until, show, limits) if leaky(seen) else ()
    return rows(seen, blamed, machine.free_memory())


async def cycles(
    server: Server,
    adapters: Sequence[Path],
    prompts: Sequence[Prompt],
    budget_s: float,
    show: Callable[[int, str], None] = lambda done, what: None,
    limits: Limits = PATIENT,
    kinds: Sequence[Kind] = tuple(KINDS),
    most: int = leaks.LOOKS[-1],
    early: bool = True,
) -> Cycled:
    """Cycle until memory is decided (`early`), a step fails, or time is over; at most `most` cycles. The server must
    see this machine's files. Raises MissingEnvironment if no server answers."""
    until = time.monotonic() + budget_s
    patience_s = 2 * max(limits.load_s, limits.use_s, limits.unload_s)  # the limits here come first
    async with Client(replace(server.target, timeout_s=patience_s)) as client:
        others = [str(model["id"]) for model in await client.models()]
        work = Cycles(client, adapters, prompts, limits, kinds, others)
        await work.begin()
        await work.rest(server)
        while work.cycled.cycles < most and (time.monotonic() < until or work.cycled.cycles < FEWEST):
            went = await work.cycle()
            await work.rest(server)
            show(work.cycled.cycles, so_far(work.cycled))
            if not went or (early and decided(work.cycled)):
                break
        return work.cycled


async def blame(
    server: Server,
    adapters: Sequence[Path],
    prompts: Sequence[Prompt],
    until: float,
    show: Callable[[int, str], None],
    limits: Limits,
) -> tuple[str, ...]:
    """The use that causes a leak: a plain load, request and unload, or else the kinds of use that leak by themselves;
    () if time is over first, or no kind does."""
    candidates: list[tuple[str, tuple[Kind, ...]]] = [("a load, a request and an unload", ())]
    candidates += [(what, (kind,)) for kind, what in KINDS.items()]
    guilty: list[str] = []
    for what, kinds in candidates:
        left_s = until - time.monotonic()
        if left_s <= 0:
            break
        seen = await cycles(server, adapters, prompts, left_s, show, limits, kinds, PROBE, early=False)
        if grows(seen):
            guilty.append(what)
        if guilty and not kinds:
            break
    return tuple(guilty)


class _Late(Exception):
    """A step had no answer within its limit."""


@dataclass
class Cycles:
    """Cycles on one server. `others`: names that it served before, to check whether it still answers. `check` is called
    after each load, with the name and the folder. `present`: the name that may be loaded now."""

    client: Client
    adapters: Sequence[Path]
    prompts: Sequence[Prompt]
    limits: Limits
    kinds: Sequence[Kind]
    others: Sequence[str]
    cycled: Cycled = field(default_factory=Cycled)
    check: Callable[[str, Path], Awaitable[None]] | None = None
    failing: int = 0
    present: str = ""
    started: int = field(default_factory=time.time_ns)

    async def begin(self) -> None:
        """One request to a served name: no cycle should pay for a server's first request."""
        for name in self.others[:1]:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.limits.use_s):
                    await self.client.ask(self.prompts[0], name, NEW_TOKENS)

    async def rest(self, server: Server) -> None:
        """Record the server's memory at rest."""
        await self.client.hang_up()
        held = await resting.at_rest(server.processes)
        if held is not None:
            self.cycled.host.append(held.host)
        if held is not None and held.gpu is not None:
            self.cycled.gpu.append(held.gpu)

    async def cycle(self) -> bool:
        """One cycle; returns whether another one makes sense. Names are new ones, so that memory kept by name grows."""
        number = self.cycled.cycles
        name, prompt = f"peftopt-cycle-{self.started}-{number}", self.prompts[number % len(self.prompts)]
        first, second = (self.adapters[at % len(self.adapters)] for at in (number, number + 1))
        self.cycled.cycles += 1
        try:
            await self._load(name, first)
            await self._ask(name, prompt)
            if "aborted" in self.kinds:
                await self._leave(name, prompt)
            if "in flight" in self.kinds:
                await self._unload_under_way(name, prompt)
            else:
                await self._unload(name)
            if "same name" in self.kinds:
                await self._load(name, second)
                await self._ask(name, prompt)
                await self._unload(name)
            self.failing = 0
        except WorkerFailed as error:
            self.failing += 1
            if self.failing >= FAILING:
                self.cycled.stopped = str(error)
            await self.clear()
        except _Late:
            self.cycled.others_answer = await self._still_answers(prompt)
        return not (self.cycled.stopped or self.cycled.late)

    async def clear(self) -> None:
        """Unload adapters that a failed or interrupted cycle has left behind."""
        if self.present:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.limits.unload_s):
                    await self.client.lora("unload", self.present)
        self.present = ""

    # ---- steps

    async def _load(self, name: str, folder: Path) -> None:
        self.present = name
        await self._step("load", reloads.loaded(self.client, name, folder), self.limits.load_s)
        if self.check:
            with suppress(WorkerFailed):
                await self._step("check", self.check(name, folder), self.limits.use_s)

    async def _unload(self, name: str, what: str = "unload") -> None:
        await self._step(what, reloads.unloaded(self.client, name), self.limits.unload_s)
        self.present = ""

    async def _ask(self, name: str, prompt: Prompt) -> None:
        await self._request("request", self.client.ask(prompt, name, NEW_TOKENS, stop=False))

    async def _leave(self, name: str, prompt: Prompt) -> None:
        reply = Reply(time.perf_counter_ns(), leave_after=1)
        await self._request("request that is left", self.client.send(self._body(name, prompt), reply))

    async def _unload_under_way(self, name: str, prompt: Prompt) -> None:
        """Unload between the first and the last token of an answer, which must then come to an end too."""
        reply = Reply(time.perf_counter_ns(), begun=asyncio.Event())
        answer = asyncio.ensure_future(self.client.send(self._body(name, prompt), reply))
        assert reply.begun is not None
        begun = asyncio.ensure_future(reply.begun.wait())
        try:
            await asyncio.wait([answer, begun], timeout=self.limits.use_s, return_when=asyncio.FIRST_COMPLETED)
            await self._unload(name, "unload under way")
            await self._request("request under way", answer)
        finally:
            for task in (answer, begun):
                task.cancel()

    def _body(self, name: str, prompt: Prompt) -> bytes:
        return self.client.encoded(prompt, name, LONG, stop=False)

    async def _request(self, what: str, asking: Awaitable[Reply]) -> None:
        """A request that fails is noted, and the cycle goes on. Raises _Late."""

        async def answered() -> None:
            reply = await asking
            if reply.error:
                raise WorkerFailed(reply.error)

        with suppress(WorkerFailed):
            await self._step(what, answered(), self.limits.use_s)

    async def _step(self, what: str, doing: Awaitable[None], limit_s: float) -> None:
        """Raises WorkerFailed for a step that fails, _Late for one without an answer in time."""
        started = time.perf_counter()
        failed: PeftoptError | None = None
        late = False
        try:
            async with asyncio.timeout(limit_s):
                await doing
        except TimeoutError:
            late = True
        except WorkerFailed as error:
            failed = error
        words = f"no answer within {limit_s:g} s" if late else failed.message if failed else ""
        self.cycled.steps.append(Step(what, time.perf_counter() - started, words, late))
        if late:
            raise _Late
        if failed:
            raise failed

    async def _still_answers(self, prompt: Prompt) -> bool | None:
        """Whether what was served before is still answered; None where nothing was."""
        for name in self.others[:1]:
            try:
                async with asyncio.timeout(self.limits.use_s):
                    return not (await self.client.ask(prompt, name, NEW_TOKENS, stop=False)).error
            except TimeoutError:
                return False
        return None
