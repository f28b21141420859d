"""What all users' requests share: the adapters, the limits, the log, and their settings."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from peftopt.gateway.admission import Admission, Ticket
from peftopt.gateway.heads import READ_S
from peftopt.gateway.keys import Keys
from peftopt.gateway.lines import Line, Log, Origin, Written
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.routes import Table
from peftopt.gateway.sampling import Sample
from peftopt.gateway.tracing import Traces
from peftopt.gateway.upstream import MOST_ANSWER_BYTES, Upstream
from peftopt.records import Json

MOST_BODY_BYTES = 8 * 2**20


class Adapters(Protocol):
    """The adapters for users' requests: Lives, or in one of several workers the supervisor's last state. `in_flight`
    counts requests by the name at the engine; `switched`: seconds of loads that no request has reported yet."""

    in_flight: Counter[str]
    switched: dict[str, float]

    @property
    def table(self) -> Table:
        """The routes as they are now."""

    @property
    def ready(self) -> bool:
        """Whether users are answered, except those of versions that have `failed`."""

    def failed(self) -> Mapping[str, str]:
        """Why versions do not answer, by their served names."""

    def doubted(self) -> Mapping[str, str]:
        """Versions that answer users although they do not answer as themselves, with the evidence."""

    def certified(self, name: str) -> bool:
        """Whether a version had to answer as itself before it was served, and did."""

    def loading_s(self, name: str) -> float | None:
        """Seconds that the start of a version's own engine took; None for one on the gateway's engine."""

    def heard(self, line: Line, sticky: str, path: str, asked: Mapping[str, Json]) -> None:
        """A request is over, with its body if it reached the engine."""


@dataclass
class Settings:
    """`most_body_bytes` of a request and `read_s` seconds for it to arrive (0 = without limit); `most_answer_bytes` of
    an answer that does not stream; `model_loading_time`: seconds of the engine's start, for the log. `metrics`: users
    may read them; `log_text`: prompts and answers are logged; `most_running`: requests that the engine runs at once, 0
    if not known; `origins`: the run of each version that a run chose, by the version's name at the engine."""

    most_body_bytes: int = MOST_BODY_BYTES
    model_loading_time: float | None = None
    read_s: float = READ_S
    most_answer_bytes: int = MOST_ANSWER_BYTES
    metrics: bool = True
    log_text: bool = False
    most_running: int = 0
    origins: Mapping[str, Origin] = field(default_factory=dict)


@dataclass
class Shared:
    """What every request uses. `open` is False while the gateway drains: it accepts no more. `here`: requests that have
    no line in the log yet. `samples` of the engines by the version that each runs for, "" for the gateway's own.
    `scrape`: the metrics of all workers, if there are several."""

    upstream: Upstream
    lives: Adapters
    admission: Admission
    keys: Keys
    metrics: Metrics
    log: Log
    settings: Settings = field(default_factory=Settings)
    samples: Mapping[str, Sample] = field(default_factory=dict)
    traces: Traces | None = None
    open: bool = True
    here: int = 0
    turns: dict[Ticket, asyncio.Future[None]] = field(default_factory=dict)
    scrape: Callable[[], Awaitable[bytes]] | None = None

    @property
    def table(self) -> Table:
        """The routes as they are now."""
        return self.lives.table

    async def exposition(self) -> bytes:
        """The metrics of the whole gateway."""
        return await self.scrape() if self.scrape else self.metrics.text()

    def write(self, line: Written) -> None:
        """Add a line to the log; one that cannot be written is counted."""
        lost = self.log.lost
        self.log.write(line)
        self.metrics.log_lost.inc(self.log.lost - lost)

    @property
    def fill(self) -> float | None:
        """Requests at the engine as a share of the limit, else of the requests that it runs at once; None if neither is
        known."""
        most = self.admission.limits.running or self.settings.most_running
        return min(1.0, self.admission.running / most) if most else None

    def let_in(self, tickets: list[Ticket]) -> None:
        """Wake the requests that are admitted or refused now."""
        for ticket in tickets:
            turn = self.turns.pop(ticket, None)
            if turn and not turn.done():
                turn.set_result(None)
        self.metrics.running.set(self.admission.running)
        self.metrics.waiting.set(self.admission.waiting)
        if self.fill is not None:
            self.metrics.fill.set(self.fill)
