"""The dashboard: what users wait for beside the limits, what the engine does, which versions answer. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from peftopt.deploy.monitoring.limits import error_share, shares, watched
from peftopt.deploy.monitoring.panels import SCHEMA, Note, Panel, Query, Row, laid_out, marks, variables
from peftopt.deploy.monitoring.sources import Source, percent
from peftopt.records import JsonValue
from peftopt.watch.promise import Promise
from peftopt.watch.spans import Time

EVERY = "$__rate_interval"
TITLES: dict[Time, str] = {"latency": "Latency", "ttft": "Time to first token", "tpot": "Time per token"}


def dashboard(promise: Promise, source: Source) -> str:
    """JSON that Grafana imports."""
    rows = [_users(promise, source)]
    rows += _gateway(promise) if source.name == "gateway" else [_vllm()]
    by = f"{promise.run}/{promise.variant}/{source.name}"
    value: JsonValue = {
        "uid": "peftopt-" + hashlib.sha256(by.encode()).hexdigest()[:12],
        "title": f"peftopt: {promise.variant} of {promise.run}",
        "description": f"What the run {promise.run} decided on {promise.variant}, beside what {source.name} tells.",
        "tags": ["peftopt", source.name],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "",
        "templating": variables(source.by, source.requests),
        "annotations": marks(_notes(source)),
        "panels": laid_out(rows),
    }
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _chosen(source: Source) -> str:
    return f'{source.by}=~"${source.by}"'


def _sum(expr: str, by: str) -> str:
    return f"sum by ({by}) (rate({expr}[{EVERY}]))"


def _limit(value: float, name: str) -> Query:
    return Query(f"vector({value:.6g})", name, limit=True)


# ---- users: the same for both sources ----------------------------------------------------------


def _users(promise: Promise, source: Source) -> Row:
    panels = [_over(promise, source)] if watched(promise, source) else []
    times: tuple[Time, ...] = ("latency", "ttft", "tpot")
    panels += [_times(promise, source, time) for time in times]
    return Row("What users wait for", (*panels, _requests(promise, source), _tokens(source), _errors(promise, source)))


def _over(promise: Promise, source: Source) -> Panel:
    queries: list[Query] = []
    for bound in watched(promise, source):
        name = f"{{{{{source.by}}}}} {bound.name}"
        queries.append(Query(source.over(bound, EVERY, _chosen(source)), name))
    allowed = {bound.share for bound in watched(promise, source)}
    queries += [_limit(share, f"allowed: {percent(share)}") for share in sorted(allowed)]
    return Panel(
        "Requests over a limit",
        "percentunit",
        tuple(queries),
        "The share of answered requests that took longer than a limit of the run. Alerts are on this.",
    )


def _times(promise: Promise, source: Source, time: Time) -> Panel:
    bucket = f"{source.times[time]}_bucket{{{_chosen(source)}}}"
    queries = [
        Query(f"histogram_quantile({q:g}, {_sum(bucket, f'le, {source.by}')})", f"{{{{{source.by}}}}} P{100 * q:g}")
        for q in (0.5, 0.95)
    ]
    bounds = [*promise.sla, *promise.drift]
    queries += [_limit(bound.bound_s, bound.name) for bound in bounds if bound.time == time]
    about = "Quantiles are between the bounds of buckets; dashed: limits, and what the run had when it was decided."
    return Panel(f"{TITLES[time]}, P50 and P95", "s", tuple(queries), about)


def _requests(promise: Promise, source: Source) -> Panel:
    queries = [Query(_sum(f"{source.requests}{{{_chosen(source)}}}", source.by), f"{{{{{source.by}}}}}")]
    if promise.rate:
        queries.append(_limit(promise.rate, "the limits held up to"))
    return Panel("Requests", "reqps", tuple(queries), "With those that failed or were refused.")


def _tokens(source: Source) -> Panel:
    chosen = _chosen(source)
    if source.name == "vllm":
        new, prompt = f"vllm:generation_tokens_total{{{chosen}}}", f"vllm:prompt_tokens_total{{{chosen}}}"
    else:
        new, prompt = (f'peftopt_tokens_total{{kind="{kind}",{chosen}}}' for kind in ("new", "prompt"))
    queries = [
        Query(_sum(new, source.by), f"{{{{{source.by}}}}} new"),
        Query(_sum(prompt, source.by), f"{{{{{source.by}}}}} prompt"),
    ]
    return Panel("Throughput in tokens/s", "none", tuple(queries))


def _errors(promise: Promise, source: Source) -> Panel:
    kinds = [kind for each in shares(promise, source).values() for kind in each]
    share = error_share(source, kinds, EVERY, _chosen(source))
    queries = [Query(share, f"{{{{{source.by}}}}} {{{{{source.kind}}}}}")]
    queries += [_limit(share, f"allowed of each: {percent(share)}") for share in shares(promise, source)]
    return Panel("Errors by kind", "percentunit", tuple(queries), "The share of all requests; oom is out of memory.")


# ---- the gateway's -----------------------------------------------------------------------------


def _gateway(promise: Promise) -> Sequence[Row]:
    chosen = 'adapter=~"$adapter"'
    queued = _sum(f"peftopt_queue_time_seconds_bucket{{{chosen}}}", "le, adapter, where")
    waits = Panel(
        "Queue time, P95",
        "s",
        (
            Query(
                f"histogram_quantile(0.95, {queued})",
                "{{adapter}} {{where}}",
            ),
        ),
        "Waiting at the gateway, and at the engine where that tells.",
    )
    refused = Panel(
        "Refused and given up",
        "reqps",
        (
            Query(_sum(f"peftopt_refused_total{{{chosen}}}", "adapter, reason"), "{{adapter}} refused: {{reason}}"),
            Query(_sum(f"peftopt_cancelled_total{{{chosen}}}", "adapter, by"), "{{adapter}} given up by {{by}}"),
        ),
    )
    held = Panel(
        "At the engine and waiting",
        "none",
        (
            Query("sum by (instance) (peftopt_running)", "running"),
            Query("sum by (instance) (peftopt_waiting)", "waiting"),
            Query('peftopt_limit{what=~"running|waiting"} > 0', "limit: {{what}}"),
            _limit(promise.beside, "at once in the run"),
        ),
    )
    engine = (
        waits,
        refused,
        held,
        _share("Batch fill", "avg by (instance) (peftopt_batch_fill_ratio)", "Requests at the engine of what may run."),
        _share("KV cache in use", "peftopt_kv_cache_usage_ratio"),
        _share("GPU utilization", "peftopt_gpu_utilization_ratio", "Share of time that the GPU was busy, by NVML."),
        Panel(
            "Memory of the engine",
            "bytes",
            (
                Query("peftopt_gpu_memory_reserved_bytes", "{{engine}} reserved ({{source}})"),
                Query("peftopt_gpu_memory_allocated_bytes", "{{engine}} allocated ({{source}})"),
            ),
            "Reserved: what it holds. Allocated: what its tensors have; derived: weights and KV cache in use.",
        ),
        _share("Fragmentation", "peftopt_gpu_memory_fragmentation_ratio", "Of reserved memory, what no tensor has."),
        Panel(
            "Ready and restarts",
            "none",
            (
                Query("peftopt_ready", "ready"),
                Query("increase(peftopt_engine_restarts_total[1h])", "engine restarts in an hour"),
                Query("increase(peftopt_worker_restarts_total[1h])", "worker restarts in an hour"),
                Query("increase(peftopt_log_lost_total[1h])", "lines of the log lost in an hour"),
            ),
        ),
    )
    return (Row("The gateway and its engine", engine), _versions(chosen))


def _share(title: str, expr: str, about: str = "") -> Panel:
    return Panel(title, "percentunit", (Query(expr, "{{instance}} {{engine}}"),), about, most=1.0)


def _versions(chosen: str) -> Row:
    arms = _sum(f"peftopt_ttft_seconds_bucket{{{chosen}}}", "le, adapter, version, arm")
    name = "{{adapter}}@{{version}} {{arm}}"
    return Row(
        "Adapters, versions and arms",
        (
            Panel("Versions", "none", (Query(f"peftopt_adapter_info{{{chosen}}}", ""),), table=True),
            Panel(
                "Share of users",
                "percentunit",
                (Query(f"peftopt_arm_weight{{{chosen}}}", "{{adapter}} {{arm}}"),),
                most=1.0,
            ),
            Panel("Time to first token by version, P95", "s", (Query(f"histogram_quantile(0.95, {arms})", name),)),
            Panel(
                "Requests by version",
                "reqps",
                (Query(_sum(f"peftopt_requests_total{{{chosen}}}", "adapter, version, arm"), name),),
                stacked=True,
            ),
            Panel(
                "Canary answers by verdict",
                "none",
                (
                    Query(
                        f"sum by (adapter, version, verdict) (peftopt_canary_answers_total{{{chosen}}})",
                        "{{adapter}}@{{version}} {{verdict}}",
                    ),
                ),
                "One that is stale or wrong is enough: a version answered with other weights.",
            ),
            Panel(
                "Loading",
                "s",
                (
                    Query(
                        "sum by (adapter) (peftopt_adapter_switch_seconds_sum)\n"
                        "  / sum by (adapter) (peftopt_adapter_switch_seconds_count)",
                        "{{adapter}} switch, mean",
                    ),
                    Query("peftopt_model_loading_seconds", "the engine's start"),
                ),
            ),
        ),
    )


# ---- vLLM's own --------------------------------------------------------------------------------


def _vllm() -> Row:
    chosen = 'model_name=~"$model_name"'
    return Row(
        "The engine",
        (
            Panel(
                "At the engine and waiting",
                "none",
                (
                    Query(f"sum by (model_name) (vllm:num_requests_running{{{chosen}}})", "{{model_name}} running"),
                    Query(f"sum by (model_name) (vllm:num_requests_waiting{{{chosen}}})", "{{model_name}} waiting"),
                ),
            ),
            _share("KV cache in use", f"vllm:kv_cache_usage_perc{{{chosen}}}"),
            Panel(
                "Preempted and turned away",
                "reqps",
                (
                    Query(_sum(f"vllm:num_preemptions_total{{{chosen}}}", "model_name"), "{{model_name}} preempted"),
                    Query(
                        _sum(f"vllm:admission_rejections_total{{{chosen}}}", "model_name, reason"),
                        "{{model_name}} {{reason}}",
                    ),
                ),
                "A preempted request is computed again: the KV cache is too small for the load.",
            ),
            Panel(
                "Adapters that run and wait",
                "none",
                (
                    Query(
                        "vllm:lora_requests_info",
                        "running {{running_lora_adapters}}, waiting {{waiting_lora_adapters}}",
                    ),
                ),
                "By name only: vLLM's times and counters do not tell adapters apart.",
                table=True,
            ),
        ),
    )


def _notes(source: Source) -> list[Note]:
    notes = [
        Note("Alerts", 'ALERTS{alertname=~"Peftopt.*",alertstate="firing",severity="page"}', "{{alertname}}", "red"),
    ]
    if source.name == "gateway":
        live = 'max by (adapter, version, state) (peftopt_adapter_info{state=~"live|canary|doubted"})'
        before = live.replace("})", "} offset 2m)")
        notes.append(Note("Versions", f"{live}\n  unless {before}", "{{adapter}}@{{version}} is {{state}}", "blue"))
    return notes
