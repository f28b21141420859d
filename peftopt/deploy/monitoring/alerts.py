"""One alert: when it fires, what it tells, and series at which it fires and stays silent. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peftopt.records import JsonValue
from peftopt.watch.promise import Promise

ALL = 600
"""Requests of a healthy service in the time of a sample."""
Series = Mapping[str, str | None]
"""Values of series, one a minute, as promtool writes them ("0+60x180": 0, 60, 120 …); None for a series that a healthy
service has and this one does not."""


@dataclass(frozen=True)
class Alert:
    """`page` wakes a person, `ticket` waits for the morning. `hold`: as long as `expr` has to hold. `fires` and
    `silent` change the series of a healthy service, so that the alert fires `at` that time, or never does; those on
    limits have longer series of their own."""

    name: str
    severity: Literal["page", "ticket"]
    expr: str
    summary: str
    description: str
    hold: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    fires: Series = field(default_factory=dict)
    silent: Series = field(default_factory=dict)
    at: str = "3h"
    sample: int = 1
    """Minutes between two samples of its series."""

    def rule(self, promise: Promise) -> JsonValue:
        """The rule as Prometheus reads it."""
        origin = f"The limits are those of the run {literal(promise.run)}, variant {literal(promise.variant)}."
        return {
            "alert": self.name,
            "expr": self.expr,
            **({"for": self.hold} if self.hold else {}),
            "labels": {"severity": self.severity, **{name: literal(value) for name, value in self.labels.items()}},
            "annotations": {
                "summary": self.summary,
                "description": f"{self.description} {origin}",
                "runbook": f"peftopt watch {literal(shlex.quote(f'results/runs/{promise.run}'))} --prometheus URL",
            },
        }


def literal(text: str) -> str:
    """A text that Prometheus' templates leave as it is."""
    return text.replace("{{", '{{ "{{" }}')
