"""What the metrics of `peftopt serve` say of a span. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from peftopt.loadtest.importers.serve_log import THEIRS
from peftopt.watch.promise import Promise
from peftopt.watch.sources.alike import alike
from peftopt.watch.sources.scrape import Growth, Scrape
from peftopt.watch.spans import Check, Engine, Time, Traffic

TIMES: Mapping[Time, str] = {
    "latency": "peftopt_request_duration_seconds",
    "ttft": "peftopt_ttft_seconds",
    "tpot": "peftopt_tpot_seconds",
}
WORKED = "peftopt_generation_latency_seconds_sum"
REQUESTS, TOKENS = "peftopt_requests_total", "peftopt_tokens_total"
ERRORS, REFUSED, CHECKS = "peftopt_errors_total", "peftopt_refused_total", "peftopt_canary_answers_total"
RUNNING, WAITING, FILL = "peftopt_running", "peftopt_waiting", "peftopt_batch_fill_ratio"
KV_USAGE = "peftopt_kv_cache_usage_ratio"
ALLOCATED, RESERVED = "peftopt_gpu_memory_allocated_bytes", "peftopt_gpu_memory_reserved_bytes"
FRAGMENTATION, UTILIZATION = "peftopt_gpu_memory_fragmentation_ratio", "peftopt_gpu_utilization_ratio"
SWITCHES = "peftopt_adapter_switch_seconds_count"
OVERHEAD = "peftopt_gateway_overhead_seconds_count"

NAMES = (
    *(f"{name}{ending}" for name in TIMES.values() for ending in ("_bucket", "_count")),
    *(WORKED, REQUESTS, TOKENS, ERRORS, REFUSED, CHECKS, RUNNING, WAITING, FILL, KV_USAGE, ALLOCATED, RESERVED),
    *(FRAGMENTATION, UTILIZATION, SWITCHES, OVERHEAD),
)
"""The samples that are read."""

VERDICTS: tuple[Literal["own", "stale", "wrong", "unclear"], ...] = ("own", "stale", "wrong", "unclear")


def is_there(look: Scrape) -> bool:
    """Whether a gateway's metrics are among them."""
    return RUNNING in look.by_name


def traffic(grown: Growth, before: Scrape, after: Scrape, promise: Promise) -> dict[str, Traffic]:
    """What each adapter's users saw. Lengths of single requests are not known. Tokens of failed requests are among the
    others': there are more of them, never fewer."""
    running = [look.total(RUNNING) for look in (before, after)]
    busy = grown.total(WORKED) / (after.at - before.at)
    adapters = dict.fromkeys(
        name for metric in (REQUESTS, REFUSED, CHECKS) for name, n in grown.by(metric, "adapter").items() if name and n
    )
    return {name: _of_adapter(grown, after, name, [*running, busy], promise) for name in adapters}


def _of_adapter(grown: Growth, after: Scrape, adapter: str, running: list[float | None], promise: Promise) -> Traffic:
    times = {time: grown.buckets(name, adapter=adapter) for time, name in TIMES.items()}
    answered = times["latency"].n
    prompts = grown.total(TOKENS, adapter=adapter, kind="prompt")
    errors = {kind: round(n) for kind, n in grown.by(ERRORS, "kind", adapter=adapter).items()}
    counted = {kind: n for kind, n in errors.items() if n and kind not in THEIRS}
    return Traffic(
        answered=answered,
        times=times,
        alike=alike(times, running, prompts / answered if answered else None, promise),
        errors=counted,
        refused=round(grown.total(REFUSED, adapter=adapter)),
        tokens=round(grown.total(TOKENS, adapter=adapter, kind="new")),
        engine_s=grown.total(WORKED, adapter=adapter),
        checks=_checks(grown, after, adapter),
    )


def _checks(grown: Growth, after: Scrape, adapter: str) -> tuple[Check, ...]:
    """Of the versions that have answered somebody: a `put` that is refused harms no user."""
    answered = {labels["version"] for labels in map(dict, after.by_name.get(REQUESTS, ())) if "version" in labels}
    checks: list[Check] = []
    for version in answered.intersection(grown.by(CHECKS, "version", adapter=adapter)):
        which = {"adapter": adapter, "version": version}
        for verdict in VERDICTS:
            checks += [Check(version, verdict)] * round(grown.total(CHECKS, verdict=verdict, **which))
    return tuple(checks)


def engine(look: Scrape) -> Engine:
    """The engine at the end of a span; of several gateways their sum, and the highest of shares."""
    switches = look.total(SWITCHES)
    return Engine(
        running=look.total(RUNNING),
        waiting=look.total(WAITING),
        batch_fill=look.highest(FILL),
        kv_usage=look.highest(KV_USAGE),
        memory_allocated=look.total(ALLOCATED),
        memory_reserved=look.total(RESERVED),
        gpu_utilization=look.highest(UTILIZATION),
        fragmentation=look.highest(FRAGMENTATION),
        switches=None if switches is None else round(switches),
    )
