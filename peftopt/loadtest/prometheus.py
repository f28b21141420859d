"""An engine's own Prometheus metrics, under the names that several engines give to one thing. Pure."""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from peftopt.measurements import Account, Gauge

GAUGES: Mapping[str, Sequence[str]] = {
    "running": (
        "vllm:num_requests_running",
        "sglang:num_running_reqs",
        "tgi_batch_current_size",
        "llamacpp:requests_processing",
    ),
    "waiting": (
        "vllm:num_requests_waiting",
        "sglang:num_queue_reqs",
        "tgi_queue_size",
        "llamacpp:requests_deferred",
    ),
    "kv_cache": ("vllm:kv_cache_usage_perc", "sglang:token_usage"),
}
"""Requests in the running batch and in the queue; the share of the KV cache that is taken, 0..1."""

BUSY, DECODES = "llamacpp:n_busy_slots_per_decode", "llamacpp:n_decode_total"
"""Requests in a decode step, and how many steps there were, both since the server's start."""

QUEUES = ("vllm:request_queue_time_seconds", "sglang:queue_time_seconds", "tgi_request_queue_duration")
"""Histograms of the seconds that a request waited inside the engine."""

PROPOSED, ACCEPTED = "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"
"""Tokens that were proposed, and that were accepted, both since the server's start."""

_LINE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{.*\})?\s+(\S+)(?:\s+\S+)?")


def totals(text: str) -> dict[str, float]:
    """Metric name -> its value, summed over its label sets (data-parallel engines); what is not a finite number is left
    out.

    Source: prometheus.io/docs/instrumenting/exposition_formats, the text form.
    """
    sums: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        match = None if line.startswith("#") else _LINE.fullmatch(line.strip())
        if match:
            with contextlib.suppress(ValueError):
                value = float(match[2])
                sums[match[1]] += value
    return {name: total for name, total in sums.items() if math.isfinite(total)}


def moment(values: Mapping[str, float]) -> dict[str, float]:
    """The engine's state at one time, by our names; what it does not tell is not there."""
    gauges = {name: next((values[n] for n in known if n in values), None) for name, known in GAUGES.items()}
    return {name: value for name, value in gauges.items() if value is not None}


def summary(moments: Sequence[Mapping[str, float]], first: Mapping[str, float], last: Mapping[str, float]) -> Account:
    """Mean and peak of each gauge over a run, the mean time in the engine's queue, where it is told for every step
    the mean number of requests in one, and the tokens that were proposed. NO_ACCOUNT without metrics."""
    queue_ms = busy = None
    for name in QUEUES:
        count = last.get(f"{name}_count", 0) - first.get(f"{name}_count", 0)
        if count > 0 and f"{name}_sum" in last:
            queue_ms = _finite(1e3 * (last[f"{name}_sum"] - first.get(f"{name}_sum", 0)) / count)
    if (steps := last.get(DECODES, 0) - first.get(DECODES, 0)) > 0 and BUSY in last:
        before, after = (at.get(BUSY, 0) * at.get(DECODES, 0) for at in (first, last))
        busy = _finite((after - before) / steps)
    return Account(
        running=_gauge(moments, "running"),
        waiting=_gauge(moments, "waiting"),
        kv_cache=_gauge(moments, "kv_cache"),
        queue_ms=queue_ms,
        busy=busy,
        proposed=_grown(PROPOSED, first, last),
        accepted=_grown(ACCEPTED, first, last),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _grown(counter: str, first: Mapping[str, float], last: Mapping[str, float]) -> float | None:
    return _finite(last[counter] - first.get(counter, 0)) if counter in last else None


def _gauge(moments: Sequence[Mapping[str, float]], name: str) -> Gauge | None:
    values = [at[name] for at in moments if name in at]
    mean = _finite(sum(values) / len(values)) if values else None
    return None if mean is None else Gauge(mean=mean, peak=max(values), n=len(values))
