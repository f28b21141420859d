"""The figures of a variant: everything that was measured of it, by metric name, with its interval. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

from peftopt import stats
from peftopt.decision.evidence import FIELDS, Evidence, acceptance_length
from peftopt.decision.index import Field
from peftopt.measurements import Account, Answer, EngineFacts, Launch, Memory, Request, Survey
from peftopt.metrics import METRICS, QUANTILES, REPORTED
from peftopt.records import TWIN, Interval, Metric

RATIOS: Mapping[str, Field] = {"latency.ratio": "request_duration_ms", "cpu.ratio": "cpu_ms"}
"""Metric -> the field of a request that it compares with the baseline's."""

TIMED = ("throughput", *(f"{family}.{q}" for family in ("latency", "ttft", "tpot") for q in QUANTILES))
"""The metrics that are quantiles of times, and the rate."""

READ: Mapping[str, Callable[[Survey], float | None]] = {
    "cpu": lambda survey: survey.read_bytes_per_s,
    "cuda": lambda survey: survey.gpu_read_bytes_per_s,
}
"""Device -> how fast its memory is read."""


def figures(evidence: Evidence, variant: str, level: float = 0.95) -> Mapping[str, Interval]:
    """Everything that was measured of a variant, by metric name, with intervals at `level`; what was not measured is
    not there. Computed once for each variant and level of one evidence."""
    if (variant, level) not in evidence.figures:
        evidence.figures[variant, level] = _figures(evidence, variant, level)
    return evidence.figures[variant, level]


def _figures(evidence: Evidence, variant: str, level: float) -> dict[str, Interval]:
    values: dict[str, Interval] = {}
    for workload in evidence.plan.recipe.workloads:
        values |= _speed(evidence, variant, workload, level)
    values |= _quality(evidence, variant, level)
    values |= _tasks(evidence, variant, level)
    values |= _footprint(evidence, variant, level)
    return values


def figure(evidence: Evidence, variant: str, metric: Metric, level: float = 0.95) -> Interval | None:
    """One metric of a variant, from `figures`; None where it was not measured."""
    return figures(evidence, variant, level).get(str(metric))


def timed(
    evidence: Evidence, variant: str, metric: Metric, level: float = 0.95, blocks: int | None = None
) -> Interval | None:
    """A quantile of times, or the median rate, over the first `blocks` blocks; requests of a launch share its fate."""
    if metric.name == "throughput":
        return _amount(_rates(evidence, variant, metric.workload, blocks), 0.5, level)
    family, _, name = metric.name.rpartition(".")
    return _amount(evidence.samples(variant, metric.workload, FIELDS[family], blocks), QUANTILES[name], level)


def _speed(evidence: Evidence, variant: str, workload: str, level: float) -> dict[str, Interval]:
    requests = evidence.requests(variant, workload)
    if not requests:
        return {}
    asked = evidence.plan.recipe.workloads[workload]
    values: dict[str, Interval | None] = {
        name: timed(evidence, variant, Metric(name, workload), level) for name in TIMED
    }
    if not asked.loaded:
        shares = _bandwidth_shares(evidence, variant, requests)
        values["bandwidth"] = stats.quantile(shares, 0.5) if shares else None
    # the baseline's own line is its A/A arm
    source = variant if variant != evidence.baseline else variant + TWIN
    for name, field in RATIOS.items():
        values[name] = evidence.ratio(source, evidence.baseline, workload, field, level)
    if asked.lengths == "natural":
        values["length.ratio"] = evidence.ratio(source, evidence.baseline, workload, "new_tokens", level)
    if told := [request for request in requests if request.steps]:
        values["acceptance_length"] = acceptance_length(told, level)
        proposed = [request.proposed or 0 for request in told]
        if any(proposed):
            values["acceptance"] = stats.ratio_of_means([request.accepted or 0 for request in told], proposed, level)
    values["reused"] = evidence.reused(variant, workload, level)
    values |= _read(evidence, variant, workload, level)
    warm_up = evidence.warm_up(variant, workload)
    if warm_up:
        slow_requests, first_request = warm_up
        values["warm_up"] = _exactly(slow_requests)
        values["first_request"] = _exactly(first_request)
    return {f"{name}@{workload}": value for name, value in values.items() if value}


def _rates(evidence: Evidence, variant: str, workload: str, blocks: int | None) -> list[list[float]]:
    """Tokens per second: of each request, or where they overlap, of each turn. A failed one gave none."""
    together = evidence.plan.recipe.workloads[workload].loaded
    groups = []
    for turns in evidence.launched_turns(variant, workload, blocks):
        if together:
            groups.append([_rate(turn, turn[0].turn_ms) for turn in turns])
        else:
            groups.append([_rate([r], r.request_duration_ms) for turn in turns for r in turn])
    return groups


def _rate(requests: Sequence[Request], ms: float | None) -> float:
    if ms is None or any(request.error for request in requests):
        return 0.0
    return 1e3 * sum(request.new_tokens for request in requests) / ms


def _bandwidth_shares(evidence: Evidence, variant: str, requests: Sequence[Request]) -> list[float]:
    """Of each request, the time per token that reading memory alone would take over the time it took."""
    launch = next((launch for launch in evidence.launches.get(variant, ()) if launch.device in READ), None)
    if launch is None or launch.weight_bytes is None or evidence.surveyed is None:
        return []
    speed = READ[launch.device](evidence.surveyed)
    if not speed:
        return []
    shares = []
    for request in requests:
        if request.prompt_tokens is None or not request.tpot_ms:
            continue
        # on average a step finds the whole prompt in the cache, and half of the answer
        cached = request.prompt_tokens + request.new_tokens / 2
        bytes_ = launch.weight_bytes + launch.kv_bytes * cached
        shares.append(1e3 * bytes_ / speed / request.tpot_ms)
    return shares


def _quality(evidence: Evidence, variant: str, level: float) -> dict[str, Interval]:
    is_baseline = variant == evidence.baseline
    reference = evidence.rows(evidence.baseline)
    ours = evidence.rows(variant)
    again = evidence.rows(variant, 2) if is_baseline else ours
    if not ours:
        return {}
    n = len(ours)
    values = {
        "accuracy": stats.proportion(sum(answer.correct for answer in ours.values()), n, level),
        "score": stats.mean([answer.score for answer in ours.values()], level),
    }
    quality = evidence.plan.recipe.quality
    if quality and quality.tells_valid:
        values["validity"] = stats.proportion(sum(answer.valid for answer in ours.values()), n, level)
    shared = sorted(again.keys() & reference.keys())
    if not shared:
        return values
    same = sum(again[row].tokens == reference[row].tokens for row in shared)
    values["greedy_match"] = stats.proportion(same, len(shared), level)
    lengths = [again[row].new_tokens for row in shared]
    reference_lengths = [reference[row].new_tokens for row in shared]
    values["length"] = stats.ratio_of_means(lengths, reference_lengths, level)
    values |= _divergence([(again[row], reference[row]) for row in shared], level)
    if not is_baseline:
        values |= _changes(evidence, variant, len(shared), level)
    return values


def _changes(evidence: Evidence, variant: str, shared: int, level: float) -> dict[str, Interval]:
    """Answers that are another than the baseline's, of so many that both gave."""
    errors, asked = evidence.critical_errors(variant)
    bad = sum(error.counts for error in errors)
    worse, better = evidence.flips(variant)
    values = {
        "critical_errors": Interval(bad / asked, 0.0, stats.upper_bound(bad, asked, (1 + level) / 2), asked),
        "flips": stats.proportion(worse, shared, level),
        "flips_worse": Interval(worse, worse, worse, shared),
        "flips_better": Interval(better, better, better, shared),
        "flips_p": _exactly(stats.flips(worse, better)),
    }
    survival = evidence.survival(variant)
    if survival:
        values["delta_survival"] = survival
    return values


def _divergence(pairs: Sequence[tuple[Answer, Answer]], level: float) -> dict[str, Interval]:
    """How far predictions are from the reference's, of answers beside the reference's own; {} where none is scored."""
    scored = [(ours, theirs) for ours, theirs in pairs if None not in (ours.kl, ours.nll, ours.agree, theirs.nll)]
    if not scored:
        return {}
    kl = _told(ours.kl for ours, _ in scored)
    nll = _told(ours.nll for ours, _ in scored)
    if not all(map(math.isfinite, (*kl, *nll))):
        return dict.fromkeys(("kl", "top1", "perplexity"), Interval(math.nan, -math.inf, math.inf, len(scored)))
    agree = _told(ours.agree for ours, _ in scored)
    before = _told(theirs.nll for _, theirs in scored)
    tokens = [theirs.scored_tokens for _, theirs in scored]
    values = {
        "kl": stats.ratio_of_means(kl, tokens, level),
        "top1": stats.ratio_of_means(agree, tokens, level),
    }
    means = [each / n for each, n in zip(kl, tokens, strict=True) if n]
    if means:
        values["kl.p95"] = stats.quantile(means, 0.95)
        values["kl.max"] = _most(means)
    worst = _told(ours.kl_worst for ours, _ in scored)
    if worst:
        values["kl.token"] = _most(worst)
    values["top1.min"] = _exactly(min(each / max(n, 1) for each, n in zip(agree, tokens, strict=True)))
    values["perplexity"] = stats.perplexity_ratio(nll, before, tokens, level)
    return values


def _tasks(evidence: Evidence, variant: str, level: float) -> dict[str, Interval]:
    """Mean scores; of tasks whose rows are right or wrong the exact interval."""
    means = {}
    for name, scores in evidence.tasks[variant].items():
        values = list(scores.values())
        if set(values) <= {0.0, 1.0}:
            means[name] = stats.proportion(int(sum(values)), len(values), level)
        else:
            means[name] = stats.mean(values, level)
    return means


def _footprint(evidence: Evidence, variant: str, level: float) -> dict[str, Interval]:
    size = evidence.size(variant)
    on_disk = {"size": _exactly(size)} if size else {}
    return on_disk | _virtual(evidence, variant) | _read(evidence, variant, "", level)


def _virtual(evidence: Evidence, variant: str) -> dict[str, Interval]:
    """Of a variant that has virtual tokens, how many, and what their keys and values take of a sequence's cache."""
    launch = next(iter(evidence.launches.get(variant, ())), None)
    known = {"virtual_tokens": launch.virtual_tokens, "prompt_kv": launch.prompt_kv_bytes} if launch else {}
    return {name: _exactly(value) for name, value in known.items() if value is not None}


def _read(evidence: Evidence, variant: str, workload: str, level: float) -> dict[str, Interval]:
    """What is read off the records of probes as it is, of a workload or of the whole variant ("")."""
    records: Mapping[str, Sequence[Launch | Memory | EngineFacts | Account]] = {
        "launch": evidence.launches.get(variant, ()),
        "memory": evidence.memory.get(variant, ()),
        "engine": evidence.engines.get(variant, ()),
        "server": evidence.accounts.get((variant, workload), ()),
    }
    intervals = {}
    for name, spec in {**METRICS, **REPORTED}.items():
        if not spec.reads or spec.per_workload != bool(workload):
            continue
        source, _, field = spec.reads.partition(".")
        values = _told(map(attrgetter(field), records[source]))
        if values:
            judged = name in METRICS or spec.unit == "bytes"
            intervals[name] = _of_launches(values, level) if judged else _range(values)
    return intervals


def _told(values: Iterable[float | None]) -> list[float]:
    """Those of the values that are known."""
    return [value for value in values if value is not None]


def _exactly(value: float) -> Interval:
    return Interval(value, value, value, 1)


def _most(values: Sequence[float]) -> Interval:
    worst = max(values)
    return Interval(worst, worst, worst, len(values))


def _amount(groups: Sequence[Sequence[float]], q: float, level: float) -> Interval | None:
    """The quantile of times or rates in groups that share their fate: from too few for a lower bound, it is at least
    nothing."""
    quantile = stats.quantile_of_groups(groups, q, level)
    return replace(quantile, low=max(0.0, quantile.low)) if quantile.n else None


def _of_launches(values: Sequence[float], level: float) -> Interval:
    """The mean over launches of a time or a size. One launch has no interval: it does not show what the next one
    takes."""
    mean = stats.mean(values, level)
    return replace(mean, low=max(0.0, mean.low))


def _range(values: Sequence[float]) -> Interval:
    """Median and range of a few launches: too few for an interval, so the range is shown as it is."""
    return Interval(stats.median(values), min(values), max(values), len(values), level=math.nan)
