"""The supervisor of several workers: it starts them, sends them what is served, and counts their requests.

Draining is exact although workers report their requests only from time to time. A change is done when each worker has
applied it and has reported its running requests. From then on the requests of a version without a route can only end,
so an old number is never too small.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from peftopt import environments
from peftopt.errors import MissingEnvironment
from peftopt.gateway.keys import Keys
from peftopt.gateway.lines import Line
from peftopt.gateway.listening import private
from peftopt.gateway.lives import Lives
from peftopt.gateway.metrics import BY_WORKER
from peftopt.gateway.shared import Shared
from peftopt.gateway.workers import messages, sums
from peftopt.gateway.workers.channel import MOST_BYTES, Channel, Closed
from peftopt.gateway.workers.messages import Asked, Counts, Part, State
from peftopt.records import Json

PUBLISH_EVERY_S = 0.05
"""How often the state is compared with what the workers know. A change of the routes does not wait for it."""
ACK_S = 30.0
"""The longest that a worker may take to follow a change. Then it is killed: it might go on with an old version."""
ACCOUNT_S = 2.0
"""The longest that a scrape waits for a worker's metrics."""
AGAIN_S, AGAIN_AT_MOST_S, WELL_S = 0.1, 30.0, 60.0
"""A worker that died is started again after so long, each time after twice that, unless it did well for a while."""
END_S = 15.0
"""The longest that a worker may take to end: its connections and the last lines of its log."""
BACKLOG = 2048
"""Connections that wait for a worker, as uvicorn has it."""


@dataclass
class Member:
    """A worker that has joined, its last report of requests, and its last metrics."""

    index: int
    pid: int
    channel: Channel
    counts: Counts = field(default_factory=Counts)
    account: sums.Account = field(default_factory=dict)
    knows: State | None = None


@dataclass(frozen=True)
class Plan:
    """The number of `workers`, the `part` of each, the socket `joined_at` that they join by, and the address for users;
    None for workers that another program starts."""

    workers: int
    part: Callable[[int], Part]
    joined_at: Path
    users: tuple[str, int] | None


class Supervisor:
    """The workers of a gateway. `shared` has the state that they all follow; `lives` counts their requests."""

    def __init__(self, plan: Plan, shared: Shared, lives: Lives, tell: Callable[[str], None]) -> None:
        self.plan, self.shared, self.lives, self.tell = plan, shared, lives, tell
        self.members: dict[int, Member] = {}
        self._past: sums.Account = {}
        """What workers that are gone have counted, added up, of versions that are still there."""
        self._ending = False
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    @property
    def busy(self) -> int:
        """Requests that run or wait."""
        return sum(member.counts.busy for member in self.members.values())

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(member.counts.waiting for member in self.members.values())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The workers answer until this ends. Raises MissingEnvironment for an address that is taken."""
        with contextlib.ExitStack() as stack:
            own = [stack.enter_context(users) for users in _sockets(self.plan)]
            joining = private(self.plan.joined_at, "--join PATH")
            server = await asyncio.start_unix_server(self._connected, sock=joining, limit=MOST_BYTES)
            beside = [asyncio.ensure_future(self._kept(number, users)) for number, users in enumerate(own, 1)]
            publishing = asyncio.ensure_future(self._publish())
            try:
                yield
            finally:
                self._ending = True
                publishing.cancel()
                await self._end()
                for task in beside:
                    task.cancel()
                server.close()
                await asyncio.gather(publishing, *beside, return_exceptions=True)
                self.plan.joined_at.unlink(missing_ok=True)

    async def published(self) -> None:
        """Wait until every worker has applied the current state. One that does not in time is killed."""
        await asyncio.gather(*(self._told(member) for member in list(self.members.values())))

    def again(self, keys: Keys) -> None:
        """Every worker opens the log again, and uses these keys; `keys` with a worker's part of their rates."""
        renewed = messages.written(messages.Renewed(messages.keys(keys)))
        for member in self.members.values():
            with contextlib.suppress(Closed):
                member.channel.tell("again", renewed)

    async def scrape(self) -> bytes:
        """The metrics of all."""
        await asyncio.gather(*(self._accounted(member) for member in list(self.members.values())))
        living = {member.index: member.account for member in self.members.values()}
        metrics = self.shared.metrics
        own = sums.account(metrics.registry)
        self._past = sums.only(self._past, metrics.keeps)
        return sums.text(sums.whole(own, living, self._past, BY_WORKER))

    # ---- processes

    async def _kept(self, index: int, users: socket.socket) -> None:
        """Start a worker, again whenever it has died."""
        command = [*environments.module("peftopt.gateway.workers"), "--join", str(self.plan.joined_at)]
        command += ["--index", str(index), "--fd", str(users.fileno())]
        clock, pause = asyncio.get_running_loop().time, AGAIN_S
        while not self._ending:
            began = clock()
            process = await asyncio.create_subprocess_exec(
                *command,
                pass_fds=[users.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env=environments.variables(),
            )
            self._processes[index] = process
            status = await process.wait()
            if self._ending:
                return
            self.shared.metrics.worker_restarts.inc()
            pause = AGAIN_S if clock() - began > WELL_S else pause
            self.tell(f"worker {index} has ended with the status {status}; it is started again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, AGAIN_AT_MOST_S)

    async def _end(self) -> None:
        """Every worker closes its connections, writes its last lines and ends."""
        for member in self.members.values():
            with contextlib.suppress(Closed):
                member.channel.tell("end")
        running = [process for process in self._processes.values() if process.returncode is None]
        waits = [asyncio.ensure_future(process.wait()) for process in running]
        if waits:
            await asyncio.wait(waits, timeout=END_S)
        for process in running:
            if process.returncode is None:
                process.kill()
                await process.wait()
        for member in list(self.members.values()):
            member.channel.close()

    # ---- what workers tell, and are told

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: a worker from its joining to its end."""
        member: Member | None = None

        async def asked(kind: str, value: Json) -> Json:
            nonlocal member
            if kind == "join" and member is None:
                member = self._joined(messages.read(Asked, value), channel)
                return messages.written(self.plan.part(member.index)) if member else None
            if member is None or self.members.get(member.index) is not member:
                raise Closed
            if kind == "counts":
                self._count(member, messages.read(Counts, value))
            elif kind == "heard":
                self.lives.trials.heard(Line(**value["line"]), value["sticky"])
            elif kind == "shadow":
                self.lives.trials.shadow(Line(**value["line"]), value["path"], value["asked"])
            elif kind == "metrics":
                return (await self.scrape()).decode()
            return None

        channel = Channel(reader, writer, asked)
        try:
            await channel.run()
        except Exception as error:  # noqa: BLE001 (whatever a worker sends, the others go on)
            self.tell(f"a worker is let go of: {type(error).__name__}: {error}")
        if member:
            self._left(member)

    def _joined(self, asked: Asked, channel: Channel) -> Member | None:
        """A place for a worker: the one it had, or any that is free; None without one. It is told what is served at
        once, and of every change from now on."""
        free = [number for number in range(1, self.plan.workers + 1) if number not in self.members]
        index = asked.index or (free[0] if free else 0)
        if not 1 <= index <= self.plan.workers or self._ending:
            return None
        if before := self.members.get(index):  # its process is dead, and its connection's end has not come yet
            self._left(before)
        member = self.members[index] = Member(index, asked.pid, channel)
        asyncio.ensure_future(self._told(member))  # noqa: RUF006 (it ends by itself, within ACK_S)
        return member

    def _left(self, member: Member) -> None:
        """A worker is gone, and its requests with it. What it counted stays."""
        if self.members.get(member.index) is not member:
            return
        self._count(member, Counts())
        del self.members[member.index]
        self._past = sums.added_up([self._past, member.account])
        member.channel.close()

    def _count(self, member: Member, counts: Counts) -> None:
        self.lives.in_flight.subtract(member.counts.in_flight)
        self.lives.in_flight.update(counts.in_flight)
        member.counts = counts
        for served in counts.told:
            self.lives.switched.pop(served, None)

    async def _publish(self) -> None:
        """Tell of what changes beside the routes: readiness, samples of the engine, trials."""
        while True:
            now = self._state()
            await asyncio.gather(*(self._told(m) for m in list(self.members.values()) if m.knows != now))
            await asyncio.sleep(PUBLISH_EVERY_S)

    async def _told(self, member: Member) -> None:
        """A worker follows what is served now, or is killed."""
        member.knows = state = self._state()
        try:
            async with asyncio.timeout(ACK_S):
                counts = await member.channel.ask("state", messages.written(state))
        except Closed:
            self._left(member)
        except TimeoutError:
            self.tell(f"worker {member.index} does not follow a change in {ACK_S:g} s: it is killed")
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
            self._left(member)
        else:
            if self.members.get(member.index) is member:
                self._count(member, messages.read(Counts, counts))

    async def _accounted(self, member: Member) -> None:
        """A worker's metrics as they are now; its last ones where it does not answer."""
        with contextlib.suppress(Closed, TimeoutError):
            async with asyncio.timeout(ACCOUNT_S):
                member.account = sums.read(await member.channel.ask("account")) or member.account

    def _state(self) -> State:
        lives, shared = self.lives, self.shared
        return State(
            routes=lives.table.routes,
            ready=lives.ready,
            open=shared.open,
            switched=dict(lives.switched),
            trials=lives.trials.shares,
            samples=shared.samples,
            model_loading_time=shared.settings.model_loading_time,
            failed=lives.failed(),
            doubted=lives.doubted(),
            certified=tuple(name for name in lives.table.served() if lives.certified(name)),
            loading_s={name: s for name in lives.table.served() if (s := lives.loading_s(name)) is not None},
        )


def _sockets(plan: Plan) -> list[socket.socket]:
    """A socket of each worker's own on one port, so that the kernel spreads connections over them. They stay open here:
    those that wait for a worker that has died are answered by the one that takes its place."""
    if plan.users is None:
        return []
    host, _ = plan.users
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server(plan.users, family=family).close()  # another process of this user's might share the port
        return [
            socket.create_server(plan.users, family=family, reuse_port=True, backlog=BACKLOG)
            for _ in range(plan.workers)
        ]
    except OSError as error:
        what = f"cannot listen on {host}:{plan.users[1]}: {error.strerror}"
        raise MissingEnvironment(what, "choose another: --port") from error
