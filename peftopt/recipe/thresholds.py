"""The language of `require:` and `minimize:`: "latency.p50@chat <= 0.85x" -> Threshold.

`peftopt.metrics` lists the metrics. A mistake is a `BadThreshold`, a ValueError with a hint.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Literal

from peftopt.metrics import METRICS, TASK, UNITS, Unit, known, spec_of
from peftopt.records import NAME, JsonValue, Metric, Threshold

Operator = Literal["<=", "<", ">=", ">"]


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


def _pattern(metrics: Iterable[str]) -> str:
    """The regular expression of a metric, with the name of a workload or without."""
    return rf"({'|'.join(map(re.escape, metrics))}|{re.escape(TASK)}[A-Za-z0-9_.-]+)\s*(@\s*[A-Za-z0-9_.-]+\s*)?"


_TIMES = [name for name, spec in METRICS.items() if spec.per_workload and spec.better == "lower"]

SCHEMA: dict[str, JsonValue] = {
    "pattern": rf"^\s*{_pattern(METRICS)}({'|'.join(_OPERATORS)})\s*[0-9.].*$",
    "examples": ["latency.p95@chat <= 400 ms", "accuracy >= 0.95x", "memory <= 2 GB"],
}
"""The JSON Schema of what `parse` accepts. `parse` itself checks more than this pattern can."""

TIME_SCHEMA: dict[str, JsonValue] = {
    "pattern": rf"^\s*({'|'.join(map(re.escape, _TIMES))})\s*@\s*[A-Za-z0-9_.-]+\s*$",
    "examples": ["latency.p50@chat", "ttft.p50@chat"],
}
"""The JSON Schema of `minimize:`."""


class BadThreshold(ValueError):
    """A mistake in a threshold; `hint` says what to write instead."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def parse_metric(text: str) -> Metric:
    """The metric in "latency.p50@chat"; raises BadThreshold for an unknown name or a wrong "@"."""
    name, at, workload = (part.strip() for part in text.strip().partition("@"))
    spec = spec_of(name)
    if spec is None:
        raise BadThreshold(f"no metric named {_show(name)}", _nearest(name))
    if spec.per_workload and not workload:
        raise BadThreshold(f"{name} needs a workload", f"write {name}@ and the name of a workload")
    if at and not spec.per_workload:
        raise BadThreshold(f"{name} is a metric of the whole variant, not of a workload", f"write {name}")
    if workload and not NAME.fullmatch(workload):
        raise BadThreshold(f"no workload can be named {_show(workload)}", "use letters, digits, - and _")
    return Metric(name, workload)


def parse(text: str) -> Threshold:
    """The threshold in "latency.p95@chat <= 400 ms", its limit in base units; raises BadThreshold."""
    text = " ".join(text.split())
    parts = re.split(f"({'|'.join(_OPERATORS)})", text)
    if len(parts) != 3:
        problem = "no comparison" if len(parts) == 1 else "more than one comparison"
        raise BadThreshold(f"{problem} in {_show(text)}", "write it like latency.p95@chat <= 400 ms")
    metric = parse_metric(parts[0])
    op = _OPERATORS[parts[1]]
    amount = parts[2].strip()
    limit, relative = _limit(metric, amount)
    spec = known(metric)
    if spec.better == ("higher" if op in ("<=", "<") else "lower"):
        hint = f"write {metric} {_FLIPPED[op]} {amount}"
        raise BadThreshold(f"a {spec.better} {metric.name} is better, so {op} would require a bad value", hint)
    if (op, limit) == ("<", 0) or (op, limit, spec.unit, relative) == (">", 1, "share", False):
        raise BadThreshold(f"no variant can have {metric} {op} {amount}", f"write {op}= instead of {op}")
    return Threshold(metric, op, limit, relative, text)


# ---- parts -------------------------------------------------------------------------------------


def _limit(metric: Metric, text: str) -> tuple[float, bool]:
    """The limit in the metric's base unit, and whether it is relative to the baseline."""
    spec = known(metric)
    hint = _example(metric)
    match = _NUMBER.fullmatch(text)
    if not match:
        raise BadThreshold(f"{_show(text)} is not a limit: write a number, 0 or more, and its unit", hint)
    relative = match[2] in ("x", "X", "×")
    if relative and spec.compared:
        raise BadThreshold(f"{metric.name} already compares with the baseline, so its limit does not end in x", hint)
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


def _example(metric: Metric) -> str:
    """A hint: an example of a limit of this metric."""
    spec = known(metric)
    op = ">=" if spec.better == "higher" else "<="
    hint = f"write {metric} {op} {_EXAMPLES[spec.unit]}"
    if spec.compared or spec.unit == "ratio":
        return hint
    share = "0.98x" if spec.better == "higher" else "0.85x"
    return f"{hint}, or {op} {share} to compare with the baseline"


def _wrong_unit(metric: Metric, unit: str) -> str:
    name = metric.name
    own = known(metric).unit
    if own == "ratio":
        return f"{name} is measured against the baseline, so its limit ends in x"
    allowed = f"{name} is measured in {', '.join(u for u in UNITS[own] if u)}"
    if not unit:
        return f"the limit has no unit: {allowed}"
    elsewhere = any(unit in units for units in UNITS.values())
    return f"{_show(unit)} is {'a unit of other metrics' if elsewhere else 'not a known unit'}: {allowed}"


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name[:64], METRICS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(METRICS)}"


def _show(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
