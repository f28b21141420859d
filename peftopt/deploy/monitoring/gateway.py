"""Alerts on the gateway's own metrics, beyond the limits of the run. Pure."""

from __future__ import annotations

from peftopt.deploy.monitoring.alerts import ALL, Alert, Series
from peftopt.deploy.monitoring.sources import percent

REFUSED = 0.01
"""Of the requests that may be refused for want of room before somebody should look."""
GROWTH = 1.1
"""The floor of a day's memory against the day before."""
ROOM = ("waiting", "wait", "adapter")
"""Reasons of a refusal that mean: there is more demand than room."""

OF = 'adapter="support",version="v1"'
REQUESTS = f'peftopt_requests_total{{{OF},arm="live",code="200"}}'
OOM = f'peftopt_errors_total{{{OF},arm="live",kind="oom"}}'
REFUSALS = 'peftopt_refused_total{adapter="support",reason="wait"}'
INFO = f'peftopt_adapter_info{{{OF},state="live"}}'
RESERVED = 'peftopt_gpu_memory_reserved_bytes{source="nvml"}'
ALLOCATED = 'peftopt_gpu_memory_allocated_bytes{source="engine"}'


def healthy(samples: int) -> Series:
    """Series of a gateway at which nothing is wrong."""
    return {
        "peftopt_ready": f"1+0x{samples}",
        "peftopt_engine_restarts_total": f"0+0x{samples}",
        "peftopt_worker_restarts_total": f"0+0x{samples}",
        "peftopt_log_lost_total": f"0+0x{samples}",
        INFO: f"1+0x{samples}",
        f'peftopt_canary_answers_total{{{OF},verdict="own"}}': f"8+0x{samples}",
        REQUESTS: f"0+{ALL}x{samples}",
    }


def alerts() -> list[Alert]:
    """All of them. An event that makes a new series is heard at its first sample, which increase() would miss."""
    return [*_answers(), *_life(), _refused(), *_memory(), *_lost()]


def _new(series: str, by: str) -> str:
    """It has grown within the hour, or was not there an hour ago."""
    return (
        f"sum by ({by}) (increase({series}[1h])) > 0\n"
        f"  or sum by ({by}) ({series}) > 0 unless sum by ({by}) ({series} offset 1h)"
    )


def _answers() -> list[Alert]:
    """One answer with other weights is enough, and one out-of-memory. A version that was rejected at its check has
    answered no user, and is not loaded any more."""
    wrong = _new('peftopt_canary_answers_total{verdict=~"stale|wrong"}', "adapter, version, verdict")
    loaded = 'peftopt_adapter_info{state!="loading"}'
    gone = f'(peftopt_canary_answers_total{{version!=""}} unless on (adapter, version) {loaded})'
    told = f'peftopt_canary_answers_total{{{OF},verdict="wrong"}}'
    return [
        Alert(
            name="PeftoptWrongAdapter",
            severity="page",
            expr=f"({wrong})\n  unless on (adapter, version) {gone}",
            summary="{{ $labels.adapter }}@{{ $labels.version }} answers with other weights: {{ $labels.verdict }}",
            description=(
                "An answer to a canary prompt was not this version's own, so users may get another adapter's answers. "
                "peftopt adapters list shows the versions, peftopt adapters rollback NAME goes back."
            ),
            fires={told: "_x160 1+0x100"},
            silent={told: "_x160 1+0x100", INFO: None},
        ),
        Alert(
            name="PeftoptOutOfMemory",
            severity="ticket",
            expr=_new('peftopt_errors_total{kind="oom"}', "adapter, version"),
            summary="{{ $labels.adapter }}@{{ $labels.version }} ran out of memory",
            description=(
                "The engine had no memory left for a request. Compare prompt lengths and requests at once with those "
                "of the run, and memory reserved with the GPU's."
            ),
            fires={OOM: "_x160 1+0x100"},
            silent={OOM.replace("oom", "upstream"): "_x160 1+0x100"},
        ),
    ]


def _life() -> list[Alert]:
    restarts = "peftopt_engine_restarts_total"
    return [
        Alert(
            name="PeftoptNotReady",
            severity="page",
            expr="peftopt_ready == 0",
            hold="15m",
            summary="the gateway {{ $labels.instance }} is not ready",
            description=(
                "An engine starts, or an adapter does not answer as itself, and no request is answered. A start takes "
                "up to 12 samples. /health/ready and the gateway's standard error say what it waits for."
            ),
            fires={"peftopt_ready": "1+0x120 0+0x100"},
            silent={"peftopt_ready": "1+0x120 0+0x9 1+0x100"},
        ),
        Alert(
            name="PeftoptNoMetrics",
            severity="page",
            expr="absent(peftopt_ready)",
            hold="5m",
            summary="no gateway tells its metrics",
            description=(
                "Prometheus has no gateway to read. Is it running, is it in scrape_configs, and may Prometheus read "
                "/metrics there? With --keys it needs --metrics users."
            ),
            fires={"peftopt_ready": None},
            silent={"peftopt_ready": "0+0x300"},
        ),
        Alert(
            name="PeftoptEngineRestarted",
            severity="ticket",
            expr=f"increase({restarts}[1h]) > 0",
            summary="the engine of {{ $labels.instance }} died and was started again",
            description="Requests broke off, and nobody was answered while it started. engine.log says why it died.",
            fires={restarts: "0+0x150 1+0x100"},
            silent={restarts: "1+0x300"},
        ),
        Alert(
            name="PeftoptEngineCrashLoops",
            severity="page",
            expr=f"increase({restarts}[1h]) > 2.5",
            summary="the engine of {{ $labels.instance }} dies again and again",
            description="It was started again three times within an hour. engine.log says why it dies.",
            fires={restarts: "0+0x130 1+0x10 2+0x10 3+0x100"},
            silent={restarts: "0+0x130 1+0x10 2+0x200"},
        ),
        Alert(
            name="PeftoptWorkerRestarted",
            severity="ticket",
            expr="increase(peftopt_worker_restarts_total[1h]) > 0",
            summary="a worker of {{ $labels.instance }} died and was started again",
            description="Its requests broke off. The gateway's standard error says why it died.",
            fires={"peftopt_worker_restarts_total": "0+0x150 1+0x100"},
            silent={"peftopt_worker_restarts_total": "1+0x300"},
        ),
    ]


def _refused() -> Alert:
    of, every = f'peftopt_refused_total{{reason=~"{"|".join(ROOM)}"}}', "peftopt_requests_total"
    return Alert(
        name="PeftoptRefused",
        severity="ticket",
        expr=f"sum by (adapter) (rate({of}[30m]))\n  / sum by (adapter) (rate({every}[30m])) > {REFUSED}\n"
        f"  and sum by (adapter) (increase({every}[30m])) >= 100",
        hold="10m",
        summary="{{ $labels.adapter }}: {{ $value | humanizePercentage }} of requests are refused for want of room",
        description=(
            "There is more demand than the run was decided on, so the gateway refuses what it could not answer in "
            "time. Add a replica, or measure a higher rate: peftopt load --find-rate."
        ),
        fires={REFUSALS: "0+12x300"},
        silent={REFUSALS: "0+5x300"},
    )


def _memory() -> list[Alert]:
    """By its floor: what is left when the caches of requests are small. Memory that is derived from the KV cache in use
    says nothing of a leak."""
    return [_grows("reserved", RESERVED, ""), _grows("allocated", ALLOCATED, '{source!="derived"}')]


def _grows(what: str, series: str, matcher: str) -> Alert:
    floor = f"min_over_time(peftopt_gpu_memory_{what}_bytes{matcher}[6h]"
    return Alert(
        name="PeftoptMemoryGrows",
        severity="ticket",
        expr=f"{floor}) > {GROWTH} * {floor} offset 1d)",
        hold="1h",
        summary=f"memory {what} on {{{{ $labels.instance }}}} has grown to {{{{ $value | humanize1024 }}}}B in a day",
        description=(
            f"Its floor over six hours is more than {percent(GROWTH - 1)} above that of the day before. Were adapters "
            "added? If not, something is not given back: watch it over adapter switches."
        ),
        labels={"memory": what},
        fires={series: "8e9+1e7x300"},
        silent={series: "8e9+1e6x300"},
        at="2d",
        sample=10,
    )


def _lost() -> list[Alert]:
    return [
        Alert(
            name="PeftoptLogLost",
            severity="ticket",
            expr="increase(peftopt_log_lost_total[15m]) > 0",
            summary="{{ $labels.instance }} loses lines of its log",
            description="The disk of the log is full or cannot be written. peftopt watch --logs misses those requests.",
            fires={"peftopt_log_lost_total": "0+0x100 0+1x100"},
            silent={"peftopt_log_lost_total": "5+0x300"},
        )
    ]
