"""What each detector of a promise hears of a span: which of how many requests, checks or windows were amiss. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from peftopt.metrics import format_value
from peftopt.watch.promise import Bound, Lengths, Promise
from peftopt.watch.spans import Engine, Span, Time, Traffic, Values

Kind = Literal["sla", "drift", "throughput", "errors", "adapter", "quality", "memory", "range"]

FEWEST = 20
"""Requests between two judgements of a detector: fewer say nothing."""

LEAST_SHARE = 1e-4
"""A promised share below this, as of no errors at all, is taken as this: three failures in quiet minutes are heard."""

OTHERWISE = 0.5
"""The promised mean of what may as well be so as not: a window's speed below the run's lower bound, more requests in a
window than their mean."""

NOISES = 2.0
"""Noises from its own fingerprint within which an answer says nothing: see canary.fingerprint.Known.margin."""

RECORDS = 5
"""From so many loads of adapters on, a new record of memory has a chance of 1 in RECORDS at most if nothing leaks."""

FILLING = 2
"""Caches may fill while each adapter that is live is loaded so many times."""

GROWTH_BYTES = 2**18
"""Memory that is so much above its record sets a new one."""

REFUSED = 0.01
"""The limit of the share that is refused where the run tells none: it may be one in a hundred."""

Counts = tuple[int, int]
"""How many were amiss, of how many."""

Count = Callable[[Traffic], Counts]


@dataclass(frozen=True)
class Topic:
    """What a detector bets on. A share of `mean` at most was promised to be `amiss`: words that follow a number, as
    "requests took longer than 500 ms". It is judged whenever `fewest` more were heard."""

    kind: Kind
    name: str
    mean: float
    amiss: str
    fewest: int = FEWEST

    @property
    def of_times(self) -> bool:
        """Whether it is about the times of requests, which the run was made for."""
        return self.kind in ("sla", "drift")


def asked_of_traffic(promise: Promise) -> dict[Topic, Count]:
    """The topics on which an adapter's traffic is counted request by request, or check by check."""
    topics: dict[Topic, Count] = {}
    for bound in promise.sla:
        topics.update(_slower("sla", bound, lambda traffic: traffic.times))
    for bound in promise.drift:
        topics.update(_slower("drift", bound, lambda traffic: traffic.alike))
    topics.update(_failed(promise.errors))
    topics[Topic("quality", "canary", OTHERWISE, f"canary answers were over {NOISES:g} noises off", 1)] = _far
    if promise.prompt_tokens is not None:
        topics.update(_lengths("prompts", promise.prompt_tokens, lambda traffic: traffic.prompt_tokens))
    if promise.new_tokens is not None:
        topics.update(_lengths("answers", promise.new_tokens, lambda traffic: traffic.new_tokens))
    return topics


# ---- times, errors, checks, lengths ------------------------------------------------------------


def _slower(kind: Kind, bound: Bound, times: Callable[[Traffic], Mapping[Time, Values]]) -> dict[Topic, Count]:
    """Nothing for a bound that no share of requests breaks."""
    if bound.share >= 1:
        return {}
    limit = format_value("ms", 1e3 * bound.bound_s)

    def count(traffic: Traffic) -> Counts:
        values = times(traffic).get(bound.time)
        return (0, 0) if values is None else (values.above(bound.bound_s), values.n)

    topic = Topic(kind, bound.name, max(bound.share, LEAST_SHARE), f"requests took longer than {limit} ({bound.time})")
    return {topic: count}


def _failed(shares: Mapping[str, float]) -> dict[Topic, Count]:
    """A topic for each kind of error that the run knows of, and for refusals. All timeouts are one kind, with the
    highest of their shares: a run does not tell kinds apart, so each share holds for all of them."""
    if not shares:
        return {}
    joined: dict[str, float] = {} if "refused" in shares else {"refused": REFUSED}
    for kind, share in shares.items():
        joined[_joined(kind)] = max(share, joined.get(_joined(kind), LEAST_SHARE))
    return dict(_failure(kind, share) for kind, share in joined.items() if share < 1)


def _failure(name: str, share: float) -> tuple[Topic, Count]:
    def count(traffic: Traffic) -> Counts:
        if name == "refused":
            return traffic.refused, traffic.asked
        return sum(n for kind, n in traffic.errors.items() if _joined(kind) == name), traffic.asked

    amiss = "requests were refused" if name == "refused" else f"requests failed ({name})"
    return Topic("errors", name, share, amiss), count


def _joined(kind: str) -> str:
    """A kind of error as it is promised: to the first token, between tokens or in all, a timeout is one."""
    return "timeouts" if kind.startswith("timeout") else kind


def _far(traffic: Traffic) -> Counts:
    distances = [check.distance for check in traffic.checks if check.distance is not None]
    return sum(distance > NOISES for distance in distances), len(distances)


def _lengths(what: str, lengths: Lengths, values: Callable[[Traffic], Values]) -> dict[Topic, Count]:
    """Shorter than the run's, and longer."""

    def short(traffic: Traffic) -> Counts:
        return values(traffic).below(lengths.low), values(traffic).n

    def long(traffic: Traffic) -> Counts:
        return values(traffic).above(lengths.high), values(traffic).n

    sides = (("shorter", lengths.low, lengths.below, short), ("longer", lengths.high, lengths.above, long))
    return {
        Topic("range", f"{side} {what}", max(share, LEAST_SHARE), f"{what} were {side} than {end:,g} tokens"): count
        for side, end, share, count in sides
        if share < 1
    }


# ---- tokens per second -------------------------------------------------------------------------


@dataclass
class Pool:
    """Answers since the speed was last judged: their tokens, and the seconds that the engine took for them."""

    tokens: int = 0
    engine_s: float = 0.0
    answers: int = 0

    def hear(self, traffics: Iterable[Traffic]) -> float | None:
        """More answers. Tokens per second of the engine's time, once there are enough; then the pool is empty."""
        for traffic in traffics:
            if traffic.engine_s > 0:
                self.tokens += traffic.tokens
                self.engine_s += traffic.engine_s
                self.answers += traffic.answered
        if self.answers < FEWEST:
            return None
        speed = self.tokens / self.engine_s
        self.tokens, self.engine_s, self.answers = 0, 0.0, 0
        return speed


def speed(promise: Promise) -> Topic | None:
    """What is bet on the speed; None where no speed was promised."""
    if promise.tokens_per_s is None:
        return None
    amiss = f"windows had fewer than {promise.tokens_per_s:,.4g} tokens per second of the engine's time"
    return Topic("throughput", "tokens_per_s", OTHERWISE, amiss, 1)


def comparable(promise: Promise, span: Span) -> bool:
    """Whether no more requests were at the engine, on average, than the run had there at once: with more of them each
    is slower, and nothing has changed. Source: Little's law."""
    busy = sum(traffic.engine_s for traffic in span.adapters.values())
    return busy <= promise.beside * span.seconds


# ---- the engine and the whole ------------------------------------------------------------------

RISING = Topic("memory", "memory_reserved", 1 / RECORDS, "loads of adapters set a new record of reserved memory", 1)


@dataclass
class Memory:
    """The engine's reserved memory after loads of adapters. `record`: the most bytes so far; `switches`: after how many
    loads it was heard last; `heard`: how often; `at_first`: the record when it was first judged."""

    switches: int = 0
    record: float = 0.0
    heard: int = 0
    at_first: float = 0.0

    def hear(self, engine: Engine, adapters: int) -> bool | None:
        """Whether it has set a new record since the last load; None where nothing was loaded, while the caches may
        still fill, and before there is enough to compare with."""
        if engine.switches is None or engine.memory_reserved is None:
            return None
        if engine.switches < self.switches:
            self.record, self.heard = 0.0, 0  # another engine
        if engine.switches == self.switches and self.heard:
            return None
        self.switches = engine.switches
        filling = engine.switches <= FILLING * adapters
        self.heard = 1 if filling else self.heard + 1
        higher = engine.memory_reserved > self.record + GROWTH_BYTES
        if higher or filling:
            self.record = max(self.record, engine.memory_reserved)
        if self.heard < RECORDS:
            self.at_first = self.record
            return None
        return higher

    def figures(self) -> str:
        """From where to where it rose."""
        return f"{format_value('bytes', self.at_first)} to {format_value('bytes', self.record)}"


def rate(promise: Promise) -> Topic | None:
    """What is bet on the rate of requests; None where no rate was measured."""
    if promise.rate is None:
        return None
    return Topic("range", "rate", OTHERWISE, f"windows had more than {promise.rate:,.3g} requests/s", 1)
