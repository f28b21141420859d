"""How often does `peftopt watch` alarm falsely, and how soon rightly? Simulated services, beside the usual rule.

    python benchmarks/watching.py

The usual rule is Prometheus' "P95 over the limit in a 5-minute window, for 5 minutes", evaluated once a minute. It
fires at the sixth evaluation in a row at which more than 5 % of the requests of the last 5 minutes were over the limit.
The quiet rule is the same, pending for as long as it takes to fire falsely at most once in 30 days where requests are
independent (chosen on another seed). What is judged by `peftopt.watch` is judged by its own `Detector` and `Watching`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peftopt import stats
from peftopt.watch.detectors import STAKES, Detector, threshold
from peftopt.watch.hearing import Kind
from peftopt.watch.promise import Bound, Lengths, Promise
from peftopt.watch.spans import Buckets, Check, Sample, Span, Traffic
from peftopt.watch.watching import Watching

Array = np.ndarray[Any, np.dtype[Any]]
Rng = np.random.Generator

DAY, WEEK = 24 * 60, 7 * 24 * 60
REQUESTS, LIMIT_S, PROMISED = 60, 0.5, 0.05
"""Requests a minute; the limit, which at most this share may miss."""
HEALTHY = 0.025
"""The share of misses before a change."""
BEFORE, HORIZON = 120, 600
"""Minutes before a change, and after it."""
ARL_S = 30 * 86400.0
WINDOW, PENDING = 5, 5
"""The usual rule's, in minutes."""
SIGMA = 0.4
"""Of the logarithm of a request's time."""


# ---- the usual rule ----------------------------------------------------------------------------


def evaluations_in_a_row(misses: Array, n: Array, limit: float = PROMISED) -> Array:
    """At the end of each minute (last axis): for how many evaluations the P95 of 5 minutes has been over the limit."""
    over = _rolling(misses) > limit * _rolling(n)
    at = np.arange(over.shape[-1])
    last_under = np.maximum.accumulate(np.where(over, -1, at), axis=-1)
    rows: Array = at - last_under
    return rows


def _rolling(values: Array) -> Array:
    sums = np.cumsum(values, axis=-1, dtype=float)
    sums[..., WINDOW:] -= np.cumsum(values, axis=-1, dtype=float)[..., :-WINDOW]
    return sums


def quiet_pending(seed: int) -> int:
    """Minutes for which the rule must be pending to fire once in 30 days at most, at the SLA, requests independent."""
    rng = np.random.default_rng([seed, 99])
    n = rng.poisson(REQUESTS, (60, 30 * DAY))
    rows = evaluations_in_a_row(rng.binomial(n, PROMISED), n)
    return next(minutes for minutes in range(PENDING, DAY) if (rows == minutes + 1).sum() <= 60)


# ---- false alarms ------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """How requests come, and what share of them misses the limit in each minute. `rho`: how much the requests of
    `fate_minutes` share their fate (the correlation between two of them)."""

    name: str
    requests: Callable[[Array], Array] = lambda minute: np.full(len(minute), float(REQUESTS))
    share: Callable[[Array], Array] = lambda minute: np.full(len(minute), PROMISED)
    rho: float = 0.0
    fate_minutes: int = 1
    window_minutes: int = 1

    def draw(self, rng: Rng, runs: int, minutes: int) -> tuple[Array, Array]:
        """Misses and requests by run and minute."""
        minute = np.arange(minutes)
        n = rng.poisson(np.broadcast_to(self.requests(minute), (runs, minutes)))
        share = np.broadcast_to(self.share(minute), (runs, minutes))
        if self.rho:
            share = np.repeat(fated(rng, share[:, :: self.fate_minutes], self.rho), self.fate_minutes, axis=1)[
                :, :minutes
            ]
        return rng.binomial(n, share), n


def fated(rng: Rng, share: Array, rho: float) -> Array:
    """Shares of windows whose requests share their fate: beta distributed around `share`."""
    both = 1 / rho - 1
    drawn: Array = rng.beta(share * both, (1 - share) * both)
    return drawn


def wave(minute: Array, period: int) -> Array:
    """-1..1."""
    values: Array = np.sin(2 * np.pi * minute / period)
    return values


WORLDS = (
    World("independent requests"),
    World("shared fate in a window, rho 0.1", rho=0.1),
    World("shared fate in a window, rho 0.3", rho=0.3),
    World("daily cycle of the rate, 12 to 108 a minute", requests=lambda m: REQUESTS * (1 + 0.8 * wave(m, DAY))),
    World("weekly cycle of the rate, 12 to 108 a minute", requests=lambda m: REQUESTS * (1 + 0.8 * wave(m, WEEK))),
    World("daily cycle of the misses, 1 to 5 %", share=lambda m: 0.03 + 0.02 * wave(m, DAY)),
    World("weekly cycle of the misses, 1 to 5 %", share=lambda m: 0.03 + 0.02 * wave(m, WEEK)),
    World("promise broken each day: misses 3 to 7 %, mean 5 %", share=lambda m: 0.05 + 0.02 * wave(m, DAY)),
    World("assumption broken: fate shared for 5 minutes, rho 0.1", rho=0.1, fate_minutes=5),
    World("the same with windows of 5 minutes", rho=0.1, fate_minutes=5, window_minutes=5),
)


def alarms_of_detector(misses: Array, n: Array, windows: float) -> int:
    """How often a detector with the whole budget alarms in one run."""
    alarms, limit, detector = 0, threshold(windows), Detector(PROMISED)
    for k, of in zip(misses.tolist(), n.tolist(), strict=True):
        if of:
            detector.hear(k / of)
            if detector.level >= limit:
                alarms, detector = alarms + 1, Detector(PROMISED)
    return alarms


def alarms_of_detectors(misses: Array, n: Array, windows: float) -> list[int]:
    """The same for many runs at once. The first is judged by peftopt's own detector too, and must come out alike."""
    share = misses / np.maximum(n, 1)
    wealth, alarms = np.zeros((len(share), len(STAKES))), np.zeros(len(share), dtype=int)
    for window in range(share.shape[1]):
        excess = share[:, window, None] / PROMISED - 1
        moved = np.where(
            n[:, window, None] > 0, np.logaddexp(0.0, wealth + np.log1p(np.array(STAKES) * excess)), wealth
        )
        fires = np.logaddexp.reduce(moved, axis=1) - math.log(len(STAKES)) >= threshold(windows)
        alarms += fires
        wealth = np.where(fires[:, None], 0.0, moved)
    if alarms_of_detector(misses[0], n[0], windows) != alarms[0]:
        raise AssertionError("the detector and its twin for many runs differ")
    return [int(count) for count in alarms]


def false_alarms(runs: int, days: int, seed: int, quiet: int) -> Iterator[str]:
    """A line for each world."""
    yield "| at the SLA (5 % misses), a month | `watch`: alarms, months with one | usual rule | quiet rule |"
    yield "|---|---|---|---|"
    for number, world in enumerate(WORLDS):
        misses, n = world.draw(np.random.default_rng([seed, 1, number]), runs, days * DAY)
        rows = evaluations_in_a_row(misses, n)
        joined = [counts.reshape(runs, -1, world.window_minutes).sum(axis=2) for counts in (misses, n)]
        alarms = alarms_of_detectors(joined[0], joined[1], 30 * DAY / world.window_minutes)
        told = [f"{(rows == pending + 1).sum() / runs:,.1f}" for pending in (PENDING, quiet)]
        yield f"| {world.name} | {sum(alarms) / runs:.2f}, {sum(map(bool, alarms))} of {runs} | {' | '.join(told)} |"


# ---- a whole service ---------------------------------------------------------------------------

SLA_ONLY = Promise("run", "merged", sla=(Bound("ttft.p95 <= 500 ms", "ttft", LIMIT_S, PROMISED),))
ERRORS = ("oom", "timeouts", "engine_dead", "upstream", "refused")
WHOLE = replace(
    SLA_ONLY,
    drift=(Bound("latency.p50", "latency", 1.0, 0.5), Bound("latency.p95", "latency", math.exp(1.645 * SIGMA), 0.05)),
    beside=1000,
    tokens_per_s=50.0,
    errors=dict.fromkeys(ERRORS, 0.003),
    prompt_tokens=Lengths(10, 1000, 0.02, 0.02),
    new_tokens=Lengths(10, 1000, 0.02, 0.02),
    rate=1.02,  # with the requests that fail
    adapters=20,
)


def at_every_limit(rng: Rng) -> Traffic:
    """A minute of a service that holds each promise of WHOLE and none by more than it must."""
    n = int(rng.poisson(REQUESTS))
    lengths = Sample(rng.choice((5, 100, 2000), n, p=(0.02, 0.96, 0.02)).tolist())
    return Traffic(
        answered=n,
        times={"ttft": counted(int(rng.binomial(n, PROMISED)), n)},
        alike={"latency": Sample(rng.lognormal(0.0, SIGMA, n).tolist())},
        errors={kind: int(rng.binomial(n, 0.003)) for kind in ERRORS[:-1]},
        refused=int(rng.binomial(n, 0.003)),
        prompt_tokens=lengths,
        new_tokens=lengths,
        tokens=int(rng.choice((49, 51))),
        engine_s=1.0,
        checks=(Check("v", "own", float(rng.choice((1.0, 3.0)))),),
    )


def whole_service(runs: int, days: int, seed: int) -> str:
    alarms = []
    for run in range(runs):
        rng, watching = np.random.default_rng([seed, 2, run]), Watching(WHOLE, ARL_S)
        spans = (Span(60.0 * minute, 60.0, {"support": at_every_limit(rng)}) for minute in range(days * DAY))
        alarms.append(sum(len(watching.hear(span)) for span in spans))
    detectors = sum(gauge.kind != "memory" for gauge in watching.gauges)
    return f"{detectors} detectors, each of whose numbers lies at its limit: {sum(alarms)} alarms in {runs} months."


def counted(misses: int, n: int) -> Buckets:
    return Buckets((LIMIT_S, math.inf), (n - misses, misses))


# ---- delays ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What happens to a service, and which detectors shall see it. `promise` is drawn for each run. `draw` gives the
    traffic of every adapter in a minute, before the change or after it."""

    name: str
    promise: Callable[[Rng], Promise]
    draw: Callable[[Rng, bool, Promise], dict[str, Traffic]]
    kinds: tuple[Kind, ...]
    adapter: str = ""


def missing(after: float, rho: float = 0.0, adapters: int = 1) -> Callable[[Rng, bool, Promise], dict[str, Traffic]]:
    """A service of which so many requests miss the limit, in all adapters alike."""

    def draw(rng: Rng, changed: bool, promise: Promise) -> dict[str, Traffic]:
        share = after if changed else HEALTHY
        if rho:
            share = float(fated(rng, np.array(share), rho))
        return shared_out(rng, [share] * adapters)

    return draw


def broken(after: float) -> Callable[[Rng, bool, Promise], dict[str, Traffic]]:
    """A service with one bad adapter of twenty."""
    return lambda rng, changed, promise: shared_out(rng, [after if changed else HEALTHY, *[HEALTHY] * 19])


def shared_out(rng: Rng, shares: list[float]) -> dict[str, Traffic]:
    """A minute's requests, shared out evenly over adapters, each with its share of misses."""
    sizes = rng.poisson(REQUESTS / len(shares), len(shares)).tolist()
    return {
        f"adapter-{i}": Traffic(answered=n, times={"ttft": counted(int(rng.binomial(n, share)), n)})
        for i, (n, share) in enumerate(zip(sizes, shares, strict=True))
    }


def of_run(requests: int) -> Callable[[Rng], Promise]:
    """A promise whose bounds come from a run with so many requests."""

    def promise(rng: Rng) -> Promise:
        times = rng.lognormal(0.0, SIGMA, requests)
        drift = [replace(b, bound_s=stats.quantile(times, 1 - b.share).high) for b in WHOLE.drift]
        return replace(WHOLE, drift=tuple(drift))

    return promise


def slower(rng: Rng, changed: bool, promise: Promise) -> dict[str, Traffic]:
    """A service whose times are all 20 % longer after the change."""
    n = int(rng.poisson(REQUESTS))
    times = Sample((rng.lognormal(0.0, SIGMA, n) * (1.2 if changed else 1.0)).tolist())
    return {"support": Traffic(answered=n, alike={"latency": times})}


def fixed(promise: Promise) -> Callable[[Rng], Promise]:
    return lambda rng: promise


TIMES: tuple[Kind, ...] = ("sla", "drift")
CHANGES = (
    Change("2x misses (10 %), only this limit watched", fixed(SLA_ONLY), missing(0.10), TIMES),
    Change("4x misses (20 %), only this limit watched", fixed(SLA_ONLY), missing(0.20), TIMES),
    Change("2x misses, everything watched", fixed(WHOLE), missing(0.10), TIMES),
    Change("4x misses, everything watched", fixed(WHOLE), missing(0.20), TIMES),
    Change("2x misses, 20 adapters, everything watched", fixed(WHOLE), missing(0.10, adapters=20), TIMES),
    Change("4x misses, 20 adapters, everything watched", fixed(WHOLE), missing(0.20, adapters=20), TIMES),
    Change("2x misses, shared fate rho 0.1, everything watched", fixed(WHOLE), missing(0.10, 0.1), TIMES),
    Change("4x misses, shared fate rho 0.1, everything watched", fixed(WHOLE), missing(0.20, 0.1), TIMES),
    Change("all misses, everything watched", fixed(WHOLE), missing(1.0), TIMES),
    Change("all times 20 % longer, bounds of a run of 400 requests", of_run(400), slower, TIMES),
    Change("all times 20 % longer, bounds of a run of 4,000 requests", of_run(4000), slower, TIMES),
    Change("one adapter of twenty: half of its requests miss", fixed(WHOLE), broken(0.5), TIMES, "adapter-0"),
    Change("one adapter of twenty: all of its requests miss", fixed(WHOLE), broken(1.0), TIMES, "adapter-0"),
)


def over(traffics: Mapping[str, Traffic], promise: Promise) -> tuple[int, int]:
    """What the usual rule counts: requests over the limit, or, where times drift, over the run's P95."""
    counts = [(values.above(LIMIT_S), values.n) for t in traffics.values() for values in t.times.values()]
    counts += [(v.above(promise.drift[1].bound_s), v.n) for t in traffics.values() for v in t.alike.values()]
    return sum(k for k, _ in counts), sum(n for _, n in counts)


def delays(change: Change, rng: Rng, quiet: int) -> list[float]:
    """Minutes from the change to the first alarm of `watch`, of the usual rule, of the quiet one, and of the usual rule
    for the adapter alone; inf where none came in time. A false alarm before the change counts for none of them."""
    promise = change.promise(rng)
    watching, seen = Watching(promise, ARL_S), math.inf
    whole, alone = [], []
    for minute in range(BEFORE + HORIZON):
        changed = minute >= BEFORE
        traffics = change.draw(rng, changed, promise)
        whole.append(over(traffics, promise))
        alone.append(over({change.adapter: traffics[change.adapter]}, promise) if change.adapter else (0, 1))
        if math.isinf(seen):
            alarms = watching.hear(Span(60.0 * minute, 60.0, traffics))
            if changed and any(a.kind in change.kinds and a.adapter in ("", *traffics) for a in alarms):
                seen = minute - BEFORE + 1
        elif minute >= BEFORE + 4 * quiet:
            break
    found = [seen]
    for counts, pending in ((whole, PENDING), (whole, quiet), (alone, PENDING)):
        misses, n = np.array(counts).T
        fires = evaluations_in_a_row(misses, n)[BEFORE:] > pending
        found.append(int(np.argmax(fires)) + 1 if fires.any() else math.inf)
    return found


def seen_after(runs: int, seed: int, quiet: int) -> Iterator[str]:
    yield "| change, from 2.5 % misses | `watch` | usual rule | quiet rule | `watch` / usual rule |"
    yield "|---|---|---|---|---|"
    for number, change in enumerate(CHANGES):
        rngs = (np.random.default_rng([seed, 3, number, run]) for run in range(runs))
        watch, usual, patient, alone = zip(*(delays(change, rng, quiet) for rng in rngs), strict=True)
        told = [minutes(watch), minutes(usual), minutes(patient)]
        if change.adapter:
            told[1] += f"; on the adapter {minutes(alone)}"
        ratio = quantile(watch, 0.5) / quantile(usual, 0.5)
        yield f"| {change.name} | {' | '.join(told)} | {f'{ratio:.1f}x' if math.isfinite(ratio) else '-'} |"


def rules_of_adapters(days: int, seed: int) -> str:
    """What the usual rule costs where each of twenty adapters has its own, and none is broken."""
    rng = np.random.default_rng([seed, 4])
    n = rng.poisson(REQUESTS / 20, (20, days * DAY))
    fires = evaluations_in_a_row(rng.binomial(n, HEALTHY), n) == PENDING + 1
    return (
        f"The usual rule for each of 20 adapters with 2.5 % misses fires {fires.sum() * 30 / days:,.0f} times a month."
    )


def quantile(values: tuple[float, ...], q: float) -> float:
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def minutes(values: tuple[float, ...]) -> str:
    """Median and 90 %."""
    return ", ".join(f"{m:.0f}" if math.isfinite(m := quantile(values, q)) else "not seen" for q in (0.5, 0.9))


def main() -> None:
    """Command line: two tables of Markdown and a sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--whole", type=int, default=10, help="months of the whole service")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.perf_counter()
    quiet = quiet_pending(arguments.seed)
    print(f"The quiet rule is pending for {quiet} minutes.\n")
    for line in false_alarms(arguments.runs, arguments.days, arguments.seed, quiet):
        print(line, flush=True)
    print(f"\n{whole_service(arguments.whole, arguments.days, arguments.seed)}\n", flush=True)
    for line in seen_after(arguments.runs, arguments.seed, quiet):
        print(line, flush=True)
    print(f"\n{rules_of_adapters(arguments.days, arguments.seed)}")
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
