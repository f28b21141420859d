"""The figures of a variant: everything that was measured of it, by metric name, with its interval. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from peftopt import stats
from peftopt.decision.evidence import FIELDS, Evidence
from peftopt.loadtest import prometheus
from peftopt.metrics import QUANTILES
from peftopt.records import TWIN, Interval, Json, Metric

ENGINE_FIGURES = (
    "compile_time",
    "warm_start",
    "graphs",
    "graph_breaks",
    "recompiles",
    "uncompiled",
    "eager_prompts",
    "gpu_busy",
)
"""What an engine may say of getting ready: seconds, and counts per process; and the share of a request in which
kernels ran on the GPU."""

SERVER_FIGURES = {"queue_ms": "server_queue", "running": "server_batch", "kv_cache": "server_kv_cache"}
"""What a server says of a load on it -> the figure that becomes of it: the mean time of a request in its queue, in ms;
requests in a batch and the share of its key-value cache that is taken, means over a turn."""

READ = {"cpu": "read_bytes_per_s", "cuda": "gpu_read_bytes_per_s"}
"""Device -> what the survey calls the speed of its memory."""


def figures(evidence: Evidence, variant: str, level: float = 0.95) -> Mapping[str, Interval]:
    """Everything that was measured of a variant, by metric name, with intervals at `level`; what was not measured is
    not there. Computed once for each variant and level of one evidence."""
    if (variant, level) not in evidence.figures:
        evidence.figures[variant, level] = _figures(evidence, variant, level)
    return evidence.figures[variant, level]


def _figures(evidence: Evidence, variant: str, level: float) -> dict[str, Interval]:
    found: dict[str, Interval] = {}
    for workload in evidence.plan.recipe.workloads:
        found |= _speed(evidence, variant, workload, level)
    found |= _quality(evidence, variant, level)
    found |= _tasks(evidence, variant, level)
    found |= _footprint(evidence, variant, level)
    return found


def figure(evidence: Evidence, variant: str, metric: Metric, level: float = 0.95) -> Interval | None:
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
    found = {}
    names = ["throughput", *(f"{times}.{q}" for times in ("latency", "ttft", "tpot") for q in QUANTILES)]
    for name in names:
        if value := timed(evidence, variant, Metric(name, workload), level):
            found[f"{name}@{workload}"] = value
    if not evidence.plan.recipe.workloads[workload].loaded and (
        shares := _bandwidth_shares(evidence, variant, requests)
    ):
        found[f"bandwidth@{workload}"] = stats.quantile(shares, 0.5)
    # the baseline's own line is its A/A arm
    source = variant if variant != evidence.baseline else variant + TWIN
    for name, field in (("latency.ratio", "request_duration_ms"), ("cpu.ratio", "cpu_ms")):
        if ratio := evidence.ratio(source, evidence.baseline, workload, field, level):
            found[f"{name}@{workload}"] = ratio
    lengths = evidence.plan.recipe.workloads[workload].lengths
    if lengths == "natural" and (drift := evidence.ratio(source, evidence.baseline, workload, "new_tokens", level)):
        found[f"length.ratio@{workload}"] = drift
    for name, title in SERVER_FIGURES.items():
        told = [account[name] for account in evidence.accounts[variant, workload] if name in account]
        if means := [each["mean"] if isinstance(each, Mapping) else each for each in told]:
            found[f"{title}@{workload}"] = _range(means)
    if filled := [
        share for each in evidence.accounts[variant, workload] if (share := prometheus.fill(each)) is not None
    ]:
        found[f"server_fill@{workload}"] = _range(filled)
    if found_ := evidence.warm_up(variant, workload):
        found[f"warm_up@{workload}"], found[f"first_request@{workload}"] = map(_exactly, found_)
    return found


def _rates(evidence: Evidence, variant: str, workload: str, blocks: int | None) -> list[list[float]]:
    """Tokens per second: of each request, or where they overlap, of each turn. A failed one gave none."""
    together = evidence.plan.recipe.workloads[workload].loaded
    groups = []
    for turns in evidence.launched_turns(variant, workload, blocks):
        if together:
            groups.append([_rate(turn, turn[0].get("turn_ms")) for turn in turns])
        else:
            groups.append([_rate([r], r["request_duration_ms"]) for turn in turns for r in turn])
    return groups


def _rate(requests: Sequence[Mapping[str, Json]], ms: float | None) -> float:
    failed = ms is None or any(r.get("error") for r in requests)
    return 0.0 if failed or ms is None else 1e3 * sum(r["new_tokens"] for r in requests) / ms


def _bandwidth_shares(evidence: Evidence, variant: str, requests: Sequence[Mapping[str, Json]]) -> list[float]:
    """Of each request, the time per token that reading memory alone would take over the time it took."""
    launch = next((v for v in evidence.launches.get(variant, ()) if v.get("device") in READ), {})
    speed = evidence.surveyed.get(READ.get(launch.get("device", ""), ""))
    if not speed or "weight_bytes" not in launch:
        return []
    # on average a step finds the whole prompt in the cache, and half of the answer
    bytes_ = [
        launch["weight_bytes"] + launch["kv_bytes"] * (r["prompt_tokens"] + r["new_tokens"] / 2) for r in requests
    ]
    return [1e3 * b / speed / r["tpot_ms"] for b, r in zip(bytes_, requests, strict=True) if r["tpot_ms"]]


def _quality(evidence: Evidence, variant: str, level: float) -> dict[str, Interval]:
    is_baseline = variant == evidence.baseline
    reference = evidence.rows(evidence.baseline)
    ours = evidence.rows(variant)
    again = evidence.rows(variant, 2) if is_baseline else ours
    if not ours:
        return {}
    n = len(ours)
    found = {
        "accuracy": stats.proportion(sum(r["correct"] for r in ours.values()), n, level),
        "score": stats.mean([r["score"] for r in ours.values()], level),
        "validity": stats.proportion(sum(r["valid"] for r in ours.values()), n, level),
    }
    shared = sorted(again.keys() & reference.keys())
    if not shared:
        return found
    same = sum(again[r]["tokens"] == reference[r]["tokens"] for r in shared)
    found["greedy_match"] = stats.proportion(same, len(shared), level)
    lengths = [again[r]["new_tokens"] for r in shared], [reference[r]["new_tokens"] for r in shared]
    found["length"] = stats.ratio_of_means(*lengths, level)
    scored = [r for r in shared if "kl" in again[r]]
    if not all(math.isfinite(again[r][key]) for r in scored for key in ("kl", "nll")):
        found |= dict.fromkeys(("kl", "top1", "perplexity"), Interval(math.nan, -math.inf, math.inf, len(scored)))
    elif scored:
        tokens = [reference[r]["scored_tokens"] for r in scored]
        found["kl"] = stats.ratio_of_means([again[r]["kl"] for r in scored], tokens, level)
        found["top1"] = stats.ratio_of_means([again[r]["agree"] for r in scored], tokens, level)
        means = [again[r]["kl"] / n for r, n in zip(scored, tokens, strict=True) if n]
        if means:
            found["kl.p95"], found["kl.max"] = stats.quantile(means, 0.95), _most(means)
        if worst := [again[r]["kl_worst"] for r in scored if "kl_worst" in again[r]]:
            found["kl.token"] = _most(worst)
        found["top1.min"] = _exactly(min(again[r]["agree"] / max(n, 1) for r, n in zip(scored, tokens, strict=True)))
        found["perplexity"] = stats.perplexity_ratio(
            [again[r]["nll"] for r in scored], [reference[r]["nll"] for r in scored], tokens, level
        )
    if not is_baseline:
        errors, asked = evidence.critical_errors(variant)
        bad = sum(error.counts for error in errors)
        found["critical_errors"] = Interval(bad / asked, 0.0, stats.upper_bound(bad, asked, (1 + level) / 2), asked)
        worse, better = evidence.flips(variant)
        found["flips"] = stats.proportion(worse, len(shared), level)
        found["flips_worse"] = Interval(worse, worse, worse, len(shared))
        found["flips_better"] = Interval(better, better, better, len(shared))
        found["flips_p"] = _exactly(stats.flips(worse, better))
        if kept := evidence.survival(variant):
            found["delta_survival"] = kept
    return found


def _tasks(evidence: Evidence, variant: str, level: float) -> dict[str, Interval]:
    """Mean scores; of tasks whose rows are right or wrong the exact interval."""
    found = {}
    for name, scores in evidence.tasks[variant].items():
        values = list(scores.values())
        sure = set(values) <= {0.0, 1.0}
        found[name] = stats.proportion(int(sum(values)), len(values), level) if sure else stats.mean(values, level)
    return found


def _footprint(evidence: Evidence, variant: str, level: float) -> dict[str, Interval]:
    found = {}
    if size := evidence.size(variant):
        found["size"] = _exactly(size)
    if launches := evidence.launches.get(variant):
        found["load_time"] = _of_launches([v["model_loading_time"] for v in launches], level)
        if switches := [t for v in launches if (t := v.get("adapter_switch_time")) is not None]:
            found["adapter_switch_time"] = _range(switches)
    for name, key in (
        ("memory", "peak_memory_bytes"),
        ("gpu_memory", "gpu_memory_allocated"),
        ("gpu_memory_allocated", "gpu_memory_allocated"),
        ("gpu_memory_reserved", "gpu_memory_reserved"),
    ):
        if peaks := [v[key] for v in evidence.memory.get(variant, ()) if key in v]:
            found[name] = _of_launches(peaks, level)
    if idle := [
        1 - v["gpu_memory_allocated"] / v["gpu_memory_reserved"]
        for v in evidence.memory.get(variant, ())
        if v.get("gpu_memory_reserved") and "gpu_memory_allocated" in v  # a server's driver tells only the first
    ]:
        found["fragmentation"] = _range(idle)
    for name in ENGINE_FIGURES:
        if seen := [v[name] for v in evidence.engines.get(variant, ()) if name in v]:
            found[name] = _range(seen)
    return found


def _exactly(value: float) -> Interval:
    return Interval(value, value, value, 1)


def _most(values: Sequence[float]) -> Interval:
    worst = max(values)
    return Interval(worst, worst, worst, len(values))


def _amount(groups: Sequence[Sequence[float]], q: float, level: float) -> Interval | None:
    """The quantile of times or rates in groups that share their fate: from too few for a lower bound, it is at least
    nothing."""
    found = stats.quantile_of_groups(groups, q, level)
    return replace(found, low=max(0.0, found.low)) if found.n else None


def _of_launches(values: Sequence[float], level: float) -> Interval:
    """The mean over launches of a time or a size. One launch has no interval: it does not show what the next one
    takes."""
    found = stats.mean(values, level)
    return replace(found, low=max(0.0, found.low))


def _range(values: Sequence[float]) -> Interval:
    """Median and range of a few launches: too few for an interval, so the range is shown as it is."""
    return Interval(stats.median(values), min(values), max(values), len(values), level=math.nan)
