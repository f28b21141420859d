"""Tests of the rules, for promtool: each alert fires, and stays silent, where it should. Pure.

Every limit is held exactly for 30 days, and no page comes; then twice the misses, and a page comes in time. A limit, a
threshold or a window that is changed in a rule by mistake fails one of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from peftopt.deploy.monitoring.alerts import ALL, Alert, Series
from peftopt.deploy.monitoring.burn import burns
from peftopt.deploy.monitoring.limits import shares, watched
from peftopt.deploy.monitoring.sources import Source, le, percent, quoted
from peftopt.records import JsonValue
from peftopt.watch.promise import Bound, Promise

STEP, LONG_STEP = 10, 180
"""Minutes between two looks at the rules; in the tests of 30 days, in which nothing changes, three hours."""
SAMPLE = 2
"""Minutes between two samples of a histogram."""
DAY, MONTH = 1440, 30 * 1440
REQUESTS = 2000
"""Of a limit in the time of a sample; more where a limit is judged by more."""
Asked = tuple[str, int, list[JsonValue]]
"""An expression, the minute at which it is asked, and what it says then."""
Healthy = Callable[[int], Series]
"""Series of so many samples."""


def cases(promise: Promise, source: Source, alerts: Sequence[Alert], healthy: Healthy) -> JsonValue:
    """The file of tests in which something goes wrong."""
    tests: list[JsonValue] = []
    for bound in watched(promise, source):
        tests += [_pages(source, bound, share, healthy) for share in _worse(bound.share)]
    for alert in alerts:
        if alert.fires:
            tests += [_fires(alert, healthy), _stays_silent(alert, healthy)]
    return _file(STEP, tests)


def months(promise: Promise, source: Source, healthy: Healthy) -> JsonValue:
    """The file of tests in which nothing does, for 30 days."""
    limits = [_month(source, bound, healthy) for bound in watched(promise, source)]
    return _file(LONG_STEP, [_month_of_errors(promise, source, healthy), *limits])


def _file(step: int, tests: list[JsonValue]) -> JsonValue:
    return {
        "rule_files": ["recording.yaml", "alerts.yaml"],
        "evaluation_interval": f"{step}m",
        "group_eval_order": ["peftopt-limits", "peftopt-alerts"],
        "tests": tests,
    }


def _worse(allowed: float) -> list[float]:
    return sorted({min(1.0, 2 * allowed), 1.0} - {0.0})


def _requests(bound: Bound) -> float:
    return max(REQUESTS, *(2 * SAMPLE * burn.requests / DAY for burn in burns(bound.share)))


def _buckets(source: Source, bound: Bound, periods: Sequence[tuple[float, int]]) -> dict[str, str]:
    """A histogram over periods of a share over the limit and of minutes. Half the limit is missed four times as often,
    twice the limit never: whoever takes another bucket gets another answer."""
    name, end, rate = source.times[bound.time], source.end(bound), _requests(bound)
    assert end is not None
    labels = f"{source.by}={quoted('support')}"
    within: dict[float, Callable[[float], float]] = {
        end / 2: lambda share: max(0.0, 1 - 4 * share),
        end: lambda share: 1 - share,
        2 * end: lambda share: 1.0,
    }
    found = {
        f"{name}_bucket{{{labels},le={quoted(le(at))}}}": _counted([(rate * kept(s), n) for s, n in periods])
        for at, kept in within.items()
    }
    return {**found, f"{name}_count{{{labels}}}": _counted([(rate, minutes) for _, minutes in periods])}


def _counted(periods: Sequence[tuple[float, int]]) -> str:
    """A counter that grows by so much a sample, for so many minutes, then by so much."""
    start, parts = 0.0, []
    for rate, minutes in periods:
        samples = minutes // SAMPLE
        parts.append(f"{start:.12g}+{rate:.12g}x{samples - 1}")
        start += rate * samples
    return " ".join(parts)


def _month(source: Source, bound: Bound, healthy: Healthy) -> JsonValue:
    series = {**healthy(MONTH // SAMPLE), **_buckets(source, bound, [(bound.share, MONTH + LONG_STEP)])}
    expr = f"count_over_time({_firing('PeftoptOverLimit', limit=bound.name)}[30d])"
    return _test(f"{bound.name}: 30 days at exactly the limit wake nobody", series, [(expr, MONTH, [])], SAMPLE)


def _month_of_errors(promise: Promise, source: Source, healthy: Healthy) -> JsonValue:
    """A kind of each share; the last of them, since one "oom" is told at once."""
    series = dict(healthy(MONTH // SAMPLE))
    for share, kinds in shares(promise, source).items():
        labels = f"{source.by}={quoted('support')},{source.kind}={quoted(kinds[-1])}"
        series[f"{source.errors}{{{labels}}}"] = _counted([(ALL * share, MONTH + LONG_STEP)])
    expr = 'count by (alertname) (count_over_time(ALERTS{severity="page"}[30d]))'
    return _test("30 days with as many errors as may be wake nobody", series, [(expr, MONTH, [])], SAMPLE)


def _pages(source: Source, bound: Bound, share: float, healthy: Healthy) -> JsonValue:
    """After a day without a miss: silent a little before the time that it takes, and firing a little after it."""
    hours = min(burn.hours(share) for burn in burns(bound.share))
    before = STEP * math.floor(0.95 * 60 * hours / STEP)
    after = STEP * math.ceil(1.05 * 60 * hours / STEP)
    series = {**healthy(2 * DAY // SAMPLE), **_buckets(source, bound, [(0.0, DAY), (share, after + STEP)])}
    expr = f"group by (alertname) ({_firing('PeftoptOverLimit', limit=bound.name)})"
    asked: list[Asked] = [(expr, DAY + before, []), (expr, DAY + after, _told("PeftoptOverLimit"))]
    title = f"{bound.name}: {percent(share)} of requests over it page after {hours:.3g} hours"
    return _test(title, series, asked, SAMPLE)


def _fires(alert: Alert, healthy: Healthy) -> JsonValue:
    expr = f"group by (alertname) ({_firing(alert.name, **alert.labels)})"
    series = {**healthy(2 * DAY), **alert.fires}
    return _test(f"{_title(alert)} fires", series, [(expr, _minutes(alert.at), _told(alert.name))], alert.sample)


def _stays_silent(alert: Alert, healthy: Healthy) -> JsonValue:
    expr = f"count_over_time({_firing(alert.name, **alert.labels)}[{alert.at}])"
    series = {**healthy(2 * DAY), **alert.silent}
    return _test(f"{_title(alert)} stays silent", series, [(expr, _minutes(alert.at), [])], alert.sample)


def _title(alert: Alert) -> str:
    return " ".join([alert.name, *alert.labels.values()])


def _firing(alert: str, **labels: str) -> str:
    every = {"alertname": alert, "alertstate": "firing", **labels}
    return f"ALERTS{{{','.join(f'{name}={quoted(value)}' for name, value in every.items())}}}"


def _told(alert: str) -> list[JsonValue]:
    return [{"labels": f"{{alertname={quoted(alert)}}}", "value": 1}]


def _minutes(text: str) -> int:
    return int(text[:-1]) * {"h": 60, "d": DAY}[text[-1]]


def _test(name: str, series: Mapping[str, str | None], asked: Sequence[Asked], sample: int = 1) -> JsonValue:
    return {
        "name": name,
        "interval": f"{sample}m",
        "input_series": [{"series": key, "values": values} for key, values in series.items() if values is not None],
        "promql_expr_test": [
            {"expr": expr, "eval_time": f"{minute}m", "exp_samples": samples} for expr, minute, samples in asked
        ],
    }
