"""A server under load for a long time, while adapters are loaded and unloaded: its memory, and whether its answers stay
right.

windows: users ask, adapters are loaded, used and unloaded, log-probabilities of answers are checked; then all pause,
and the server's memory at rest is read
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from peftopt.canary import fingerprint, mixed, reloads
from peftopt.canary.fingerprint import Known
from peftopt.diagnose.unloading import resting
from peftopt.diagnose.unloading.cycles import KINDS, PATIENT, Cycles, Limits, Server
from peftopt.diagnose.unloading.resting import Held
from peftopt.diagnose.unloading.soaked import Soaked, Window
from peftopt.errors import WorkerFailed
from peftopt.loadtest import sender
from peftopt.loadtest.client import Client, Reply
from peftopt.loadtest.protocols import Prompt, Target
from peftopt.loadtest.sender import Planned
from peftopt.loadtest.summary import Request

WINDOWS = 24
"""Parts of a run: after each, what is held at rest is read."""

LEAVING = 0.1
"""The share of users who leave after their answer's first token."""

TOLD = 4
"""Prompts by which answers are told apart."""

PAUSE_S = 0.5
"""Between two cycles of an adapter."""

QUESTIONS = (
    "Name three fruits.",
    "What is the capital of France?",
    "Write a polite reply to a customer whose parcel is late.",
    "Explain in one sentence what a queue is.",
    "Count from one to ten.",
    "Translate 'good morning' into Spanish.",
    "List the months of spring.",
    "What is seven times eight?",
)
"""What is asked where no prompts are given."""

Messages = Sequence[Mapping[str, str]]
Churn = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Plan:
    """The length (seconds), the number of users at once, and the tokens of an answer."""

    seconds: float
    users: int = 4
    new_tokens: int = 32
    windows: int = WINDOWS
    seed: int = 0


@contextmanager
def engine(base: Path, adapters: Sequence[Path], name: str, threads: int, folder: Path) -> Iterator[Server]:
    """An engine's server, started for this. Raises BadInput for a model that it cannot serve, MissingEnvironment if it
    is not installed, WorkerFailed if it does not start."""
    from peftopt.engines import vllm
    from peftopt.gateway import backends
    from peftopt.records import Model

    rank = max((vllm.lora_rank(str(each)) for each in adapters), default=0) if name == "vllm" else 0
    slots = len(adapters) + 1  # and the one that comes and goes
    wanted = backends.Wanted(name, Model(str(base)), adapters=slots, rank=rank, slots=slots, threads=threads)
    how = backends.start(wanted)
    server = backends.launch(how, folder / f"{name}.log")
    try:
        server.ready(how.ready_s)
        yield _Launched(Target(how.url, key_env=how.key_env), server.processes)
    finally:
        server.stop()


@dataclass(frozen=True)
class _Launched:
    target: Target
    family: Callable[[], Sequence[int]]

    def processes(self) -> Sequence[int]:
        return self.family()


def soak(
    server: Server,
    adapters: Sequence[Path],
    prompts: Mapping[str, Messages],
    plan: Plan,
    show: Callable[[int, str], None],
    limits: Limits = PATIENT,
    churn: Churn | None = None,
) -> Soaked:
    """Run the plan, until Ctrl-C or SIGTERM ends it. `show` gets the finished windows. `churn` loads and unloads
    adapters, for servers with another way to do so: again and again, in each window.

    Raises MissingEnvironment if no server answers, BadInput if it serves nothing.
    """

    async def session() -> Soaked:
        soaked = Soaked()
        async with Client(replace(server.target, timeout_s=2 * limits.load_s)) as client:
            with sender.interruptible() as interrupted:
                try:
                    await _Soak(client, server, adapters, prompts, plan, show, limits, soaked, churn).whole()
                except asyncio.CancelledError:
                    if not interrupted():
                        raise
                    soaked.stopped = "interrupted"
        return soaked

    return asyncio.run(session())


class _Soak:
    """One run in progress. `known`: what the served names say alone, None where the server tells no
    log-probabilities."""

    def __init__(
        self,
        client: Client,
        server: Server,
        adapters: Sequence[Path],
        prompts: Mapping[str, Messages],
        plan: Plan,
        show: Callable[[int, str], None],
        limits: Limits,
        soaked: Soaked,
        churn: Churn | None,
    ) -> None:
        self.client, self.server, self.plan, self.show, self.churn = client, server, plan, show, churn
        self.adapters, self.prompts, self.limits, self.soaked = adapters, prompts, limits, soaked
        self.told = dict(list(prompts.items())[:TOLD])
        self.dice = random.Random(plan.seed)
        self.names: dict[Path, str] = {}
        self.residents: list[str] = []
        self.known: Known | None = None
        self.work: Cycles | None = None
        self.churned = 0
        self.start = time.perf_counter_ns()

    async def whole(self) -> None:
        """Load what stays, learn what it says, and go through the windows."""
        await self._settle()
        try:
            self.soaked.before = await self._held()
            for number in range(self.plan.windows):
                await self._window()
                self.show(number + 1, self._state())
                if self.soaked.stopped:
                    break
        finally:
            if self.work and not self.work.cycled.late:
                await self.work.clear()
            for name in self.names.values():
                await self._unload(name)

    async def _settle(self) -> None:
        served = [str(model["id"]) for model in await self.client.models()]
        for number, folder in enumerate(self.adapters):
            name = f"peftopt-soak-{number}-{folder.name}"
            try:
                async with asyncio.timeout(self.limits.load_s):
                    await reloads.loaded(self.client, name, folder)
            except (WorkerFailed, TimeoutError) as error:
                self.soaked.notes.append(f"no adapter comes and goes: {error}")
                break
            self.names[folder] = name
        self.residents = [*served, *self.names.values()]
        try:
            self.known = await mixed.alone(self.client, self.residents, self.told, lambda done, what: None)
            self.soaked.alike = self.known.alike()
        except WorkerFailed as error:
            self.soaked.notes.append(f"answers are not told apart: {error}")
        if len(self.names) == len(self.adapters) and self.adapters:
            prompts = [Prompt(messages=messages) for messages in self.prompts.values()]
            work = Cycles(self.client, self.adapters, prompts, self.limits, tuple(KINDS), served, check=self._check)
            self.work, self.soaked.churn = work, work.cycled

    async def _unload(self, name: str) -> None:
        try:
            async with asyncio.timeout(self.limits.unload_s):
                await self.client.lora("unload", name)
        except TimeoutError:
            self.soaked.notes.append(f"{name} was not unloaded within {self.limits.unload_s:g} s")

    async def _window(self) -> None:
        began = time.monotonic()
        until = began + self.plan.seconds / self.plan.windows
        before = self._cycles()
        requests: list[Request] = []
        async with asyncio.TaskGroup() as group:
            for _ in range(self.plan.users):
                group.create_task(self._user(until, requests))
            group.create_task(self._canary())
            if self.work:
                group.create_task(self._cycle(self.work, until))
            if self.churn:
                group.create_task(self._churn(self.churn, until))
        cycles, held = self._cycles() - before, await self._held()
        self.soaked.windows.append(Window(tuple(requests), cycles, held, time.monotonic() - began))
        if self.soaked.before is not None and held is None:
            self.soaked.stopped = "the server has ended"
        elif self.work and (self.work.cycled.late or self.work.cycled.stopped):
            self.soaked.stopped = "adapters cannot be loaded and unloaded any more"

    async def _held(self) -> Held | None:
        """What the server holds at rest, without connections of ours."""
        await self.client.hang_up()
        return await resting.at_rest(self.server.processes)

    async def _user(self, until: float, requests: list[Request]) -> None:
        """One user asks, and asks again when answered."""
        while time.monotonic() < until:
            name, id_ = self.dice.choice(self.residents), self.dice.choice(list(self.prompts))
            prompt = Prompt(messages=self.prompts[id_])
            leaves = self.dice.random() < LEAVING
            reply = Reply(time.perf_counter_ns(), leave_after=1 if leaves else 0)
            due = (reply.sent - self.start) / 1e9
            body = self.client.encoded(prompt, name, self.plan.new_tokens, stop=True)
            await self.client.send(body, reply)
            planned = Planned(due, id_, name, prompt, self.plan.new_tokens)
            requests.append(sender.request_of(self.client, planned, self.start, due, reply))
            if reply.error:
                await asyncio.sleep(PAUSE_S)  # a server that refuses at once is not asked a thousand times a second

    async def _canary(self) -> None:
        """Every name that stays with every prompt, all at once, beside the users."""
        if self.known:
            seen = await mixed.together(self.client, self.known, self.residents, self.told, self.dice)
            self.soaked.asked += len(seen.answered)
            self.soaked.wrong += seen.wrong
            self.soaked.unclear += len(seen.failed)

    async def _check(self, name: str, folder: Path) -> None:
        """Whether what was just loaded answers as the same adapter does that stays."""
        if not self.known:
            return
        own = self.names[folder]
        for id_, messages in self.told.items():
            answer = await mixed.ask(self.client, name, messages)
            if isinstance(answer, str):
                self.soaked.unclear += 1
                continue
            self.soaked.asked += 1
            wrong = fingerprint.judge(self.known, own, id_, answer)
            if wrong:
                self.soaked.wrong.append(replace(wrong, model=f"{folder.name}, loaded again"))

    def _cycles(self) -> int:
        return self.churned + (self.work.cycled.cycles if self.work else 0)

    async def _cycle(self, work: Cycles, until: float) -> None:
        """Cycles of an adapter, until time is over or something does not work."""
        while time.monotonic() < until and await work.cycle():
            await asyncio.sleep(PAUSE_S)

    async def _churn(self, churn: Churn, until: float) -> None:
        while time.monotonic() < until:
            await churn()
            self.churned += 1
            await asyncio.sleep(PAUSE_S)

    def _state(self) -> str:
        window = self.soaked.windows[-1]
        failed = sum(bool(r.error) for r in window.requests)
        held = f"{window.held.host / 1e6:.0f} MB at rest" if window.held else "memory is not known"
        return f"{len(window.requests)} requests, {failed} failed, {window.cycles} cycles, {held}"
