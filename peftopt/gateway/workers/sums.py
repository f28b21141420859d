"""The metrics of several processes as one: counters and histograms are added up, gauges are kept apart.

The last account of a dead process is kept: a sum that fell would look like a restart of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peftopt.records import Json

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Family:
    """A metric: its samples by their name and labels."""

    name: str
    help: str
    type: str
    samples: Mapping[tuple[str, Labels], float]

    @property
    def adds_up(self) -> bool:
        """Whether samples of several processes may be added."""
        return self.type != "gauge"


Account = Mapping[str, Family]
"""The metrics of a process, by name."""


def account(registry: CollectorRegistry) -> Account:
    """The counts of a process."""
    found = {}
    for metric in registry.collect():
        samples = {(s.name, tuple(s.labels.items())): s.value for s in metric.samples}
        found[metric.name] = Family(metric.name, metric.documentation, metric.type, samples)
    return found


def written(of: Account) -> Json:
    """An account as JSON."""
    return [
        [family.name, family.help, family.type, [[*key, value] for key, value in family.samples.items()]]
        for family in of.values()
    ]


def read(value: Json) -> Account:
    """The account in JSON that a worker has written."""
    found = {}
    for name, help_, type_, samples in value:
        by_key = {(sample, tuple((k, v) for k, v in labels)): number for sample, labels, number in samples}
        found[name] = Family(name, help_, type_, by_key)
    return found


def whole(own: Account, living: Mapping[int, Account], past: Account, by_worker: Iterable[str]) -> Account:
    """The metrics of a supervisor and its workers. Gauges are the supervisor's, except those named in `by_worker`,
    which get the label `worker`."""
    added = added_up([own, past, *living.values()])
    gauges = {name: family for name, family in own.items() if not family.adds_up}
    for name in by_worker:
        samples = {
            (sample, (*labels, ("worker", str(index)))): value
            for index, each in sorted(living.items())
            if name in each
            for (sample, labels), value in each[name].samples.items()
        }
        if name in gauges:
            gauges[name] = Family(name, gauges[name].help, "gauge", samples)
    return {name: added.get(name) or gauges[name] for name in own}


def added_up(accounts: Sequence[Account]) -> Account:
    """The counters and histograms of several processes, added up."""
    found: dict[str, Family] = {}
    for each in accounts:
        for name, family in each.items():
            if family.adds_up:
                before = found[name].samples if name in found else {}
                added = {key: before.get(key, 0.0) + value for key, value in family.samples.items()}
                found[name] = Family(name, family.help, family.type, {**before, **added})
    return found


def only(of: Account, keeps: Callable[[Mapping[str, str]], bool]) -> Account:
    """The series of an account whose labels are kept."""
    return {
        name: replace(family, samples={key: n for key, n in family.samples.items() if keeps(dict(key[1]))})
        for name, family in of.items()
    }


def text(of: Account) -> bytes:
    """The exposition format, version 0.0.4."""
    from prometheus_client import generate_latest
    from prometheus_client.registry import Collector

    class Told(Collector):
        """What was added up, in place of what this process has counted."""

        def collect(self) -> Iterator[Metric]:
            from prometheus_client.core import Metric

            for family in of.values():
                metric = Metric(family.name, family.help, family.type)
                for (name, labels), value in family.samples.items():
                    metric.add_sample(name, dict(labels), value)
                yield metric

    return generate_latest(Told())
