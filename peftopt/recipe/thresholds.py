"""The language of `require:` and `minimize:`: "latency.p50@chat <= 0.85x" -> Threshold.

`METRICS` is the one list of what can be named. Mistakes are `BadThreshold`, a ValueError with a hint.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Literal, NamedTuple

from peftopt.records import NAME, Metric, Threshold

Unit = Literal["ms", "s", "tokens/s", "bytes", "share", "nats", "ratio"]
Better = Literal["lower", "higher", "either"]
Operator = Literal["<=", "<", ">=", ">"]


class Spec(NamedTuple):
    """What a metric's name stands for.

    `unit` is the base unit of its figures; `per_workload` asks for "@workload"; `compared` marks a figure
    that already compares with the baseline, so that "x" on top of it means nothing.
    """

    unit: Unit
    per_workload: bool
    better: Better
    meaning: str
    compared: bool = False


METRICS: Mapping[str, Spec] = {
    "latency.p50": Spec("ms", True, "lower", "whole request, median"),
    "latency.p95": Spec("ms", True, "lower", "whole request, 95th percentile"),
    "latency.p99": Spec("ms", True, "lower", "whole request, 99th percentile"),
    "ttft.p50": Spec("ms", True, "lower", "time to first token, median"),
    "ttft.p95": Spec("ms", True, "lower", "time to first token, 95th percentile"),
    "ttft.p99": Spec("ms", True, "lower", "time to first token, 99th percentile"),
    "tpot.p50": Spec("ms", True, "lower", "mean gap between tokens after the first, median request"),
    "throughput": Spec("tokens/s", True, "higher", "output tokens per second"),
    "load_time": Spec("s", False, "lower", "from nothing to a model that can answer"),
    "memory": Spec("bytes", False, "lower", "peak memory of the process"),
    "gpu_memory": Spec("bytes", False, "lower", "peak memory on the accelerator"),
    "size": Spec("bytes", False, "lower", "files on disk"),
    "perplexity": Spec("ratio", False, "lower", "perplexity over the baseline's"),
    "accuracy": Spec("share", False, "higher", "prompts answered as expected"),
    "validity": Spec("share", False, "higher", "answers that parse as they must"),
    "top1": Spec("share", False, "higher", "tokens where the baseline would choose the same", compared=True),
    "greedy_match": Spec("share", False, "higher", "answers equal to the baseline's", compared=True),
    "kl": Spec("nats", False, "lower", "mean KL divergence per token from the baseline", compared=True),
    "flips": Spec("share", False, "lower", "prompts that the baseline answers right and it does not", compared=True),
    "delta_survival": Spec(
        "share", False, "higher", "what is left of the adapter's shift from the base", compared=True
    ),
    "critical_errors": Spec("share", False, "lower", "prompts where only the variant breaks", compared=True),
    "length": Spec("ratio", False, "either", "answer length over the baseline's"),
}
"""Every metric a recipe can name, in the order in which help and hints list them."""

TASK = "task."
"""What a metric's name begins with that stands for the score of one of `quality.tasks`, under the task's own name."""


def spec_of(name: str) -> Spec | None:
    """What a name stands for; None for one that no recipe can use."""
    if name.startswith(TASK) and NAME.fullmatch(name.removeprefix(TASK)):
        return Spec("share", False, "higher", "mean score in a task of lm-evaluation-harness")
    return METRICS.get(name)


UNITS: Mapping[Unit, Mapping[str, str]] = {
    "ms": {"us": "1e-3", "µs": "1e-3", "ms": "1", "s": "1e3", "min": "60e3"},
    "s": {"us": "1e-6", "µs": "1e-6", "ms": "1e-3", "s": "1", "min": "60"},
    "bytes": {"B": "1", "KB": "1e3", "kB": "1e3", "MB": "1e6", "GB": "1e9"}
    | {"KiB": "1024", "MiB": "1048576", "GiB": "1073741824"},
    "tokens/s": {"tokens/s": "1", "tok/s": "1"},
    "share": {"%": "0.01", "": "1"},
    "nats": {"nats": "1", "": "1"},
    "ratio": {},
}
"""Base unit -> the units a limit may be written in and their exact sizes. "" is the bare number."""

_EXAMPLES: Mapping[Unit, str] = {
    "ms": "400 ms",
    "s": "20 s",
    "bytes": "200 MB",
    "tokens/s": "50 tokens/s",
    "share": "95 %",
    "nats": "0.05 nats",
    "ratio": "1.02x",
}
_OPERATORS: Mapping[str, Operator] = {"<=": "<=", ">=": ">=", "<": "<", ">": ">", "≤": "<=", "≥": ">="}
_FLIPPED: Mapping[Operator, Operator] = {"<=": ">=", "<": ">", ">=": "<=", ">": "<"}
_NUMBER = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?)\s*(.*)", re.DOTALL)


class BadThreshold(ValueError):
    """What is wrong with a threshold, and in `hint` what to write instead."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def parse_metric(text: str) -> Metric:
    """The metric in "latency.p50@chat"; raises BadThreshold for an unknown name or a wrong "@"."""
    name, at, workload = (part.strip() for part in text.strip().partition("@"))
    found = spec_of(name)
    if found is None:
        raise BadThreshold(f"no metric named {_show(name)}", _nearest(name))
    if found.per_workload and not workload:
        raise BadThreshold(f"{name} needs a workload", f"write {name}@ and the name of a workload")
    if at and not found.per_workload:
        raise BadThreshold(f"{name} is a figure of the whole variant, not of a workload", f"write {name}")
    if workload and not NAME.fullmatch(workload):
        raise BadThreshold(f"no workload can be named {_show(workload)}", "use letters, digits, - and _")
    return Metric(name, workload)


def parse(text: str) -> Threshold:
    """The threshold in "latency.p95@chat <= 400 ms", its limit in base units; raises BadThreshold."""
    text = " ".join(text.split())
    parts = re.split(f"({'|'.join(_OPERATORS)})", text)
    if len(parts) != 3:
        found = "no comparison" if len(parts) == 1 else "more than one comparison"
        raise BadThreshold(f"{found} in {_show(text)}", "write it like latency.p95@chat <= 400 ms")
    metric, op, amount = parse_metric(parts[0]), _OPERATORS[parts[1]], parts[2].strip()
    limit, relative = _limit(metric, amount)
    spec = known(metric)
    if spec.better == ("higher" if op in ("<=", "<") else "lower"):
        hint = f"write {metric} {_FLIPPED[op]} {amount}"
        raise BadThreshold(f"{spec.better} {metric.name} is better, so {op} would demand a bad one", hint)
    if (op, limit) == ("<", 0) or (op, limit, spec.unit, relative) == (">", 1, "share", False):
        raise BadThreshold(f"nothing can have {metric} {op} {amount}", f"write {op}= instead of {op}")
    return Threshold(metric, op, limit, relative, text)


def counted(n: int, what: str, several: str = "") -> str:
    """ "1 block", "2 blocks", "2 launches"."""
    if n == 1:
        return f"1 {what}"
    return f"{n} {several or what + 's'}"


def format_value(metric: str, value: float, relative: bool = False) -> str:
    """A figure for people: "41.2 ms", "163 MB", "1.02x", "99.1 %".

    `value` is in the metric's base unit, or a ratio when `relative`; a name that METRICS lacks ("speed@chat")
    is a ratio too.
    """
    spec = spec_of(metric.partition("@")[0])
    unit = "ratio" if relative or spec is None else spec.unit
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if unit == "bytes":
        power = next((p for p in (3, 2, 1) if abs(value) >= 0.9995 * 1000**p), 0)
        return f"{_digits(value / 1000**power) if power else round(value)} {('B', 'KB', 'MB', 'GB')[power]}"
    if unit == "share":
        return f"{_percent(value * 100)} %"
    if unit == "ratio":
        places = 3 if 0 < abs(value - 1) < 0.01 else 2
        return f"{value:.{places}f}x" if 0.1 <= abs(value) < 100 else f"{_digits(value)}x"
    return f"{_digits(value)} {unit}"


def known(metric: Metric) -> Spec:
    """What a metric stands for; it has one, since only parse_metric makes metrics."""
    found = spec_of(metric.name)
    assert found is not None, metric
    return found


# ---- parts -------------------------------------------------------------------------------------


def _limit(metric: Metric, text: str) -> tuple[float, bool]:
    """The limit in the metric's base unit, and whether it is relative to the baseline."""
    spec = known(metric)
    op, share = (">=", "0.98x") if spec.better == "higher" else ("<=", "0.85x")
    hint = f"write {metric} {op} {_EXAMPLES[spec.unit]}"
    if not spec.compared and spec.unit != "ratio":
        hint += f", or {op} {share} to compare with the baseline"
    match = _NUMBER.fullmatch(text)
    if not match:
        raise BadThreshold(f"{_show(text)} is no limit: it must be a number, 0 or more, and its unit", hint)
    relative = match[2] in ("x", "X", "×")
    if relative and spec.compared:
        raise BadThreshold(f"{metric.name} already compares with the baseline, so x means nothing here", hint)
    if not relative and match[2] not in UNITS[spec.unit]:
        raise BadThreshold(_wrong_unit(metric, match[2]), hint)
    limit = float(Decimal(match[1]) * Decimal("1" if relative else UNITS[spec.unit][match[2]]))
    if math.isinf(limit):
        raise BadThreshold(f"{_show(text)} is too large", hint)
    if limit == 0 and (relative or spec.unit not in ("share", "nats")):
        raise BadThreshold(f"the limit of {metric.name} must be more than 0", hint)
    if limit > 1 and spec.unit == "share" and not relative:
        raise BadThreshold(f"{_show(text)} is out of range: a share lies from 0 % to 100 %", hint)
    return limit, relative


def _wrong_unit(metric: Metric, unit: str) -> str:
    name, own = metric.name, known(metric).unit
    if own == "ratio":
        return f"{name} is measured against the baseline, so its limit ends in x"
    allowed = f"{name} is measured in {', '.join(u for u in UNITS[own] if u)}"
    if not unit:
        return f"the limit has no unit: {allowed}"
    elsewhere = any(unit in units for units in UNITS.values())
    return f"{_show(unit)} is {'the wrong kind of' if elsewhere else 'no known'} unit: {allowed}"


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name[:64], METRICS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(METRICS)}"


def _show(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}…")


def _digits(value: float) -> str:
    """Three significant digits, an exponent only far out of range: 0.0123, 41.2, 1,234."""
    rounded = float(f"{value:.3g}")
    if not 1e-9 <= abs(rounded) < 1e12:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def _percent(value: float) -> str:
    """One decimal, and more near 0 and 100, where the difference lies: 83.3, 99.1, 99.97, 0.33."""
    distance = min(abs(value), abs(100 - abs(value)), 1)
    places = 1 if distance < 1e-4 else min(4, max(1, 1 - math.floor(math.log10(distance))))
    return f"{value:.{places}f}".rstrip("0").rstrip(".")
