"""What a window's lines are together: traffic by adapter, and the engine at its end. Numbers are kept in arrays: a
window may have many requests."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from peftopt.gateway.sampling import Sample as Sampled
from peftopt.loadtest.importers.serve_log import THEIRS
from peftopt.watch.promise import Promise
from peftopt.watch.spans import Check, Engine, Sample, Time, Traffic

if TYPE_CHECKING:
    from peftopt.watch.sources.lines import Request, Row

SKIPPED = frozenset(THEIRS)
"""Errors of the client's own."""


@dataclass(frozen=True)
class Alike:
    """When a request is comparable with the run's: its prompt is as long as theirs, and at most as many requests are at
    the engine with it."""

    beside: int
    low: float
    high: float

    @classmethod
    def of(cls, promise: Promise) -> Alike:
        """As the run says. Where it does not know its prompts' lengths, none is comparable."""
        lengths = promise.prompt_tokens
        return cls(promise.beside, lengths.low, lengths.high) if lengths else cls(0, 0.0, 0.0)

    def among(self, requests: Iterable[Request]) -> list[Request]:
        """The requests that are comparable."""
        low, high, beside = self.low, self.high, self.beside
        return [
            request
            for request in requests
            if request.running_at_start < beside
            and request.prompt_tokens is not None
            and low <= request.prompt_tokens <= high
        ]


def _numbers() -> array[float]:
    return array("d")


@dataclass
class Times:
    """Of requests that were answered, in seconds."""

    latency: array[float] = field(default_factory=_numbers)
    ttft: array[float] = field(default_factory=_numbers)
    tpot: array[float] = field(default_factory=_numbers)

    def add(self, answered: Sequence[Request]) -> None:
        """More of them."""
        self.latency.extend([r.request_duration_ms / 1e3 for r in answered])
        self.ttft.extend([r.ttft_ms / 1e3 for r in answered if r.ttft_ms is not None])
        self.tpot.extend([r.tpot_ms / 1e3 for r in answered if r.tpot_ms is not None])

    def values(self) -> dict[Time, Sample]:
        """Each time's values."""
        return {"latency": Sample(self.latency), "ttft": Sample(self.ttft), "tpot": Sample(self.tpot)}


@dataclass
class Sums:
    """Of one adapter."""

    answered: int = 0
    times: Times = field(default_factory=Times)
    alike: Times = field(default_factory=Times)
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: array[float] = field(default_factory=_numbers)
    new_tokens: array[float] = field(default_factory=_numbers)
    engine_ms: float = 0.0
    fills: array[float] = field(default_factory=_numbers)
    checks: list[Check] = field(default_factory=list)

    def add(self, requests: Sequence[Request], alike: Alike) -> None:
        """More requests. What went wrong at the client is none of the adapter's."""
        answered = [request for request in requests if not request.error_kind]
        if len(answered) < len(requests):
            self.errors.update(r.error_kind for r in requests if r.error_kind and r.error_kind not in SKIPPED)
        self.answered += len(answered)
        self.times.add(answered)
        self.alike.add(alike.among(answered))
        self.prompt_tokens.extend([r.prompt_tokens for r in answered if r.prompt_tokens is not None])
        self.new_tokens.extend([r.new_tokens for r in answered])
        self.engine_ms += sum([r.generation_latency_ms or 0.0 for r in answered])
        self.fills.extend([r.batch_fill for r in requests if r.batch_fill is not None])

    def traffic(self) -> Traffic:
        """All of them."""
        errors = dict(self.errors)
        return Traffic(
            answered=self.answered,
            times=self.times.values(),
            alike=self.alike.values(),
            refused=errors.pop("refused", 0),
            errors=errors,
            prompt_tokens=Sample(self.prompt_tokens),
            new_tokens=Sample(self.new_tokens),
            tokens=int(sum(self.new_tokens)),
            engine_s=self.engine_ms / 1e3,
            batch_fill=_mean(self.fills),
            checks=tuple(self.checks),
        )


@dataclass
class Loads:
    """How many adapters the engine has loaded since it started, as far as the log tells: a load is in the line of the
    first request that its version answers. Lines of another engine, that of a merged model, have no sample."""

    switches: int | None = None
    loading_s: float | None = None
    """What the engine took to start: another number is another start."""

    def add(self, requests: Iterable[Request]) -> None:
        """More requests, in the order of the log."""
        for request in requests:
            if request.sample_age_ms is None:
                continue
            if self.switches is None or request.model_loading_time != self.loading_s:
                self.switches, self.loading_s = 0, request.model_loading_time
            if request.adapter_switch_time is not None:
                self.switches += 1


class Window:
    """The lines of a window so far."""

    def __init__(self, alike: Alike, loads: Loads) -> None:
        self._alike, self._loads = alike, loads
        self._sums: dict[str, Sums] = defaultdict(Sums)
        self._last: Request | None = None
        self._sampled: Request | None = None

    def add(self, rows: Sequence[Row]) -> None:
        """More of them, in the order of the log. Who asked for no adapter that is served has no traffic."""
        from peftopt.watch.sources.lines import Request

        by_adapter: dict[str, list[Request]] = defaultdict(list)
        requests = []
        for row in rows:
            if isinstance(row, Request):
                requests.append(row)
                by_adapter[row.adapter].append(row)
            elif row.arm:
                self._sums[row.adapter].checks.append(Check(row.version, row.verdict, row.distance))
        for adapter, asked in by_adapter.items():
            self._sums[adapter].add(asked, self._alike)
        self._loads.add(requests)
        self._last = requests[-1] if requests else self._last
        sampled = next((row for row in reversed(requests) if row.sample_age_ms is not None), None)
        self._sampled = sampled or self._sampled

    def adapters(self) -> Mapping[str, Traffic]:
        """Traffic by adapter; of one that had none that counts there is none."""
        traffic = {name: sums.traffic() for name, sums in self._sums.items() if name}
        return {name: each for name, each in traffic.items() if each.asked or each.checks}

    def engine(self) -> Engine:
        """The engine at the end: as the last request met it, and as the last sample of its memory was."""
        from peftopt.watch.sources.lines import sources

        if self._last is None:
            return Engine()
        fills = [each.fills for name, each in self._sums.items() if name]
        queue = Engine(
            running=self._last.running_at_start,
            waiting=self._last.waiting_at_start,
            batch_fill=_mean([fill for each in fills for fill in each]),
        )
        if (sampled := self._sampled) is None:
            return queue
        told = {name.removeprefix("gpu_memory_"): who for name, who in sources(sampled).items()}
        allocated, reserved = sampled.gpu_memory_allocated, sampled.gpu_memory_reserved
        return replace(
            queue,
            kv_usage=sampled.kv_usage,
            memory_allocated=allocated,
            memory_reserved=reserved,
            gpu_utilization=sampled.gpu_utilization,
            fragmentation=Sampled(0.0, allocated=allocated, reserved=reserved, sources=told).fragmentation,
            switches=self._loads.switches,
        )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
