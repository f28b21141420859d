"""What came back from a load: metrics, service levels, saturation, and the search for the highest rate. Pure.

Latency counts from the *scheduled* time: what a late sender or a full queue costs is in it. A request that failed is
a request whose latency has no end; it stands in every quantile and against every service level.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from peftopt import stats
from peftopt.measurements import NO_ACCOUNT, Account, Sent
from peftopt.metrics import QUANTILES, UNITS
from peftopt.records import Interval, Json
from peftopt.redaction import redacted

ATTAINED = 0.95
"""The share of requests that must meet every service level for a rate to hold."""

NEVER = 1e300
"""Stands for the latency of a request that failed, where a finite number is needed."""


@dataclass(frozen=True)
class Request:
    """One request. Times in seconds since the run began; `first` and `last` token's arrival, None for a server that
    does not stream or sent none; `gaps_ms` between messages; `error` is "" for an answer that is whole; `kind` of
    an error, where it is told; `reused` prompt tokens that earlier requests had left, where it is told."""

    id: str
    model: str
    scheduled: float
    sent: float
    done: float
    first: float | None = None
    last: float | None = None
    gaps_ms: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    new_tokens: int = 0
    error: str = ""
    kind: str | None = None
    warmup: bool = False
    reused: int | None = None

    @property
    def queue_time_ms(self) -> float:
        """What the sender itself added: sent after it was scheduled."""
        return (self.sent - self.scheduled) * 1e3

    @property
    def generation_latency_ms(self) -> float:
        """From when it was sent to its end: without what a late sender adds."""
        return (self.done - self.sent) * 1e3

    @property
    def request_duration_ms(self) -> float:
        """From when it was due to its end: what its user waits."""
        return (self.done - self.scheduled) * 1e3

    @property
    def ttft_ms(self) -> float | None:
        """From when it was due to its first token; None where no token's time is known."""
        return None if self.first is None else (self.first - self.scheduled) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Mean gap between tokens after the first, whichever way they were packed into messages."""
        if self.first is None or self.last is None or self.new_tokens < 2:
            return None
        return (self.last - self.first) * 1e3 / (self.new_tokens - 1)

    def record(self) -> Sent:
        """What is kept of it."""
        return Sent(
            **vars(self),
            queue_time_ms=self.queue_time_ms,
            generation_latency_ms=self.generation_latency_ms,
            request_duration_ms=self.request_duration_ms,
            ttft_ms=self.ttft_ms,
            tpot_ms=self.tpot_ms,
        )


def span_ms(requests: Sequence[Request]) -> float:
    """From when the first request was due to when the last was done."""
    return 1e3 * (max(r.done for r in requests) - min(r.scheduled for r in requests))


# ---- service levels ----------------------------------------------------------------------------

LEVELS: Mapping[str, str] = {
    "ttft": "time to first token",
    "tpot": "mean gap between tokens after the first",
    "itl": "the longest gap between two tokens",
    "latency": "the whole request",
}


@dataclass(frozen=True)
class Slo:
    """A service level that each request meets or misses, e.g. ttft <= 500 ms."""

    metric: str
    limit_ms: float
    text: str

    def met(self, request: Request) -> bool:
        """A failed request meets none; one of a single token has no gaps to be too long."""
        if request.error:
            return False
        value = _value(request, self.metric)
        return self.metric in ("tpot", "itl") if value is None else value <= self.limit_ms


def slo(text: str) -> Slo:
    """The service level in "ttft <= 500 ms". Raises ValueError that says how to write one."""
    match = re.fullmatch(r"\s*([a-z0-9.]+)\s*(?:<=|≤|<)\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([a-zµ]+)\s*", text)
    if not match or match[1] not in LEVELS or match[3] not in UNITS["ms"]:
        raise ValueError(f"{text!r} is not a service level: write one such as 'ttft <= 500 ms', of {', '.join(LEVELS)}")
    limit = float(match[2]) * float(UNITS["ms"][match[3]])
    if not 0 < limit < math.inf:
        raise ValueError(f"{text!r}: the limit must be more than 0")
    return Slo(match[1], limit, " ".join(text.split()))


def attained(requests: Sequence[Request], slos: Sequence[Slo]) -> Interval:
    """The share of requests that meet every service level, with its exact interval."""
    return stats.proportion(sum(all(s.met(r) for s in slos) for r in requests), len(requests))


def apart(requests: Sequence[Request]) -> bool:
    """Whether each was answered before the next was due: then no lower rate serves them better."""
    due = sorted(requests, key=lambda r: r.scheduled)
    return all(one.done <= other.scheduled for one, other in pairwise(due))


def _value(request: Request, metric: str) -> float | None:
    match metric:
        case "ttft":
            return request.ttft_ms
        case "tpot":
            return request.tpot_ms
        case "itl":
            return max(request.gaps_ms, default=None)
        case "queue":
            return request.queue_time_ms
        case _:
            return request.request_duration_ms


# ---- metrics -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Counts, rates and latencies of a run's requests, warm-ups left out; None where nothing tells.

    Quantiles are over all requests that could have the metric, failed ones at infinity, with exact intervals; means
    over the answered, for comparison with tools that report them. Gaps are pooled, so theirs has no interval.
    """

    requests: int
    answered: int
    failed: int
    errors: Mapping[str, int]
    """Kind of failure -> how many, the most frequent first."""
    duration_s: float
    """From the first request due to the last done."""
    offered_rate: float | None
    """Requests a second that were due."""
    request_rate: float | None
    """Requests a second that were answered."""
    output_tokens_per_s: float | None
    prompt_tokens: int
    """Of all answered requests."""
    new_tokens: int
    """Of all answers."""
    ttft_mean_ms: float | None = None
    """Time to the first token."""
    ttft_p50_ms: Interval | None = None
    ttft_p95_ms: Interval | None = None
    ttft_p99_ms: Interval | None = None
    tpot_mean_ms: float | None = None
    """Mean gap between a request's tokens after the first."""
    tpot_p50_ms: Interval | None = None
    tpot_p95_ms: Interval | None = None
    tpot_p99_ms: Interval | None = None
    latency_mean_ms: float | None = None
    """The whole request."""
    latency_p50_ms: Interval | None = None
    latency_p95_ms: Interval | None = None
    latency_p99_ms: Interval | None = None
    queue_mean_ms: float | None = None
    """What the sender itself added before it was sent."""
    queue_p50_ms: Interval | None = None
    queue_p95_ms: Interval | None = None
    queue_p99_ms: Interval | None = None
    itl_mean_ms: float | None = None
    """Gaps between messages of a stream."""
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    itl_p99_ms: float | None = None
    slo: tuple[str, ...] = ()
    """The service levels that were asked for, as they were written."""
    attained: Interval | None = None
    """The share of requests that met them all."""
    goodput_rate: float | None = None
    """Requests a second that met them all."""


@dataclass(frozen=True, kw_only=True)
class OfModel(Figures):
    """Those of one served name."""

    cold_ttft_ms: float | None
    """Time to the first token of its first, cold request."""


@dataclass(frozen=True, kw_only=True)
class Tried(Figures):
    """Those of one rate that was tried."""

    rate: float
    """Requests a second."""
    held: bool
    stopped: str
    """Why it ended before its plan did, "" where it did not."""


def figures(requests: Sequence[Request], slos: Sequence[Slo] = ()) -> Figures:
    """What came back, in figures."""
    return Figures(**_figures(requests, slos))


def tried(requests: Sequence[Request], slos: Sequence[Slo], rate: float, held: bool, stopped: str) -> Tried:
    """The same of a rate that was tried."""
    return Tried(**_figures(requests, slos), rate=rate, held=held, stopped=stopped)


def _figures(requests: Sequence[Request], slos: Sequence[Slo]) -> dict[str, Json]:
    """The fields of Figures."""
    timed = [r for r in requests if not r.warmup]
    answered = [r for r in timed if not r.error]
    failed = len(timed) - len(answered)
    duration = max((r.done for r in timed), default=0.0) - min((r.scheduled for r in timed), default=0.0)
    spread = max((r.scheduled for r in timed), default=0.0) - min((r.scheduled for r in timed), default=0.0)
    found: dict[str, Json] = {
        "requests": len(timed),
        "answered": len(answered),
        "failed": failed,
        "errors": dict(Counter(_kind(r.error) for r in timed if r.error).most_common()),
        "duration_s": duration,
        "offered_rate": (len(timed) - 1) / spread if spread > 0 else None,
        "request_rate": len(answered) / duration if duration > 0 else None,
        "output_tokens_per_s": sum(r.new_tokens for r in answered) / duration if duration > 0 else None,
        "prompt_tokens": sum(r.prompt_tokens or 0 for r in answered),
        "new_tokens": sum(r.new_tokens for r in answered),
    }
    for metric in ("ttft", "tpot", "latency", "queue"):
        values = [v for r in answered if (v := _value(r, metric)) is not None]
        if not values:
            continue
        found[f"{metric}_mean_ms"] = sum(values) / len(values)
        for name, q in QUANTILES.items():
            found[f"{metric}_{name}_ms"] = _with_failures(values, failed if metric != "queue" else 0, q)
    if gaps := sorted(g for r in answered for g in r.gaps_ms):
        found["itl_mean_ms"] = sum(gaps) / len(gaps)
        for name, q in QUANTILES.items():
            found[f"itl_{name}_ms"] = gaps[min(len(gaps) - 1, math.ceil(q * len(gaps)))]
    if slos:
        share = attained(timed, slos)
        found["slo"] = tuple(s.text for s in slos)
        found["attained"] = share
        found["goodput_rate"] = share.estimate * len(timed) / duration if duration > 0 else None
    return found


def by_model(requests: Sequence[Request], slos: Sequence[Slo] = ()) -> dict[str, OfModel]:
    """Figures of each served name apart."""
    found = {}
    for model in dict.fromkeys(r.model for r in requests):
        own = [r for r in requests if r.model == model]
        cold = min(own, key=lambda r: (not r.warmup, r.sent)).ttft_ms
        found[model] = OfModel(**_figures(own, slos), cold_ttft_ms=cold)
    return found


def _with_failures(values: Sequence[float], failed: int, q: float) -> Interval:
    """A quantile in which `failed` requests took for ever."""
    found = stats.quantile([*values, *[NEVER] * failed], q)
    estimate, low, high = (math.inf if x > NEVER / 1e9 else x for x in (found.estimate, found.low, found.high))
    return Interval(estimate, low, high, found.n, found.level)


def _kind(error: str) -> str:
    """Errors that differ only in numbers and addresses are one kind. A key is taken out first: a part of one is not
    found any more."""
    error = redacted(error)
    return re.sub(r"\d+(\.\d+)?", "#", error)[:120] if not error.startswith("HTTP") else error[:120]


@dataclass(frozen=True, kw_only=True)
class LoadSummary:
    """All that is told of a load: what a report shows, and the raw requests."""

    figures: Figures
    by_model: Mapping[str, OfModel]
    own_delay: OwnDelay
    requests: tuple[Sent, ...] = ()
    """The warm-ups first."""
    started: str = ""
    """When it began (ISO 8601, UTC)."""
    engine: Account = NO_ACCOUNT
    """What the server says of it."""
    stopped: str = ""
    """Why it ended before its plan did, "" where it did not."""
    unsent: int = 0
    """Requests that were planned and not sent."""
    notes: tuple[str, ...] = ()
    """What a reader must know, worst first."""
    trials: tuple[Tried, ...] = ()
    """The rates that a search tried."""
    highest_rate: float | None
    """Requests a second that held; None where none did, or none was searched."""
    adapters: tuple[Interval, ...] = ()
    """How long users waited for a first token with 1, 2, … adapters, in ms."""
    queues_ms: tuple[float | None, ...] = ()
    """The mean time of it in the server's queue."""
    cliff: int | None
    """After how many adapters users wait much longer."""


# ---- honesty of the sender ---------------------------------------------------------------------

MATTERS = 0.05
"""The sender's own delay matters when its P95 exceeds this share of the median time to first token (or latency)."""


@dataclass(frozen=True, kw_only=True)
class OwnDelay:
    """How late the sender itself was, in ms: `sent` after `scheduled`, and how late its loop woke up."""

    p50_ms: float
    p95_ms: float
    max_ms: float
    loop_p95_ms: float
    loop_max_ms: float
    matters: bool
    """Whether the metrics are partly the sender's own: fewer requests a second, or a machine of its own."""


def own_delay(requests: Sequence[Request], lag_ms: Sequence[float] = ()) -> OwnDelay:
    """How late the sender was; `lag_ms` is how late its loop woke up."""
    timed = [r for r in requests if not r.warmup]
    late = sorted(r.queue_time_ms for r in timed)
    awake = sorted(lag_ms)
    typical = stats.median([v for r in timed if not r.error and (v := r.ttft_ms or r.request_duration_ms)])
    worst = max(_at(late, 0.95), _at(awake, 0.95))
    return OwnDelay(
        p50_ms=_at(late, 0.5),
        p95_ms=_at(late, 0.95),
        max_ms=_at(late, 1.0),
        loop_p95_ms=_at(awake, 0.95),
        loop_max_ms=_at(awake, 1.0),
        matters=bool(worst > MATTERS * typical),
    )


def _at(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(q * (len(ordered) - 1)))] if ordered else 0.0


# ---- saturation --------------------------------------------------------------------------------

FEWEST_TO_JUDGE, SOONEST_S, GROWING, SIGMAS = 20, 8.0, 0.1, 3.0
ALL_FAIL = 20
"""So many requests in a row without one answer: the server does not work, and more of them would tell nothing."""


def saturated(arrived: Sequence[float], finished: Sequence[float], now: float, burstiness: float = 1.0) -> bool:
    """Whether more comes in than goes out: over the second half of the run so far, when the first has filled the
    pipeline, the backlog grew by more than a tenth of the arrivals and by more than chance gives.

    `arrived` and `finished` are times in seconds since the start, in order. Arrivals of n gaps vary by
    sqrt(n / burstiness). A stable queue may trip this at a rate near its limit, where it is as good as full.
    """
    middle = now / 2
    came, went = (bisect.bisect_right(x, now) - bisect.bisect_right(x, middle) for x in (arrived, finished))
    growth = came - went
    if came < FEWEST_TO_JUDGE or now < SOONEST_S or not finished or finished[0] > middle:
        return False
    return growth > GROWING * came and growth > SIGMAS * math.sqrt(came / min(burstiness, 1.0))


# ---- the cliff ---------------------------------------------------------------------------------

CLIFF = 1.25
"""How many times longer users must wait with one adapter more for the step to be called a cliff."""


def waited(requests: Sequence[Request]) -> Interval:
    """Median time to the first token in ms, of the whole request where nothing streams; failed ones wait for ever."""
    found = figures(requests)
    return found.ttft_p50_ms or found.latency_p50_ms or Interval(math.inf, 0.0, math.inf, 0)


QUEUED = (0.1, 0.2)
"""The shares of users' wait for a first token: below the first the engine's queue is as good as empty, from the second
on it is what they wait for."""


def cliff(waits: Sequence[Interval], queues_ms: Sequence[float | None] = ()) -> int | None:
    """After how many adapters users wait much longer: `waits` with 1, 2, … adapters in turn, and the mean time in the
    engine's queue, where it tells. None where they do not.

    One more adapter than an engine has slots for makes its requests wait for another's to end, or for weights to be
    swapped; what only grows with the number is no cliff. Waiting for a slot fills the queue, from next to nothing to a
    share of `QUEUED`; swapping shows in users' waits alone, whose step must be `CLIFF`-fold, and its intervals apart.
    """
    shares = [q / w.estimate for q, w in zip(queues_ms, waits, strict=False) if q is not None and w.estimate]
    for size, (empty, full) in enumerate(pairwise(shares) if len(shares) == len(waits) else (), 1):
        if empty < QUEUED[0] and full >= QUEUED[1]:
            return size
    for size, (before, after) in enumerate(pairwise(waits), 1):
        if after.estimate >= CLIFF * before.estimate and after.low > before.high:
            return size
    return None


# ---- the highest rate --------------------------------------------------------------------------

PRECISION, REPEATS = 1.1, 3
LOWEST, HIGHEST = 1 / 64, 4096
"""How far from the first rate the search may go."""


def highest_rate(
    start: float, precision: float = PRECISION, repeats: int = REPEATS
) -> Generator[float, bool, float | None]:
    """The highest rate (requests a second) that holds: yields each rate to try, and is sent whether it held.

    Brackets by doubling and halving, narrows the bracket down to a factor of `precision`, and then repeats the
    rate it found: only one that holds `repeats` times more is the answer; else the next lower one is tried. None when
    not even the lowest holds. A service that never fails ends at the highest.
    """
    rate, good, bad = start, 0.0, math.inf
    while not good or bad == math.inf:
        if (yield rate):
            good = rate
            if (rate := rate * 2) > start * HIGHEST:
                break
        else:
            bad = rate
            if (rate := rate / 2) < start * LOWEST:
                return None
    while bad / good > precision:
        middle = math.sqrt(good * bad) if bad < math.inf else good
        if middle == good:
            break
        if (yield middle):
            good = middle
        else:
            bad = middle
    while good >= start * LOWEST:
        held = 0
        while held < repeats and (yield good):
            held += 1
        if held == repeats:
            return good
        good /= precision
    return None
