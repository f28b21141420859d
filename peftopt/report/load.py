"""A load run for people: a line in all, one for each served name, and what the engine says of itself. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from peftopt.loadtest import prometheus
from peftopt.metrics import counted, format_value
from peftopt.records import Interval, Json
from peftopt.report.words import bounded
from peftopt.stats import fewest_for

HEADER = (
    "model",
    "requests",
    "failed",
    "TTFT P50 ms",
    "TTFT P95",
    "TPOT P50",
    "ITL P95",
    "whole P50",
    "whole P95",
    "tokens/s",
    "req/s",
)


def rows(found: Mapping[str, Json]) -> list[list[str]]:
    """The total first, then each served name where there are several."""
    each = found["by_model"] if len(found["by_model"]) > 1 else {}
    return [_row("all" if each else next(iter(found["by_model"]), ""), found["figures"])] + [
        _row(name, values) for name, values in each.items()
    ]


def lines(found: Mapping[str, Json]) -> dict[str, str]:
    """What the table has no room for, by its title."""
    said = {}
    figures, engine = found["figures"], found["engine"]
    if reasons := figures["errors"]:
        said["failures"] = "; ".join(f"{n} x {reason}" for reason, n in list(reasons.items())[:5])
    if "attained" in figures:
        said["service levels"] = f"{' and '.join(figures['slo'])}: {_share(figures['attained'])} of requests"
        if figures["goodput_rate"] is not None:
            said["goodput"] = f"{figures['goodput_rate']:.2f} requests/s that met them all"
    if found["highest_rate"] is not None:
        said["highest rate"] = f"{found['highest_rate']:.3g} requests/s hold, verified by repeats"
    elif found["trials"]:
        said["highest rate"] = "none that was tried holds"
    if found.get("adapters"):
        said["waiting"] = ", ".join(
            f"{counted(size, 'adapter')} {_ms({'wait': wait}, 'wait')} ms"
            for size, wait in enumerate(found["adapters"], 1)
        )
        if None not in found["queues_ms"]:
            said["of it in the queue"] = ", ".join(f"{ms:,.0f} ms" for ms in found["queues_ms"])
        said["cliff"] = (
            f"beyond {found['cliff']}: give the engine more slots (vLLM: --max-loras), or a server fewer adapters"
            if found["cliff"]
            else f"none up to {len(found['adapters'])} adapters"
        )
    colds = {name: v["cold_ttft_ms"] for name, v in found["by_model"].items() if v.get("cold_ttft_ms")}
    if colds:
        said["first request"] = (
            ", ".join(f"{name} {ms:.0f} ms" for name, ms in list(colds.items())[:8]) + " to its first token"
        )
    if "running" in engine or "busy" in engine:
        said["batch"] = _batch(engine)
    if "kv_cache" in engine:
        said["KV cache"] = (
            f"{_percent(engine['kv_cache']['mean'])} on average, {_percent(engine['kv_cache']['peak'])} at most"
        )
    if "waiting" in engine:
        queue = f", {engine['queue_ms']:.1f} ms on average in the queue" if "queue_ms" in engine else ""
        said["queue"] = (
            f"{engine['waiting']['mean']:.1f} waiting on average, {engine['waiting']['peak']:.0f} at most{queue}"
        )
    late = found["own_delay"]
    said["sender's delay"] = (
        f"P50 {late['p50_ms']:.2f} ms, P95 {late['p95_ms']:.2f} ms, at most {late['max_ms']:.1f} ms"
    )
    return said


def _row(name: str, f: Mapping[str, Json]) -> list[str]:
    return [
        name,
        str(f["requests"]),
        str(f["failed"]),
        _ms(f, "ttft_p50_ms"),
        _ms(f, "ttft_p95_ms"),
        _ms(f, "tpot_p50_ms"),
        f"{f['itl_p95_ms']:.1f}" if "itl_p95_ms" in f else "—",
        _ms(f, "latency_p50_ms"),
        _ms(f, "latency_p95_ms"),
        f"{f['output_tokens_per_s']:.1f}" if f["output_tokens_per_s"] else "—",
        f"{f['request_rate']:.2f}" if f["request_rate"] else "—",
    ]


def _batch(engine: Mapping[str, Json]) -> str:
    """Requests in the running batch: of every step where the server counts them, else of the moments it was asked."""
    mean = engine["busy"] if "busy" in engine else engine["running"]["mean"]
    peak = f", {engine['running']['peak']:.0f} at most" if "running" in engine else ""
    share = prometheus.fill(engine)
    fill = "" if share is None else f", {100 * share:.0f} % of {engine['slots']} slots"
    return f"{mean:.1f} requests on average{peak}{fill}"


def _ms(f: Mapping[str, Json], name: str) -> str:
    """A quantile with its interval; a P95 of too few requests says so."""
    value: Interval | None = f.get(name)
    if value is None:
        return "—"
    if "p95" in name and value.n < fewest_for(0.95):
        return "too few"
    low, estimate, high = (
        format_value("latency.p50", x).removesuffix(" ms") for x in (value.low, value.estimate, value.high)
    )
    if not bounded(value):
        return f"{estimate} (n={value.n})"
    return f"{estimate} ({low}–{high})" if value.high > value.low else estimate


def _share(value: Interval) -> str:
    return f"{_percent(value.estimate)} ({_percent(value.low)}–{_percent(value.high)}, n={value.n})"


def _percent(share: float) -> str:
    return format_value("share", share)
