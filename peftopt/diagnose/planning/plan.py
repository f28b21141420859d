"""Merge or keep apart: the results of each option under a plan of traffic, and the recommendation. Pure.

The rule: the highest goodput wins. Of options within FREE of it, the one that takes the least memory wins; of those
alike in memory, the fastest. So one finished adapter is merged, since it costs no more memory, and many adapters that
meet their service levels apart stay apart.

Every draw resamples the measured times and has other arrivals, the same ones for all options. A recommendation that
fewer than SURE of the draws share is undecided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from peftopt import stats
from peftopt.diagnose.planning import options as ways
from peftopt.diagnose.planning.options import Option, Room
from peftopt.diagnose.planning.simulation import Due
from peftopt.diagnose.planning.speeds import Drawn, Speeds, resampled, typical
from peftopt.diagnose.planning.traffic import Traffic
from peftopt.diagnose.records import FREE
from peftopt.errors import BadInput
from peftopt.loadtest import arrivals
from peftopt.loadtest.summary import ATTAINED, Request, Slo
from peftopt.records import Interval

DRAWS = 60
"""Bootstrap replicates of what was measured, each under other arrivals."""

SURE = 0.9
"""The share of draws that must agree on a kind of option."""

SETTLING = 0.1
"""So much of the time is not judged: the engines begin empty."""

FEWEST_REQUESTS, MOST_REQUESTS, DURATIONS = 300, 3000, 20
"""Requests of a draw: as many as come in so many times the duration of a request alone, within these limits."""

ALIKE_IN_MEMORY = 1.1

NEGLIGIBLE = 1e-3
"""A share of time in which reloads are under way that is not looked at."""


@dataclass(frozen=True)
class Outcome:
    """The result of one option in one draw. `goodput`: requests a second that meet every service level; `latency_ms` of
    the median request; `counts`: by adapter, the number of its requests that met them, and of all."""

    goodput: float
    latency_ms: float
    ttft_ms: float
    counts: Mapping[int, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One option under the plan. Computed values are None if it does not fit.

    `hottest` and `coldest`: the share of requests within the service levels, of the most popular adapter and of the
    less popular half of them. `within`: the share of adapters with 95 % of their requests within. `reload_s`: from a
    new version of an adapter to its first answer, by the median. `chosen`: the share of draws in which the rule chooses
    it.
    """

    option: Option
    fits: bool
    memory_bytes: int
    goodput: Interval | None = None
    latency_ms: Interval | None = None
    ttft_ms: Interval | None = None
    hottest: Interval | None = None
    coldest: Interval | None = None
    within: float | None = None
    reload_s: float
    reloading: float
    """The share of time in which some adapter is reloaded; 1 is more than the machine keeps up with."""
    chosen: float = 0.0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """All options of a plan. `best` wins in most draws; it is `sure` if SURE of them agree on its kind."""

    traffic: Traffic
    space: Room
    options: tuple[Judged, ...]
    best: Judged | None
    sure: bool
    rivals: tuple[Judged, ...]
    """Where it is not sure: what other draws take."""
    requests: int
    draws: int


def evaluate(speeds: Speeds, traffic: Traffic, draws: int = DRAWS, seed: int = 0) -> Evaluated:
    """Judge every option of a plan. Raises BadInput if the plan names no memory."""
    if traffic.memory_bytes <= 0:
        raise BadInput("the plan says no memory", "add memory=24GB to --plan")
    space = ways.room(speeds, traffic)
    every = ways.options(traffic.adapters, space)
    fitting = [option for option in every if space.fits(option)]
    drawn = draws_of(speeds, draws, seed)
    n = requests_of(traffic, drawn)
    outcomes: dict[Option, list[Outcome]] = {option: [] for option in fitting}
    choices: list[Option | None] = []
    for number, times in enumerate(drawn):
        due = requests(traffic, n, seed + number)
        this = {option: outcome(option, times, speeds.rows, traffic, space, due) for option in fitting}
        for option, value in this.items():
            outcomes[option].append(value)
        choices.append(choose(this, space))
    judged = [_judged(option, outcomes.get(option, []), choices, speeds, traffic, space) for option in every]
    best, rivals = _best(judged)
    sure = best is not None and sum(j.chosen for j in judged if j.option.family == best.option.family) >= SURE
    return Evaluated(
        traffic=traffic,
        space=space,
        options=tuple(judged),
        best=best,
        sure=sure,
        rivals=() if sure else rivals,
        requests=n,
        draws=draws,
    )


# ---- one draw ----------------------------------------------------------------------------------


def draws_of(speeds: Speeds, draws: int, seed: int) -> list[Drawn]:
    """Bootstrap replicates of the measurements."""
    import numpy as np

    rng = np.random.default_rng([seed, 6])
    return [resampled(speeds, rng) for _ in range(draws)]


def requests_of(traffic: Traffic, drawn: Sequence[Drawn]) -> int:
    """The number of requests in a draw: enough for queues to fill."""
    costs = drawn[0].apart
    alone = costs.prefill(1, traffic.prompt_tokens) + costs.step(1, 1) * traffic.new_tokens
    wanted = round(DURATIONS * alone * traffic.rps)
    return min(max(wanted, FEWEST_REQUESTS), MOST_REQUESTS)


def requests(traffic: Traffic, n: int, seed: int) -> list[Due]:
    """So many requests of a plan, in the order of time. A seed gives the same arrivals for any number of adapters and
    any skew. The more skewed, the more popular is the adapter of each request."""
    import numpy as np

    times = arrivals.arrivals("poisson", traffic.rps, n, seed)
    weights = {str(place): 1.0 for place in range(traffic.adapters)}
    adapters = map(int, arrivals.mix(weights, "zipf", n, seed, traffic.zipf))
    picks = np.random.default_rng([seed, 5]).integers(0, len(traffic.lengths), n)
    lengths = [traffic.lengths[pick] for pick in picks]
    return [Due(at, adapter, *pair) for at, adapter, pair in zip(times, adapters, lengths, strict=True)]


def outcome(option: Option, drawn: Drawn, rows: int, traffic: Traffic, space: Room, due: Sequence[Due]) -> Outcome:
    """The result of an option, while it serves and while adapters are reloaded, each for its share of the time."""
    still = measured(ways.serve(option, drawn, rows, traffic.gpus, due), traffic)
    merging = merging_share(option, drawn, traffic)
    loading = loading_share(option, drawn, traffic)
    goodput = still.goodput
    if merging > NEGLIGIBLE:
        goodput += merging * (while_merging(option, drawn, rows, traffic, space, due) - goodput)
    return replace(still, goodput=goodput * (1 - loading))


def measured(answered: Sequence[Request], traffic: Traffic) -> Outcome:
    """The result for requests, simulated or real; requests are named by their adapter's place, in the order of time."""
    start, end = answered[0].scheduled, answered[-1].scheduled
    settled = [request for request in answered if request.scheduled >= start + SETTLING * (end - start)]
    met = [meets(request, traffic.slos) for request in settled]
    counts: dict[int, tuple[int, int]] = {}
    for request, good in zip(settled, met, strict=True):
        before = counts.get(int(request.model), (0, 0))
        counts[int(request.model)] = (before[0] + good, before[1] + 1)
    return Outcome(
        goodput=traffic.rps * sum(met) / len(met),
        latency_ms=stats.median([request.request_duration_ms for request in settled]),
        ttft_ms=stats.median([ttft for request in settled if (ttft := request.ttft_ms) is not None]),
        counts=counts,
    )


def meets(request: Request, slos: Sequence[Slo]) -> bool:
    """Whether a request meets every service level."""
    return all(slo.met(request) for slo in slos)


# ---- reloads -----------------------------------------------------------------------------------


def merging_share(option: Option, drawn: Drawn, traffic: Traffic) -> float:
    """The share of time in which a new version is merged and its engine starts, on each device; at most 1."""
    seconds = option.merged / traffic.gpus * (drawn.merge_s + drawn.start_s)
    return min(1.0, traffic.reloads_per_s * seconds)


def loading_share(option: Option, drawn: Drawn, traffic: Traffic) -> float:
    """The share of time in which an engine loads an adapter and computes nothing; at most 1. Requests that arrive then
    count as too late."""
    return min(1.0, traffic.reloads_per_s * option.apart * drawn.load_s)


def while_merging(option: Option, drawn: Drawn, rows: int, traffic: Traffic, space: Room, due: Sequence[Due]) -> float:
    """Goodput while a merge, or the start of an engine, computes beside the engines. Without room for a second copy,
    the old one ends first, and a merged adapter's share of requests is lost."""
    beside = measured(ways.serve(option, drawn, rows, traffic.gpus, due, others=1), traffic).goodput
    if space.spare(option):
        return beside
    merged = sum(request.adapter < option.merged for request in due) / len(due)
    return beside * (1 - merged / option.merged)


# ---- the rule ----------------------------------------------------------------------------------


def choose(outcomes: Mapping[Option, Outcome], space: Room) -> Option | None:
    """The rule's choice (see this module); None if no option has any goodput."""
    best = max((value.goodput for value in outcomes.values()), default=0.0)
    if best <= 0:
        return None
    near = [option for option, value in outcomes.items() if value.goodput * FREE >= best]
    least = min(space.needed(option) for option in near)
    small = [option for option in near if space.needed(option) <= least * ALIKE_IN_MEMORY]
    fastest = min(outcomes[option].latency_ms for option in small)
    quick = [option for option in small if outcomes[option].latency_ms <= fastest * FREE]
    return min(quick, key=space.needed)


def _best(judged: Sequence[Judged]) -> tuple[Judged | None, tuple[Judged, ...]]:
    """The favourite option of the kind that most draws take, and that of each other kind that any takes."""
    families: Counter[str] = Counter()
    for each in judged:
        families[each.option.family] += round(1e6 * each.chosen)
    taken = [family for family, share in families.most_common() if share]
    favourites = [max((j for j in judged if j.option.family == f), key=lambda j: j.chosen) for f in taken]
    return (favourites[0], tuple(favourites[1:])) if favourites else (None, ())


# ---- all draws ---------------------------------------------------------------------------------


def _judged(
    option: Option,
    outcomes: Sequence[Outcome],
    choices: Sequence[Option | None],
    speeds: Speeds,
    traffic: Traffic,
    space: Room,
) -> Judged:
    middle = typical(speeds)
    unserved = Judged(
        option=option,
        fits=False,
        memory_bytes=space.needed(option),
        reload_s=middle.merge_s + middle.start_s if option.merged else middle.load_s,
        reloading=max(merging_share(option, middle, traffic), loading_share(option, middle, traffic)),
    )
    if not outcomes:
        return replace(unserved, why=_why(option, space))
    half = -(-traffic.adapters // 2)
    return replace(
        unserved,
        fits=True,
        goodput=spread([each.goodput for each in outcomes]),
        latency_ms=spread([each.latency_ms for each in outcomes]),
        ttft_ms=spread([each.ttft_ms for each in outcomes]),
        hottest=_share(outcomes, lambda adapter: adapter == 0),
        coldest=_share(outcomes, lambda adapter: adapter >= traffic.adapters - half),
        within=_within(outcomes),
        chosen=sum(choice == option for choice in choices) / len(choices),
    )


def _why(option: Option, space: Room) -> str:
    if option.family == "all merged":
        return f"{space.copies} of {option.adapters} merged copies fit"
    return "the engines do not fit"


def _share(outcomes: Sequence[Outcome], wanted: Callable[[int], bool]) -> Interval | None:
    """The share of some adapters' requests that met the service levels, over the draws in which there were any."""
    shares = []
    for each in outcomes:
        counts = [count for adapter, count in each.counts.items() if wanted(adapter)]
        if counts:
            shares.append(sum(met for met, _ in counts) / sum(n for _, n in counts))
    return spread(shares) if shares else None


def _within(outcomes: Sequence[Outcome]) -> float:
    """The share of adapters, of those that were asked at all, of which ATTAINED of the requests met the levels."""
    met: Counter[int] = Counter()
    asked: Counter[int] = Counter()
    for each in outcomes:
        for adapter, (good, n) in each.counts.items():
            met[adapter] += good
            asked[adapter] += n
    return sum(met[adapter] >= ATTAINED * n for adapter, n in asked.items()) / len(asked)


def spread(values: Sequence[float]) -> Interval:
    """The median over draws, and the range of 95 % of them."""
    import numpy as np

    low, middle, high = np.quantile(values, [0.025, 0.5, 0.975], method="closest_observation")
    return Interval(float(middle), float(low), float(high), len(values))
