"""Send requests when they are due, whatever has come back, and follow every answer to its end.

    a plan (what, when) -> play -> requests

`play` measures itself too: each request keeps when it was due and when it was sent, and the loop's own lateness is
sampled, so that a generator that cannot keep up is seen and said.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from peftopt.loadtest import prometheus, summary
from peftopt.loadtest.client import Client, Reply
from peftopt.loadtest.moments import utc
from peftopt.loadtest.protocols import Prompt
from peftopt.loadtest.summary import Request
from peftopt.measurements import NO_ACCOUNT, Account

LAG_EVERY_S, LOOK_EVERY_S, SCRAPE_EVERY_S = 0.05, 0.5, 0.5
SETTLE_S = 20.0
"""The longest wait, between two runs, for a server to be done with what was cut off."""

Show = Callable[[int, str], None]


@dataclass(frozen=True)
class Planned:
    """One request to send `at` seconds after the start."""

    at: float
    id: str
    model: str
    prompt: Prompt
    new_tokens: int


@dataclass
class Played:
    """What a run left. `stopped` says why it ended before its plan did, "" = it did not; `unsent` how many requests
    were never due. `engine` is the server's own account (see `prometheus.summary`); `started` when it began (ISO 8601,
    UTC)."""

    requests: list[Request] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    engine: Account = NO_ACCOUNT
    stopped: str = ""
    unsent: int = 0
    started: str = ""


async def warm_up(client: Client, planned: Sequence[Planned], fixed: bool) -> list[Request]:
    """One request for each served name of the plan, one after the other: they pay for loading an adapter, and find
    out which fields the server takes. They are kept, marked."""
    requests = []
    for model in dict.fromkeys(p.model for p in planned):
        first = next(p for p in planned if p.model == model)
        start = time.perf_counter_ns()
        reply = await client.ask(first.prompt, model, first.new_tokens, stop=not fixed)
        requests.append(request_of(client, first, start, 0.0, reply, warmup=True))
    return requests


async def play(
    client: Client,
    planned: Sequence[Planned],
    fixed: bool,
    concurrency: int = 0,
    burstiness: float = 1.0,
    show: Show = lambda done, what: None,
    patient: bool = False,
) -> Played:
    """Send the plan. `concurrency` > 0 makes it a closed loop: so many at once, each due when one before it is done,
    and `at` is not looked at. `patient` never stops for saturation. A Ctrl-C or SIGTERM ends it with what there is."""
    run = _Run(client, planned, fixed, concurrency, burstiness, patient, show)
    with interruptible() as interrupted:
        try:
            await run.whole()
        except asyncio.CancelledError:
            if not interrupted():
                raise
            run.played.stopped = "interrupted"
            await run.cut_off()
    return run.played


async def whole(client: Client, planned: Sequence[Planned], fixed: bool, concurrency: int = 0) -> Played:
    """Send the plan as `play` does, to its end whatever happens: signals are somebody else's to handle."""
    run = _Run(client, planned, fixed, concurrency, 1.0, True, lambda done, what: None)
    await run.whole()
    return run.played


class _Run:
    """One run in progress. State: what was sent and what is under way."""

    def __init__(
        self,
        client: Client,
        planned: Sequence[Planned],
        fixed: bool,
        concurrency: int,
        burstiness: float,
        patient: bool,
        show: Show,
    ) -> None:
        self.client, self.planned, self.concurrency = client, planned, concurrency
        self.burstiness, self.patient, self.show = burstiness, patient, show
        # made before the first is due: what takes time here must not take it there
        self.bodies = [client.encoded(p.prompt, p.model, p.new_tokens, stop=not fixed) for p in planned]
        self.played = Played(unsent=len(planned))
        self.under_way: set[asyncio.Task[None]] = set()
        self.due: list[float] = []
        self.start = 0

    async def whole(self) -> None:
        before = prometheus.totals(await self.client.metrics())
        moments: list[dict[str, float]] = []
        self.start = time.perf_counter_ns()
        self.played.started = utc(time.time())
        watch, watchers = asyncio.ensure_future(self._watch()), [asyncio.ensure_future(self._lag())]
        if before:
            watchers.append(asyncio.ensure_future(self._scrape(moments)))
        sending = asyncio.ensure_future(self._closed() if self.concurrency else self._open())
        try:
            await asyncio.wait([sending, watch], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
                await asyncio.wait([asyncio.ensure_future(self._drain()), watch], return_when="FIRST_COMPLETED")
            if watch.done():
                self.played.stopped = watch.result()
        finally:
            for task in (sending, watch, *watchers):
                task.cancel()
            await self.cut_off()
        after = prometheus.totals(await self.client.metrics()) if before else {}
        self.played.engine = prometheus.summary(moments, before, after)

    async def cut_off(self) -> None:
        for task in self.under_way:
            task.cancel()
        await asyncio.gather(*self.under_way, return_exceptions=True)
        self.played.requests.sort(key=lambda r: r.scheduled)

    async def _open(self) -> None:
        for number, planned in enumerate(self.planned):
            if (wait := planned.at - self._now()) > 0:
                await asyncio.sleep(wait)
            self._send(number, planned.at)

    async def _closed(self) -> None:
        numbers = iter(range(len(self.planned)))

        async def user() -> None:
            for number in numbers:
                await self._send(number, self._now())

        await asyncio.gather(*(user() for _ in range(self.concurrency)))

    async def _drain(self) -> None:
        while self.under_way:
            await asyncio.wait(self.under_way)

    def _send(self, number: int, due: float) -> asyncio.Task[None]:
        self.played.unsent -= 1
        self.due.append(due)
        task = asyncio.ensure_future(self._one(number, due))
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)
        return task

    async def _one(self, number: int, due: float) -> None:
        planned, sent = self.planned[number], self._now()
        try:
            reply = await self.client.send(self.bodies[number])
        except asyncio.CancelledError:
            cut = Request(planned.id, planned.model, due, sent, self._now(), error="cut off: the run was stopped")
            self.played.requests.append(cut)
            raise
        self.played.requests.append(request_of(self.client, planned, self.start, due, reply))

    def _now(self) -> float:
        return (time.perf_counter_ns() - self.start) / 1e9

    async def _lag(self) -> None:
        while True:
            until = self._now() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            self.played.lag_ms.append(max(0.0, self._now() - until) * 1e3)

    async def _scrape(self, moments: list[dict[str, float]]) -> None:
        while True:
            await asyncio.sleep(SCRAPE_EVERY_S)
            if moment := prometheus.moment(prometheus.totals(await self.client.metrics())):
                moments.append(moment)

    async def _watch(self) -> str:
        """Shows how it goes; returns when there is a reason to stop."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            now, done = self._now(), self.played.requests
            self.show(len(done), self._state(now))
            last = done[-summary.ALL_FAIL :]
            if len(last) == summary.ALL_FAIL and all(r.error for r in last):
                return f"the last {len(last)} requests all failed: {last[-1].error}"
            finished = sorted(r.done for r in done)
            if not (self.concurrency or self.patient) and summary.saturated(self.due, finished, now, self.burstiness):
                return f"saturated: after {now:.0f} s, {len(self.under_way)} requests are under way and more come in"

    def _state(self, now: float) -> str:
        recent = [r for r in self.played.requests if r.done > now - 10]
        tail = sorted(r.request_duration_ms for r in recent if not r.error)
        p95 = f", P95 {tail[min(len(tail) - 1, int(0.95 * len(tail)))]:.0f} ms" if tail else ""
        failed = sum(bool(r.error) for r in self.played.requests)
        rate = f"{len(recent) / min(10.0, now):.1f}/s, {len(self.under_way)} in flight{p95}"
        return rate + (f", {failed} failed" if failed else "")


async def settle(client: Client) -> None:
    """Wait until the server has let go of what a run left behind, as far as it tells."""
    until = time.monotonic() + SETTLE_S
    while time.monotonic() < until:
        state = prometheus.moment(prometheus.totals(await client.metrics()))
        if not state.get("running") and not state.get("waiting"):
            return
        await asyncio.sleep(0.25)


def request_of(client: Client, planned: Planned, start: int, due: float, reply: Reply, warmup: bool = False) -> Request:
    """What is kept of an answer. `start`: when the run began (perf_counter_ns); `due`: seconds after it."""
    streams = client.protocol.STREAMS
    times = [(t - start) / 1e9 for t in reply.times] if streams else []
    gaps = tuple((b - a) * 1e3 for a, b in itertools.pairwise(times))
    return Request(
        id=planned.id,
        model=planned.model,
        scheduled=due,
        sent=(reply.sent - start) / 1e9,
        done=(reply.done - start) / 1e9,
        first=times[0] if times else None,
        last=times[-1] if times else None,
        gaps_ms=gaps,
        prompt_tokens=reply.prompt_tokens,
        new_tokens=reply.new_tokens,
        error=reply.error,
        warmup=warmup,
        reused=reply.reused,
    )


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM cancel the task at hand once, which then ends in its own way; says whether they did."""
    task, loop, hit = asyncio.current_task(), asyncio.get_running_loop(), False
    assert task is not None

    def cancel() -> None:
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True
        task.cancel()

    handled = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # not the main thread, or no Unix
            loop.add_signal_handler(number, cancel)
            handled.append(number)
    try:
        yield lambda: hit and task.uncancel() == 0
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
