"""What users saw in a span of time, by adapter, whatever it was read from. Pure."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Time = Literal["latency", "ttft", "tpot"]
"""Of a request, in seconds: from arrival to the last byte, to the first token, and the mean gap between tokens."""


class Values(Protocol):
    """Numbers of a span's requests: each of them, or how many lie between bounds."""

    @property
    def n(self) -> int:
        """How many."""

    def above(self, bound: float) -> int:
        """How many are above a bound. Where only buckets are known and none ends there, the next higher end is taken:
        fewer are counted, never more."""

    def below(self, bound: float) -> int:
        """How many are below a bound. Where only buckets are known, those of whole buckets: fewer, never more."""

    def quantile(self, q: float) -> float:
        """A quantile; of buckets the upper end of the bucket that it lies in; nan of nothing."""


@dataclass(frozen=True)
class Sample:
    """Each of the numbers, in any order."""

    values: Sequence[float] = ()

    @property
    def n(self) -> int:
        """How many."""
        return len(self.values)

    def above(self, bound: float) -> int:
        """How many are above a bound."""
        return sum(value > bound for value in self.values)

    def below(self, bound: float) -> int:
        """How many are below a bound."""
        return sum(value < bound for value in self.values)

    def quantile(self, q: float) -> float:
        """The smallest number that at least a share q of them does not exceed; nan of nothing."""
        if not self.values:
            return math.nan
        return sorted(self.values)[max(0, math.ceil(q * len(self.values)) - 1)]


@dataclass(frozen=True)
class Buckets:
    """How many lie in each bucket: up to `ends[0]`, between that and `ends[1]`, and so on. The last end is inf."""

    ends: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def n(self) -> int:
        """How many."""
        return sum(self.counts)

    def above(self, bound: float) -> int:
        """How many are above the first end that is not below the bound."""
        return sum(self.counts[bisect.bisect_left(self.ends, bound) + 1 :])

    def below(self, bound: float) -> int:
        """How many are in buckets that end below the bound."""
        return sum(self.counts[: bisect.bisect_left(self.ends, bound)])

    def quantile(self, q: float) -> float:
        """The upper end of the bucket that the quantile lies in; nan of nothing."""
        if not self.n:
            return math.nan
        rank, seen = max(1, math.ceil(q * self.n)), 0
        for end, count in zip(self.ends, self.counts, strict=True):
            seen += count
            if seen >= rank:
                return end
        return math.inf


@dataclass(frozen=True)
class Check:
    """An answer to a canary prompt: is the version itself? `distance` from its own fingerprint, in units of its own
    noise; None where it was not told."""

    version: str
    verdict: Literal["own", "stale", "wrong", "unclear"]
    distance: float | None = None


@dataclass(frozen=True)
class Traffic:
    """Requests of one adapter that ended in a span.

    `times` of all that were answered. `alike`: of those whose prompts were as long as the run's, with at most as many
    requests at the engine as in the run; only these are compared with its times. `errors` by kind (see
    gateway.lines.Line.kind) without the client's own, "cancelled" and "request", and without "refused". `engine_s`:
    the sum of what the engine took for each answer. `prompt_tokens` and `new_tokens` of each request.
    """

    answered: int = 0
    times: Mapping[Time, Values] = field(default_factory=dict)
    alike: Mapping[Time, Values] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    refused: int = 0
    prompt_tokens: Values = field(default_factory=Sample)
    new_tokens: Values = field(default_factory=Sample)
    tokens: int = 0
    engine_s: float = 0.0
    batch_fill: float | None = None
    checks: tuple[Check, ...] = ()

    @property
    def asked(self) -> int:
        """All that counts: answered, failed and refused."""
        return self.answered + sum(self.errors.values()) + self.refused


@dataclass(frozen=True)
class Engine:
    """The engine at the end of a span; None is not known. Bytes, shares in 0..1, and how many adapters it has loaded
    since it started (`switches`)."""

    running: float | None = None
    waiting: float | None = None
    batch_fill: float | None = None
    kv_usage: float | None = None
    memory_allocated: float | None = None
    memory_reserved: float | None = None
    gpu_utilization: float | None = None
    fragmentation: float | None = None
    switches: int | None = None


@dataclass(frozen=True)
class Span:
    """From `began` (seconds since 1970) for `seconds`."""

    began: float
    seconds: float
    adapters: Mapping[str, Traffic] = field(default_factory=dict)
    engine: Engine = field(default_factory=Engine)
