"""The last windows in a few numbers each, for a person and for the next recipe. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TypeVar

from peftopt.records import Json, JsonValue
from peftopt.watch.promise import Promise
from peftopt.watch.spans import Engine, Sample, Span, Time, Traffic, Values

KEPT = 30
"""So many windows are kept."""

LENGTHS_KEPT, LENGTHS_A_WINDOW = 600, 20
"""So many lengths of requests are kept, and of one window at most."""

P95 = 0.05
"""The share of requests that takes longer than the 95th percentile."""

Record = TypeVar("Record", "Figures", Engine)


@dataclass(frozen=True)
class Figures:
    """An adapter's window. Times in seconds at the promise's quantiles, None where nothing is known; `failed` includes
    `oom` and `timeouts`."""

    asked: int = 0
    latency_s: float | None = None
    ttft_s: float | None = None
    tokens_per_s: float = 0.0
    failed: int = 0
    oom: int = 0
    timeouts: int = 0
    refused: int = 0
    batch_fill: float | None = None


NO_FIGURES = Figures()


@dataclass
class History:
    """The last windows, the newest last. `prompt_tokens` and `new_tokens`: lengths of requests, evenly of all that were
    seen in a window."""

    promise: Promise
    ended: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    engine: deque[Engine] = field(default_factory=lambda: deque(maxlen=KEPT))
    adapters: dict[str, deque[Figures]] = field(default_factory=dict)
    prompt_tokens: deque[float] = field(default_factory=lambda: deque(maxlen=LENGTHS_KEPT))
    new_tokens: deque[float] = field(default_factory=lambda: deque(maxlen=LENGTHS_KEPT))

    def add(self, span: Span) -> None:
        """The next window."""
        before = len(self.ended)
        self.ended.append(span.began + span.seconds)
        self.seconds.append(span.seconds)
        self.engine.append(span.engine)
        for name in span.adapters:
            self.adapters.setdefault(name, deque([NO_FIGURES] * before, maxlen=KEPT))
        for name, windows in self.adapters.items():
            traffic = span.adapters.get(name)
            windows.append(figures(traffic, span.seconds, self.promise) if traffic else NO_FIGURES)
            if traffic:
                self.prompt_tokens += _evenly(traffic.prompt_tokens)
                self.new_tokens += _evenly(traffic.new_tokens)

    @property
    def last_asked(self) -> float | None:
        """The end of the last window in which anybody asked, of those that are kept; None without one."""
        asked = [end for end, rate in zip(self.ended, self.rates, strict=True) if rate]
        return asked[-1] if asked else None

    @property
    def rates(self) -> list[float]:
        """Requests a second in each window, over all adapters."""
        asked = [sum(windows[i].asked for windows in self.adapters.values()) for i in range(len(self.ended))]
        return [n / seconds for n, seconds in zip(asked, self.seconds, strict=True)]

    def as_json(self) -> dict[str, JsonValue]:
        """All of it, without what is not known, in four digits."""
        return {
            "ended": list(self.ended),
            "seconds": list(self.seconds),
            "engine": [_short(asdict(each)) for each in self.engine],
            "adapters": {name: [_short(asdict(each)) for each in windows] for name, windows in self.adapters.items()},
            "prompt_tokens": list(self.prompt_tokens),
            "new_tokens": list(self.new_tokens),
        }


def of_json(promise: Promise, value: Json) -> History:
    """What `as_json` wrote. Raises what BROKEN names for another value."""
    history = History(promise)
    for name in ("ended", "seconds", "prompt_tokens", "new_tokens"):
        getattr(history, name).extend(float(each) for each in value[name])
    history.engine.extend(_record(Engine, each) for each in value["engine"])
    for name, windows in value["adapters"].items():
        history.adapters[name] = deque((_record(Figures, each) for each in windows), maxlen=KEPT)
    return history


def figures(traffic: Traffic, seconds: float, promise: Promise) -> Figures:
    """An adapter's window in numbers."""
    return Figures(
        asked=traffic.asked,
        latency_s=_at(traffic, "latency", promise),
        ttft_s=_at(traffic, "ttft", promise),
        tokens_per_s=traffic.tokens / seconds,
        failed=sum(traffic.errors.values()),
        oom=traffic.errors.get("oom", 0),
        timeouts=sum(n for kind, n in traffic.errors.items() if kind.startswith("timeout")),
        refused=traffic.refused,
        batch_fill=traffic.batch_fill,
    )


def limit(promise: Promise, time: Time) -> tuple[float, float | None]:
    """Of a time, the share of requests that is shown to take longer, and the promised limit in seconds: the tightest of
    the recipe's own; P95 without one."""
    bounds = [bound for bound in promise.sla if bound.time == time]
    if not bounds:
        return P95, None
    tightest = min(bounds, key=lambda bound: bound.bound_s)
    return tightest.share, tightest.bound_s


def _at(traffic: Traffic, time: Time, promise: Promise) -> float | None:
    values = traffic.times.get(time)
    if values is None or not values.n:
        return None
    quantile = values.quantile(1 - limit(promise, time)[0])
    return quantile if math.isfinite(quantile) else None


def _evenly(values: Values) -> list[float]:
    """At most LENGTHS_A_WINDOW of the numbers, from the shortest to the longest; none of buckets."""
    if not isinstance(values, Sample):
        return []
    ordered = sorted(values.values)
    step = max(1.0, len(ordered) / LENGTHS_A_WINDOW)
    return [ordered[int(i * step + step / 2)] for i in range(math.floor(len(ordered) / step))]


def _short(values: Mapping[str, JsonValue]) -> JsonValue:
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in values.items()
        if value is not None
    }


def _record(kind: type[Record], value: Json) -> Record:
    known = {each.name for each in fields(kind)}
    return kind(**{name: number for name, number in value.items() if name in known})
