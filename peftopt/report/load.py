"""A load run in words: a row in total, a row for each served name, and the engine's own numbers. Pure."""

from __future__ import annotations

from collections.abc import Callable

from peftopt.loadtest.summary import Figures, LoadSummary
from peftopt.measurements import Account, Gauge
from peftopt.metrics import counted, format_value
from peftopt.records import Interval
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


def rows(summary: LoadSummary) -> list[list[str]]:
    """The total first, then each served name if there are several."""
    each = summary.by_model if len(summary.by_model) > 1 else {}
    return [_row("all" if each else next(iter(summary.by_model), ""), summary.figures)] + [
        _row(name, values) for name, values in each.items()
    ]


def lines(summary: LoadSummary) -> dict[str, str]:
    """Further lines below the table, by title."""
    return {
        **_levels(summary.figures),
        **_searched(summary),
        **_cold(summary),
        **_server(summary.engine),
        **_sender(summary),
    }


def _levels(figures: Figures) -> dict[str, str]:
    """Failures, service levels and goodput."""
    texts = {}
    if figures.errors:
        texts["failures"] = "; ".join(f"{n} x {reason}" for reason, n in list(figures.errors.items())[:5])
    if figures.attained:
        texts["service levels"] = f"{' and '.join(figures.slo)}: {_share(figures.attained)} of requests"
        if figures.goodput_rate is not None:
            texts["goodput"] = f"{figures.goodput_rate:.2f} requests/s that met them all"
    return texts


def _searched(summary: LoadSummary) -> dict[str, str]:
    """The highest rate, and the adapter cliff."""
    texts = {}
    if summary.highest_rate is not None:
        texts["highest rate"] = f"{summary.highest_rate:.3g} requests/s hold, verified by repeats"
    elif summary.trials:
        texts["highest rate"] = "none that was tried holds"
    if summary.adapters:
        texts["waiting"] = ", ".join(
            f"{counted(size, 'adapter')} {_ms(wait)} ms" for size, wait in enumerate(summary.adapters, 1)
        )
        queues = [ms for ms in summary.queues_ms if ms is not None]
        if len(queues) == len(summary.queues_ms):
            texts["of it in the queue"] = ", ".join(f"{ms:,.0f} ms" for ms in queues)
        texts["cliff"] = (
            f"beyond {summary.cliff}: give the engine more slots (vLLM: --max-loras), or a server fewer adapters"
            if summary.cliff
            else f"none up to {len(summary.adapters)} adapters"
        )
    return texts


def _cold(summary: LoadSummary) -> dict[str, str]:
    """The TTFT of the first request of each served name."""
    colds = [f"{name} {v.cold_ttft_ms:.0f} ms" for name, v in summary.by_model.items() if v.cold_ttft_ms]
    return {"first request": ", ".join(colds[:8]) + " to its first token"} if colds else {}


def _server(engine: Account) -> dict[str, str]:
    """The server's own numbers."""
    texts = {}
    batch = _batch(engine)
    if batch:
        texts["batch"] = batch
    if engine.kv_cache:
        texts["KV cache"] = f"{_percent(engine.kv_cache.mean)} on average{_peak(engine.kv_cache, _percent)}"
    if engine.waiting:
        queue = "" if engine.queue_ms is None else f", {engine.queue_ms:.1f} ms on average in the queue"
        texts["queue"] = f"{engine.waiting.mean:.1f} waiting on average{_peak(engine.waiting)}{queue}"
    return texts


def _sender(summary: LoadSummary) -> dict[str, str]:
    late = summary.own_delay
    return {"sender's delay": f"P50 {late.p50_ms:.2f} ms, P95 {late.p95_ms:.2f} ms, at most {late.max_ms:.1f} ms"}


def _row(name: str, f: Figures) -> list[str]:
    return [
        name,
        str(f.requests),
        str(f.failed),
        _ms(f.ttft_p50_ms),
        _p95(f.ttft_p95_ms),
        _ms(f.tpot_p50_ms),
        "—" if f.itl_p95_ms is None else f"{f.itl_p95_ms:.1f}",
        _ms(f.latency_p50_ms),
        _p95(f.latency_p95_ms),
        f"{f.output_tokens_per_s:.1f}" if f.output_tokens_per_s else "—",
        f"{f.request_rate:.2f}" if f.request_rate else "—",
    ]


def _batch(engine: Account) -> str:
    """Requests in the running batch: averaged over steps if the server counts them, else over samples."""
    mean = engine.running.mean if engine.busy is None and engine.running else engine.busy
    if mean is None:
        return ""
    peak = _peak(engine.running) if engine.running else ""
    fill = "" if engine.fill is None else f", {100 * engine.fill:.0f} % of {engine.slots} slots"
    return f"{mean:.1f} requests on average{peak}{fill}"


def _peak(gauge: Gauge, shown: Callable[[float], str] = "{:.0f}".format) -> str:
    return "" if gauge.peak is None else f", {shown(gauge.peak)} at most"


def _p95(value: Interval | None) -> str:
    return "too few" if value and value.n < fewest_for(0.95) else _ms(value)


def _ms(value: Interval | None) -> str:
    """A quantile with its interval."""
    if value is None:
        return "—"
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
