"""Values of each variant in production beside the decision's: a row per metric, with a word for the result. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from peftopt.decision import production
from peftopt.decision.evidence import Evidence
from peftopt.decision.production import Row, Served
from peftopt.metrics import format_value
from peftopt.records import Decision, Interval
from peftopt.report import words
from peftopt.report.words import MISSING, Table, clean

ABOUT = (
    "Values in production beside those of the decision. Nothing here is judged: the verdicts rest on the run's own "
    "blocks."
)
BAD = ("slower", "over", "more")
"""Results that are highlighted."""
HEADER = ["metric", "decided", "in production", "compared", "reason"]
FAMILIES = {"ttft": "TTFT", "tpot": "TPOT", "latency": "latency"}


@dataclass(frozen=True)
class Section:
    """A variant's part: facts on its requests (which versions, when) as label and text, and the `table`."""

    variant: str
    facts: list[tuple[str, str]]
    table: Table


def sections(decision: Decision, evidence: Evidence) -> list[Section]:
    """A part for each variant in production; none without an imported log."""
    names = ", ".join(variant.name for variant in decision.variants)
    return [
        Section(clean(each.variant), _facts(each, names), (HEADER, [_cells(row) for row in each.rows]))
        for each in production.served(decision, evidence)
    ]


def _facts(served: Served, names: str) -> list[tuple[str, str]]:
    versions = ", ".join(f"{title} ({n})" for title, n in served.versions.items())
    unknown = "" if served.rows else f"the run has no such variant: import the log with --variant NAME, one of {names}"
    texts = {
        "requests": f"{served.requests:,}, from {_moment(served.began)} to {_moment(served.ended)} UTC",
        "versions": versions,
        "not compared": unknown,
        "the log lacks": "; ".join(served.lacks),
    }
    return [(label, clean(text)) for label, text in texts.items() if text]


def _moment(utc: str) -> str:
    """A moment to the second."""
    return utc[:19].replace("T", " ")


def _cells(row: Row) -> list[str]:
    reason = row.reason or MISSING
    return [clean(each) for each in (_title(row.name), _decided(row), _value(row, row.observed), row.word, reason)]


def _title(name: str) -> str:
    """ "TTFT P95@chat" of the metric "ttft.p95@chat"."""
    family, _, rest = name.partition(".")
    return f"{FAMILIES[family]} {rest[:1].upper()}{rest[1:]}" if family in FAMILIES else name


def _decided(row: Row) -> str:
    if row.unit == "allowed" and row.decided:
        return f"{format_value('share', row.decided.estimate)} allowed"
    return _value(row, row.decided)


def _value(row: Row, value: Interval | None) -> str:
    """A number with its interval, as its unit is written."""
    if value is None or math.isnan(value.estimate):
        return MISSING
    if row.unit == "share":
        return words.critical(value)
    if row.unit == "allowed":
        return words.figure("share", value)
    if row.unit in ("tokens", "requests"):
        return _plain(value, ",.0f" if row.unit == "tokens" else ".1f")
    if math.isinf(value.estimate):
        return f"not answered (n={value.n})"
    if ".p95" in row.name and not words.bounded(value):
        return f"{words.TOO_FEW}: {value.n}"
    return words.figure(row.name, value)


def _plain(value: Interval, form: str) -> str:
    estimate, low, high = (format(x, form) for x in (value.estimate, value.low, value.high))
    return f"{estimate} ({low}–{high})" if words.bounded(value) and low != high else estimate
