"""The detectors of a promise, what each hears of a span, and what they say. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from peftopt.records import JsonValue
from peftopt.watch.promise import Promise
from peftopt.watch.spans import Span

Kind = Literal["sla", "drift", "throughput", "errors", "adapter", "quality", "memory", "range"]
Outcome = Literal["nothing shown", "alarm", "out of range", "too little"]


@dataclass(frozen=True)
class Alarm:
    """A detector's word: `at` (seconds since 1970) it was sure; the change began at `since`, as far as it can tell.
    `what` is a sentence with the figures: what was promised, what was seen, in how many requests."""

    kind: Kind
    name: str
    adapter: str
    at: float
    since: float
    what: str


@dataclass(frozen=True)
class Gauge:
    """How near a detector is to its alarm, 0 to 1, on the scale of the logarithm of its wealth."""

    kind: Kind
    name: str
    adapter: str
    nearness: float
    seen: str
    """Its number so far, for a person: "4.2 % of 1,204 requests over 500 ms, promised 5 %"."""


class Watching:
    """All detectors of all adapters. Together they alarm falsely once in `arl_s` seconds at most, on average."""

    def __init__(self, promise: Promise, arl_s: float, window_s: float = 60.0) -> None:
        raise NotImplementedError

    def hear(self, span: Span) -> list[Alarm]:
        """The next span; the alarms that it gives. A detector that has alarmed begins anew."""
        raise NotImplementedError

    @property
    def gauges(self) -> list[Gauge]:
        """Every detector, the nearest to its alarm first."""
        raise NotImplementedError

    @property
    def outcome(self) -> Outcome:
        """Of all that was heard since it was made or restored."""
        raise NotImplementedError

    def as_json(self) -> dict[str, JsonValue]:
        """Its state: small, and all that `restored` needs."""
        raise NotImplementedError

    @classmethod
    def restored(cls, promise: Promise, state: Mapping[str, JsonValue]) -> Watching:
        """As it was. Raises BadInput for a state of another promise or form."""
        raise NotImplementedError
