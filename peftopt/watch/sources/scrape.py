"""Two looks at a server's Prometheus metrics: how much each counter grew between them. Pure.

A counter that went back began again at 0, as it does when its server is started again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from peftopt.records import Json, JsonValue
from peftopt.watch.spans import Buckets

Labels = tuple[tuple[str, str], ...]
"""Names and values, in the order of the names."""

Series = Mapping[Labels, float]
"""The samples of a metric."""

TARGET = ("job", "instance", "pod")
"""Labels that Prometheus gives to all series of one server."""

STEADY = ("peftopt_gateway_overhead_seconds", "vllm:generation_tokens_total")
"""Counters that go back only where the server was started again; others may end with a version."""

MOST = 1e100
"""No counter comes that far, and sums of what lies below are finite."""

ENDINGS = ("_bucket", "_count", "_sum")
"""Of the samples of a histogram."""


@dataclass(frozen=True)
class Scrape:
    """A look `at` a time (seconds since 1970): samples by the metric's name and labels."""

    at: float
    by_name: Mapping[str, Series]

    def series(self) -> Iterator[tuple[str, Labels, float]]:
        """Every sample."""
        for name, series in self.by_name.items():
            for labels, value in series.items():
                yield name, labels, value

    def total(self, name: str) -> float | None:
        """The sum of a metric's samples; None without any."""
        series = self.by_name.get(name)
        return sum(series.values()) if series else None

    def highest(self, name: str) -> float | None:
        """The highest of a metric's samples; None without any."""
        series = self.by_name.get(name)
        return max(series.values()) if series else None

    def as_json(self) -> JsonValue:
        """The look, to go on from."""
        by_name: dict[str, JsonValue] = {}
        for name, series in self.by_name.items():
            by_name[name] = [[dict(labels), value] for labels, value in series.items()]
        return {"at": self.at, "metrics": by_name}


def of_text(text: str, at: float, names: Collection[str]) -> Scrape:
    """The metrics of these names in the exposition format. Raises ValueError for what is not in that format.

    Source: prometheus.io/docs/instrumenting/exposition_formats, the text form.
    """
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(text)
    samples = ((s.name, s.labels, s.value) for family in families for s in family.samples)
    return of_samples(((name, labels, value) for name, labels, value in samples if name in names), at)


def of_samples(samples: Iterator[tuple[str, Mapping[str, str], float]], at: float) -> Scrape:
    """A look of single samples; what is not finite, or as good as that, is left out."""
    by_name: dict[str, dict[Labels, float]] = defaultdict(dict)
    for name, labels, value in samples:
        if abs(value) < MOST:
            by_name[name][tuple(sorted(labels.items()))] = value
    return Scrape(at, dict(by_name))


def of_json(value: Json) -> Scrape:
    """The look that `as_json` wrote. Raises what BROKEN names for another value."""
    samples = ((name, labels, number) for name, series in value["metrics"].items() for labels, number in series)
    return of_samples(samples, float(value["at"]))


@dataclass(frozen=True)
class Growth:
    """How much each counter grew, by the metric's name and labels."""

    by_name: Mapping[str, Series]

    def total(self, name: str, **labels: str) -> float:
        """Of all samples with these labels."""
        return sum(self.by(name, "", **labels).values())

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Of the samples with these labels, by the value of another label."""
        grown: dict[str, float] = defaultdict(float)
        for each, value in self._matching(name, labels):
            grown[each.get(label, "")] += value
        return grown

    def buckets(self, name: str, **labels: str) -> Buckets:
        """A histogram. Where its series have not the same ends, only those that all of them have are kept."""
        cumulative: dict[frozenset[tuple[str, str]], dict[float, float]] = defaultdict(dict)
        for each, value in self._matching(f"{name}_bucket", labels):
            end = float(each.pop("le"))
            cumulative[frozenset(each.items())][end] = value
        if not cumulative:
            return Buckets((math.inf,), (0,))
        shared = set.intersection(*(set(counts) for counts in cumulative.values()))
        ends = sorted(shared | {math.inf})
        totals = [sum(counts.get(end, max(counts.values())) for counts in cumulative.values()) for end in ends]
        steps = [round(after - before) for before, after in zip([0.0, *totals], totals, strict=False)]
        return Buckets(tuple(ends), tuple(max(0, step) for step in steps))

    def _matching(self, name: str, labels: Mapping[str, str]) -> Iterator[tuple[dict[str, str], float]]:
        for each, value in self.by_name.get(name, {}).items():
            known = dict(each)
            if labels.items() <= known.items():
                yield known, value


def growth(before: Scrape, after: Scrape) -> Growth:
    """Between two looks. What a server counted before it was first looked at is not known to lie between them: it is
    left out."""
    known = {_target(labels) for _, labels, _ in before.series()}
    again = _started_again(before, after)
    restarted = {_target(labels) for family, labels in again if family in STEADY}
    by_name: dict[str, dict[Labels, float]] = defaultdict(dict)
    for name, labels, value in after.series():
        target = _target(labels)
        if target not in known:
            continue
        begins_at_0 = target in restarted or _counter(name, labels) in again
        old = 0.0 if begins_at_0 else before.by_name.get(name, {}).get(labels, 0.0)
        by_name[name][labels] = value - old
    return Growth(dict(by_name))


def _started_again(before: Scrape, after: Scrape) -> set[tuple[str, Labels]]:
    """The counters of which a sample went back."""
    return {
        _counter(name, labels)
        for name, labels, value in after.series()
        if value < before.by_name.get(name, {}).get(labels, 0.0)
    }


def _counter(name: str, labels: Labels) -> tuple[str, Labels]:
    """What a sample belongs to: all samples of a histogram are one counter."""
    family = name
    for ending in ENDINGS:
        family = family.removesuffix(ending)
    return family, tuple(pair for pair in labels if pair[0] != "le")


def _target(labels: Labels) -> Labels:
    return tuple(pair for pair in labels if pair[0] in TARGET)
