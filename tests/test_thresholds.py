"""The language of thresholds: what it accepts, in which unit, and what it says of everything else."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peftopt.metrics import METRICS, UNITS, format_value
from peftopt.recipe import thresholds
from peftopt.recipe.thresholds import BadThreshold, parse, parse_metric
from peftopt.records import Metric, Threshold


@pytest.mark.parametrize(
    ("text", "metric", "op", "limit", "relative"),
    [
        ("latency.p50@chat <= 0.85x", Metric("latency.p50", "chat"), "<=", 0.85, True),
        ("latency.p95@chat <= 400 ms", Metric("latency.p95", "chat"), "<=", 400, False),
        ("ttft.p95@chat<.4s", Metric("ttft.p95", "chat"), "<", 400, False),
        ("tpot.p50@b-1 ≤ 900 µs", Metric("tpot.p50", "b-1"), "<=", 0.9, False),
        ("load_time <= 1.5 min", Metric("load_time"), "<=", 90, False),
        ("throughput@bulk >= 50 tok/s", Metric("throughput", "bulk"), ">=", 50, False),
        ("throughput@bulk >= 1.2 x", Metric("throughput", "bulk"), ">=", 1.2, True),
        ("accuracy >= 95 %", Metric("accuracy"), ">=", 0.95, False),
        ("accuracy ≥ 0.95", Metric("accuracy"), ">=", 0.95, False),
        ("critical_errors <= 0", Metric("critical_errors"), "<=", 0, False),
        ("size < 200 MB", Metric("size"), "<", 200e6, False),
        ("task.arc_easy >= 0.98x", Metric("task.arc_easy"), ">=", 0.98, True),
        ("task.support >= 90 %", Metric("task.support"), ">=", 0.9, False),
        ("gpu_memory <= 2 GiB", Metric("gpu_memory"), "<=", 2**31, False),
        ("perplexity <= 1.02×", Metric("perplexity"), "<=", 1.02, True),
        ("kl <= 5e-2 nats", Metric("kl"), "<=", 0.05, False),
        ("length >= 0.9x", Metric("length"), ">=", 0.9, True),
        ("length <= 1.1x", Metric("length"), "<=", 1.1, True),
    ],
)
def test_forms(text: str, metric: Metric, op: str, limit: float, relative: bool) -> None:
    found = parse(text)
    assert (found.metric, found.op, found.limit, found.relative) == (metric, op, limit, relative)
    assert found.text == text


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("latncy.p50@chat <= 3 ms", "no metric named 'latncy.p50'", "'latency.p50'"),
        ("speed <= 3 ms", "no metric", "known: latency.p50, "),
        ("latency.p50 <= 3 ms", "needs a workload", "latency.p50@"),
        ("accuracy@chat >= 3 %", "whole variant", "write accuracy"),
        ("latency.p50@a b <= 3 ms", "no workload can be named 'a b'", "letters"),
        ("latency.p50@chat", "no comparison", "latency.p95@chat <= 400 ms"),
        ("size = 3 MB", "no comparison", "<="),
        ("1 MB <= size <= 3 MB", "more than one comparison", "<="),
        ("latency.p50@chat >= 3 ms", "lower latency.p50 is better", "latency.p50@chat <= 3 ms"),
        ("throughput@bulk < 1.2x", "higher throughput is better", "throughput@bulk > 1.2x"),
        ("latency.p50@chat <= 400", "no unit: latency.p50 is measured in us, µs, ms, s, min", "400 ms"),
        ("latency.p50@chat <= 3 MB", "'MB'", "<= 0.85x"),
        ("latency.p50@chat <= 85 %", "'%'", "<= 0.85x"),
        ("size <= 3 QB", "'QB'", "200 MB"),
        ("accuracy >= 95", "out of range", "95 %"),
        ("accuracy > 100 %", "accuracy > 100 %", ">="),
        ("critical_errors < 0", "critical_errors < 0", "<="),
        ("perplexity <= 12", "ends in x", "1.02x"),
        ("kl <= 2x", "compares with the baseline", "0.05 nats"),
        ("size <= nan MB", "not a limit", "200 MB"),
        ("size <= inf", "not a limit", "200 MB"),
        ("size <= -3 MB", "0 or more", "200 MB"),
        ("size <= 1e999 MB", "too large", "200 MB"),
        ("size <= 0 MB", "more than 0", "200 MB"),
        ("perplexity <= 0x", "more than 0", "1.02x"),
        ("accuracy >= 0x", "more than 0", ">= 95 %, or >= 0.98x"),
        ("size <= ", "not a limit", "200 MB"),
        ("size <= ٣ MB", "not a limit", "200 MB"),
        ("", "no comparison", "<="),
    ],
)
def test_mistakes(text: str, message: str, hint: str) -> None:
    with pytest.raises(BadThreshold) as caught:
        parse(text)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def example_of(name: str) -> str:
    """A threshold on this metric in the form its own hint gives."""
    metric = f"{name}@chat" if METRICS[name].per_workload else name
    op = ">=" if METRICS[name].better == "higher" else "<="
    return f"{metric} {op} {thresholds._EXAMPLES[METRICS[name].unit]}"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_working_example(name: str) -> None:
    assert parse(example_of(name)).metric.name == name


def tried(text: str) -> Threshold | None:
    try:
        return parse(text)
    except ValueError as error:
        assert str(error)
        return None


def told(text: str) -> Metric | None:
    try:
        return parse_metric(text)
    except ValueError as error:
        assert str(error)
        return None


WORDS = "<= >= < > ≤ @ chat 0.85 1e9 1e-9999 -1 nan inf x ² ٣ us µs min B KiB tok/s % nats"
ODD = (" ", "\n", "\x00", "\ud800", "9" * 5000)
pieces = st.lists(st.sampled_from([*METRICS, *WORDS.split(), *ODD]), max_size=8).map("".join)


@given(st.one_of(st.text(), pieces))
@example("size <= " + "9" * 100_000 + " B")
@example("size <= 1" + " " * 100_000 + "MB x")
@example("\ud800@\ud800 <= \ud800")
def test_any_text_parses_or_says_why(text: str) -> None:
    found = tried(text)
    if found:
        assert math.isfinite(found.limit)
        assert found.limit >= 0
        assert parse(found.text) == found
    named = told(text)
    if named:
        assert parse_metric(str(named)) == named


@given(
    st.sampled_from(sorted(METRICS)),
    st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True),
    st.floats(1e-3, 1e6).map(lambda x: float(f"{x:.6g}")),
    st.booleans(),
    st.data(),
)
def test_what_is_written_is_what_is_read(
    name: str, workload: str, number: float, relative: bool, data: st.DataObject
) -> None:
    spec = METRICS[name]
    units = {"x": "1"} if spec.unit == "ratio" or (relative and not spec.compared) else UNITS[spec.unit]
    unit = data.draw(st.sampled_from(sorted(units)))
    if spec.unit == "share" and unit != "x":
        number = min(number, 1.0)
    op = data.draw(st.sampled_from({"lower": ["<="], "higher": [">="], "either": ["<=", ">="]}[spec.better]))
    metric = Metric(name, workload if spec.per_workload else "")
    found = parse(f"  {metric}{op} {number} {unit} ")
    assert (found.metric, found.op, found.relative) == (metric, op, unit == "x")
    assert found.limit == pytest.approx(number * float(units[unit]), rel=1e-12)


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("latency.p50@chat", 41.234, "41.2 ms"),
        ("latency.p95", 1234.5, "1,234 ms"),
        ("memory", 163e6, "163 MB"),
        ("memory", 999.9e6, "1.00 GB"),
        ("size", 12, "12 B"),
        ("load_time", 3.456, "3.46 s"),
        ("throughput@bulk", 88.25, "88.2 tokens/s"),
        ("perplexity", 1.02, "1.02x"),
        ("perplexity", 1.0041, "1.004x"),
        ("speed@chat", 0.8512, "0.85x"),
        ("accuracy", 0.991, "99.1 %"),
        ("accuracy", 0.9997, "99.97 %"),
        ("accuracy", 1, "100 %"),
        ("critical_errors", 0.0033, "0.33 %"),
        ("critical_errors", 0, "0 %"),
        ("kl", 0.01234, "0.0123 nats"),
        ("kl", 0, "0 nats"),
        ("kl", math.nan, "n/a"),
        ("latency.p95@chat", math.inf, "∞"),
        ("latency.p95@chat", -math.inf, "-∞"),
    ],
)
def test_figures_for_people(metric: str, value: float, text: str) -> None:
    assert format_value(metric, value) == text


def test_a_relative_figure_is_a_ratio() -> None:
    assert format_value("latency.p50@chat", 0.85, relative=True) == "0.85x"


@given(st.sampled_from([*METRICS, "speed@chat", "?"]), st.floats(), st.booleans())
def test_any_figure_can_be_shown(metric: str, value: float, relative: bool) -> None:
    assert format_value(metric, value, relative)
