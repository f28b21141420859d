"""A worker: it answers users by the supervisor's state of the adapters, and reports its requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from peftopt import redaction
from peftopt.errors import MissingEnvironment
from peftopt.gateway import keys
from peftopt.gateway.admission import Admission
from peftopt.gateway.asking import drawn
from peftopt.gateway.lines import Line, Log
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.routes import Table
from peftopt.gateway.shared import Shared
from peftopt.gateway.tracing import Traces
from peftopt.gateway.upstream import Upstream
from peftopt.gateway.workers import messages, sums
from peftopt.gateway.workers.channel import MOST_BYTES, Channel, Closed
from peftopt.gateway.workers.messages import Asked, Counts, Part, Renewed, State
from peftopt.records import Json

JOIN_S, AGAIN_S = 60.0, 0.2
"""The longest that a worker waits for the supervisor and for a place among its workers."""
TELL_EVERY_S = 0.05
"""How often a worker tells of its requests, where their numbers have changed."""
LINES_S = 5.0
"""The longest that the end waits for the last lines of the log."""


class Followed:
    """The adapters in the supervisor's last state, for users' requests, in place of Lives."""

    def __init__(self) -> None:
        self.state = State()
        self.in_flight: Counter[str] = Counter()
        self.switched: dict[str, float] = {}
        self.table = Table()
        self.channel: Channel | None = None

    @property
    def ready(self) -> bool:
        """Whether every route has answered as itself."""
        return self.state.ready

    def failed(self) -> Mapping[str, str]:
        """Why versions do not answer."""
        return self.state.failed

    def doubted(self) -> Mapping[str, str]:
        """Versions that answer users though they do not answer as themselves."""
        return self.state.doubted

    def certified(self, name: str) -> bool:
        """Whether a version had to answer as itself."""
        return name in self.state.certified

    def loading_s(self, name: str) -> float | None:
        """Seconds that the start of a version's own engine took."""
        return self.state.loading_s.get(name)

    def heard(self, line: Line, sticky: str, path: str, asked: Mapping[str, Json]) -> None:
        """A request is over: the supervisor judges the routes on trial, and sends some requests to both versions
        again."""
        if line.adapter not in self.state.trials or self.channel is None:
            return
        told = asdict(replace(line, gaps_ms=[], sampled=None, text={}))
        with contextlib.suppress(Closed):
            self.channel.tell("heard", {"line": told, "sticky": sticky})
            if drawn(line, self.state.trials[line.adapter]):
                self.channel.tell("shadow", {"line": told, "path": path, "asked": asked})

    def follow(self, state: State) -> None:
        """Use this state from now on."""
        told = self.told()
        self.state, self.table = state, Table(state.routes)
        self.switched = {name: seconds for name, seconds in state.switched.items() if name not in told}

    def told(self) -> tuple[str, ...]:
        """The versions whose load a request has reported."""
        return tuple(sorted(self.state.switched.keys() - self.switched.keys()))


class Joined:
    """A worker among those of a supervisor; `index` as it has joined, 0 for any. `ended` is set when it must end: the
    supervisor says so, or is gone."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.followed = Followed()
        self.ended = asyncio.Event()
        self._counts = Counts()
        self._part: Part | None = None
        self._shared: Shared | None = None

    async def connect(self, path: Path) -> None:
        """Join, once there is a supervisor with a free place. Raises MissingEnvironment if there is none in time."""
        until = time.monotonic() + JOIN_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError, Closed):
                reader, writer = await asyncio.open_unix_connection(path, limit=MOST_BYTES)
                self._channel = Channel(reader, writer, self._asked)
                self._reading = asyncio.ensure_future(self._channel.run())
                place = await self._channel.ask("join", messages.written(Asked(os.getpid(), self.index)))
                if place is not None:
                    self._part = messages.read(Part, place)
                    self._reading.add_done_callback(lambda _: self.ended.set())
                    return
                self._channel.close()
            await asyncio.sleep(AGAIN_S)
        hint = "start the supervisor first: peftopt serve --join PATH"
        raise MissingEnvironment(f"no supervisor has a place for a worker at {path}", hint)

    @contextlib.asynccontextmanager
    async def answering(self) -> AsyncIterator[Shared]:
        """What its application uses, as a context; at its end the last lines of the log are written."""
        part = self._part
        assert part is not None
        log, metrics = Log(part.log, shared=True, keep=part.log_keep), Metrics(part.slos_s)
        traces = Traces(part.trace, part.host, part.port) if part.trace else None
        os.environ[redaction.ENGINE_KEY] = part.engine_key  # of engines that are started beside, too
        async with Upstream(part.url, part.timeouts, part.engine_key if part.started else "") as upstream:
            admission = Admission(part.limits, part.per_adapter, part.per_key)
            shared = Shared(
                upstream, self.followed, admission, part.known(), metrics, log, part.settings, traces=traces
            )
            shared.scrape = self._scrape
            self._shared = shared
            self.followed.channel = self._channel
            self._apply()
            telling = asyncio.ensure_future(self._tell())
            try:
                yield shared
            finally:
                until = time.monotonic() + LINES_S
                while shared.here and time.monotonic() < until:
                    await asyncio.sleep(0.01)
                telling.cancel()
                log.close()
                if traces:
                    await asyncio.to_thread(traces.close)
                self._channel.close()
                await asyncio.gather(telling, self._reading, return_exceptions=True)

    async def _scrape(self) -> bytes:
        """The metrics of all workers; one's own where the supervisor is going."""
        try:
            return str(await self._channel.ask("metrics")).encode()
        except Closed:
            return self._shared.metrics.text() if self._shared else b""

    async def _asked(self, kind: str, value: Json) -> Json:
        if kind == "state":
            before = self.followed.table
            self.followed.follow(messages.read(State, value))
            if self.followed.table != before:
                self._forget()
            self._apply()
            self._counts = self._counted()
            return messages.written(self._counts)
        if kind == "account":
            return sums.written(sums.account(self._shared.metrics.registry)) if self._shared else []
        if kind == "again" and self._shared:
            known = messages.read(Renewed, value).known()
            self._shared.log.reopen()
            self._shared.keys = keys.renewed(self._shared.keys, known)
        if kind == "end":
            self.ended.set()
        return None

    def _apply(self) -> None:
        """Hand on what every request uses."""
        if self._shared:
            state = self.followed.state
            self._shared.open, self._shared.samples = state.open, state.samples
            self._shared.settings.model_loading_time = state.model_loading_time

    def _forget(self) -> None:
        """Drop the metrics of versions that are not routed any more."""
        routes = self.followed.table.routes
        kept = {(name, version.id) for name, route in routes.items() for version in route.versions()}
        if self._shared:
            self._shared.metrics.keep(kept | {(name, "") for name in routes})

    async def _tell(self) -> None:
        """Tell of the requests whenever their numbers have changed."""
        with contextlib.suppress(Closed):
            while True:
                now = self._counted()
                if now != self._counts:
                    self._channel.tell("counts", messages.written(now))
                    self._counts = now
                await asyncio.sleep(TELL_EVERY_S)

    def _counted(self) -> Counts:
        in_flight = {name: n for name, n in self.followed.in_flight.items() if n}
        admission = self._shared.admission if self._shared else None
        busy = admission.running + admission.waiting if admission else 0
        return Counts(in_flight, busy, self.followed.told(), admission.waiting if admission else 0)
