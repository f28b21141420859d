"""Every metric in one row: unit, title in reports, meaning, which way is better; and values as people read them.

Who parses, judges or shows a metric reads it here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from peftopt.records import NAME, Metric

Unit = Literal["ms", "s", "tokens/s", "bytes", "share", "nats", "ratio", "count", "requests"]
Better = Literal["lower", "higher", "either"]

LOWER: Better = "lower"
HIGHER: Better = "higher"
EITHER: Better = "either"
WORKLOAD = True


class Spec(NamedTuple):
    """What a metric's name stands for.

    `unit` is the base unit of its values, `title` the heading of its column in a report. A metric that is
    `per_workload` is named with "@workload". `compared` marks one that already compares with the baseline, so that
    "x" on top of it means nothing. `reads` names the field of a record that holds it ("memory.peak_memory_bytes", of
    `measurements`): its values are collected and shown without more code. "" for what is computed elsewhere.
    """

    unit: Unit
    title: str
    meaning: str
    better: Better
    per_workload: bool = False
    compared: bool = False
    reads: str = ""


METRICS: Mapping[str, Spec] = {
    "latency.p50": Spec("ms", "P50", "whole request, median", LOWER, WORKLOAD),
    "latency.p95": Spec("ms", "P95", "whole request, 95th percentile", LOWER, WORKLOAD),
    "latency.p99": Spec("ms", "P99", "whole request, 99th percentile", LOWER, WORKLOAD),
    "ttft.p50": Spec("ms", "TTFT P50", "time to first token, median", LOWER, WORKLOAD),
    "ttft.p95": Spec("ms", "TTFT P95", "time to first token, 95th percentile", LOWER, WORKLOAD),
    "ttft.p99": Spec("ms", "TTFT P99", "time to first token, 99th percentile", LOWER, WORKLOAD),
    "tpot.p50": Spec("ms", "TPOT P50", "mean gap between tokens after the first, median request", LOWER, WORKLOAD),
    "throughput": Spec("tokens/s", "throughput", "output tokens per second", HIGHER, WORKLOAD),
    "load_time": Spec(
        "s", "load time", "from nothing to a model that can answer", LOWER, reads="launch.model_loading_time"
    ),
    "memory": Spec("bytes", "peak memory", "peak memory of the process", LOWER, reads="memory.peak_memory_bytes"),
    "gpu_memory": Spec(
        "bytes", "GPU memory", "peak memory on the accelerator", LOWER, reads="memory.gpu_memory_allocated"
    ),
    "size": Spec("bytes", "size on disk", "files on disk", LOWER),
    "perplexity": Spec("ratio", "perplexity", "perplexity over the baseline's", LOWER),
    "accuracy": Spec("share", "accuracy", "prompts answered as expected", HIGHER),
    "validity": Spec("share", "schema validity", "answers that parse as they must", HIGHER),
    "top1": Spec("share", "same next token", "tokens where the baseline would choose the same", HIGHER, compared=True),
    "greedy_match": Spec("share", "same answer", "answers equal to the baseline's", HIGHER, compared=True),
    "kl": Spec("nats", "KL per token", "mean KL divergence per token from the baseline", LOWER, compared=True),
    "flips": Spec(
        "share", "answers flipped", "prompts that the baseline answers right and it does not", LOWER, compared=True
    ),
    "delta_survival": Spec(
        "share", "adapter's shift kept", "what is left of the adapter's shift from the base", HIGHER, compared=True
    ),
    "critical_errors": Spec("share", "critical errors", "prompts where only the variant breaks", LOWER, compared=True),
    "length": Spec("ratio", "answer length", "answer length over the baseline's", EITHER),
}
"""Every metric a recipe can name, in the order in which help and hints list them."""

REPORTED: Mapping[str, Spec] = {
    "tpot.p95": Spec("ms", "TPOT P95", "mean gap between tokens after the first, 95th percentile", LOWER, WORKLOAD),
    "tpot.p99": Spec("ms", "TPOT P99", "mean gap between tokens after the first, 99th percentile", LOWER, WORKLOAD),
    "latency.ratio": Spec("ratio", "speed", "whole request over the baseline's, paired by block", LOWER, WORKLOAD),
    "cpu.ratio": Spec("ratio", "CPU time", "CPU time over the baseline's, paired by block", LOWER, WORKLOAD),
    "length.ratio": Spec("ratio", "answer length", "tokens of an answer over the baseline's", EITHER, WORKLOAD),
    "bandwidth": Spec(
        "share",
        "of memory bandwidth",
        "time that reading memory would take, of the time it took",
        HIGHER,
        WORKLOAD,
    ),
    "server_queue": Spec(
        "ms", "in the server's queue", "mean time of a request in the queue", LOWER, WORKLOAD, reads="server.queue_ms"
    ),
    "server_batch": Spec(
        "requests", "requests in a batch", "requests that are answered together", HIGHER, WORKLOAD, reads="server.batch"
    ),
    "server_fill": Spec(
        "share", "of its slots", "slots of the batch that are taken", HIGHER, WORKLOAD, reads="server.fill"
    ),
    "server_kv_cache": Spec(
        "share",
        "KV cache taken",
        "share of the key-value cache that is taken",
        LOWER,
        WORKLOAD,
        reads="server.kv_cache_taken",
    ),
    "acceptance_length": Spec(
        "count",
        "acceptance length",
        "tokens that a step gives where some are proposed, its own one included",
        HIGHER,
        WORKLOAD,
    ),
    "acceptance": Spec(
        "share",
        "proposals accepted",
        "proposed tokens that went into answers",
        HIGHER,
        WORKLOAD,
        reads="server.acceptance",
    ),
    "reused": Spec("share", "prompt reused", "prompt tokens that earlier requests had left", HIGHER, WORKLOAD),
    "warm_up": Spec("requests", "warm-up", "first requests of a launch that are slower than the rest", LOWER, WORKLOAD),
    "first_request": Spec("ratio", "first request", "first request of a launch over the rest", LOWER, WORKLOAD),
    "score": Spec("share", "score", "mean score of answers", HIGHER),
    "top1.min": Spec("share", "in the worst prompt", "least share of same next tokens in a prompt", HIGHER),
    "kl.p95": Spec("nats", "P95 of prompts", "95th percentile of prompts' mean KL divergence per token", LOWER),
    "kl.max": Spec("nats", "worst prompt", "largest mean KL divergence per token of a prompt", LOWER),
    "kl.token": Spec("nats", "worst token", "largest KL divergence of a token", LOWER),
    "flips_worse": Spec("count", "worse", "prompts that only the baseline answers right", LOWER),
    "flips_better": Spec("count", "better", "prompts that only the variant answers right", HIGHER),
    "flips_p": Spec("ratio", "p", "chance of so uneven a count of flips between equals (exact McNemar)", EITHER),
    "gpu_memory_allocated": Spec(
        "bytes",
        "GPU memory",
        "peak memory that the caching allocator handed out",
        LOWER,
        reads="memory.gpu_memory_allocated",
    ),
    "gpu_memory_reserved": Spec(
        "bytes",
        "GPU memory reserved",
        "peak memory that the caching allocator held",
        LOWER,
        reads="memory.gpu_memory_reserved",
    ),
    "fragmentation": Spec(
        "share", "reserved but unused", "reserved GPU memory that was not handed out", LOWER, reads="memory.idle"
    ),
    "gpu_busy": Spec(
        "share", "GPU busy", "share of a request in which kernels ran on the GPU", HIGHER, reads="engine.gpu_busy"
    ),
    "adapter_switch_time": Spec(
        "s", "adapter switch", "from one adapter to another", LOWER, reads="launch.adapter_switch_time"
    ),
    "compile_time": Spec("s", "compile time", "compiling with an empty cache", LOWER, reads="engine.compile_time"),
    "warm_start": Spec(
        "s", "start from the compile cache", "getting ready with a filled cache", LOWER, reads="engine.warm_start"
    ),
    "prefix_bytes": Spec(
        "bytes",
        "prefixes kept",
        "memory of what is kept for later prompts",
        LOWER,
        reads="engine.prefix_bytes",
    ),
    "graphs": Spec("count", "graphs", "compiled graphs", EITHER, reads="engine.graphs"),
    "graph_breaks": Spec(
        "count", "graph breaks", "places where a graph ends and Python goes on", LOWER, reads="engine.graph_breaks"
    ),
    "recompiles": Spec(
        "count", "recompiles", "graphs that were compiled again for another shape", LOWER, reads="engine.recompiles"
    ),
    "uncompiled": Spec(
        "count", "requests answered uncompiled", "requests that no graph fitted", LOWER, reads="engine.uncompiled"
    ),
    "eager_prompts": Spec(
        "count",
        "requests with an eager prompt",
        "requests whose prompt no graph fitted",
        LOWER,
        reads="engine.eager_prompts",
    ),
    "virtual_tokens": Spec(
        "count", "virtual tokens", "tokens that the adapter puts before every prompt, live or baked", LOWER
    ),
    "prompt_kv": Spec(
        "bytes", "their KV cache", "keys and values of the virtual tokens, in each sequence's cache", LOWER
    ),
    "break_even": Spec("count", "requests to break even", "requests that earn back what compiling took", LOWER),
}
"""Every other metric that a report shows; no recipe can name it."""

TASK = "task."
"""What a metric's name begins with that stands for the score of one of `quality.tasks`, under the task's own name."""

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def spec_of(name: str) -> Spec | None:
    """What a name stands for in a recipe; None for one that no recipe can name."""
    if name.startswith(TASK) and NAME.fullmatch(name.removeprefix(TASK)):
        return Spec("share", name, "mean score in a task of lm-evaluation-harness", HIGHER)
    return METRICS.get(name)


def described(name: str) -> Spec | None:
    """What a name stands for, with or without its "@workload"; None for one that is no metric's."""
    name = name.partition("@")[0]
    return spec_of(name) or REPORTED.get(name)


UNITS: Mapping[Unit, Mapping[str, str]] = {
    "ms": {"us": "1e-3", "µs": "1e-3", "ms": "1", "s": "1e3", "min": "60e3"},
    "s": {"us": "1e-6", "µs": "1e-6", "ms": "1e-3", "s": "1", "min": "60"},
    "bytes": {"B": "1", "KB": "1e3", "kB": "1e3", "MB": "1e6", "GB": "1e9"}
    | {"KiB": "1024", "MiB": "1048576", "GiB": "1073741824"},
    "tokens/s": {"tokens/s": "1", "tok/s": "1"},
    "share": {"%": "0.01", "": "1"},
    "nats": {"nats": "1", "": "1"},
    "ratio": {},
    "count": {},
    "requests": {},
}
"""Base unit -> the units a limit may be written in and their exact sizes. "" is the bare number."""


def known(metric: Metric) -> Spec:
    """What a metric stands for; it has one, since only parse_metric makes metrics."""
    spec = spec_of(metric.name)
    assert spec is not None, metric
    return spec


def counted(n: int, what: str, several: str = "") -> str:
    """ "1 block", "2 blocks", "2 launches"."""
    if n == 1:
        return f"1 {what}"
    return f"{n} {several or what + 's'}"


def percent(share: float, places: int = 0) -> str:
    """A share in percent: "73 %"."""
    return f"{100 * share:.{places}f} %"


def percent_of_level(level: float) -> str:
    """A confidence level in percent, with the decimals that tell it from certainty: "95.0 %", "99.8 %", "99.97 %"."""
    return percent(level, next((places for places in range(1, 9) if round(100 * level, places) < 100), 1))


def format_value(metric: str, value: float, relative: bool = False) -> str:
    """A figure for people: "41.2 ms", "163 MB", "1.02x", "99.1 %".

    `value` is in the metric's base unit, or a ratio when `relative`; an unknown name is a unit ("ms"), or else a ratio.
    """
    spec = described(metric)
    unit = "ratio" if relative else spec.unit if spec else metric if metric in UNITS else "ratio"
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if unit == "bytes":
        power = next((p for p in (3, 2, 1) if abs(value) >= 0.9995 * 1000**p), 0)
        return f"{_digits(value / 1000**power) if power else round(value)} {('B', 'KB', 'MB', 'GB')[power]}"
    if unit == "share":
        return f"{_percent(value * 100)} %"
    if unit == "ratio":
        places = 3 if 0 < abs(value - 1) < 0.01 else 2
        if abs(value) < 0.1:
            return f"{_digits(value, 2)}x"
        return f"{value:.{places}f}x" if abs(value) < 100 else f"{_digits(value)}x"
    if unit in ("count", "requests"):
        return _digits(value)
    return f"{_digits(value)} {unit}"


def _digits(value: float, digits: int = 3) -> str:
    """So many significant digits, an exponent only far out of range: 0.0123, 41.2, 1,234."""
    rounded = float(f"{value:.{digits}g}")
    if not 1e-9 <= abs(rounded) < 1e12:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def _percent(value: float) -> str:
    """One decimal, and more near 0 and 100, where the difference lies: 83.3, 99.1, 99.97, 0.33."""
    distance = min(abs(value), abs(100 - abs(value)), 1)
    places = 1 if distance < 1e-4 else min(4, max(1, 1 - math.floor(math.log10(distance))))
    return f"{value:.{places}f}".rstrip("0").rstrip(".")
