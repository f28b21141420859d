"""A diagnosis on one screen: a table of costs and possible costs, and a line for the rest. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peftopt.diagnose.judging import LEVELS, level_text
from peftopt.diagnose.records import BOTTLENECKS, Diagnosis, Finding, Row
from peftopt.metrics import counted, format_value, percent
from peftopt.records import Interval
from peftopt.report.words import bounded, figure

HEADER = ["what", "phase", "batch", "finding", "costs", "of a request", "what to do", "gain measured"]

OUTCOMES: dict[Finding, str] = {
    "fault": "rejected",
    "costs": "rejected",
    "undecided": "inconclusive",
    "no cost": "accepted",
    "not asked": "not judged",
}
"""The colour of a finding: that of an outcome."""

MOST_OPEN = 6
"""Undecided rows that the screen has room for."""


def shown(diagnosis: Diagnosis) -> list[Row]:
    """Faults, costs, and the undecided rows with the largest possible costs."""
    sure = [row for row in diagnosis.rows if row.finding in ("fault", "costs")]
    return [*sure, *undecided(diagnosis)[:MOST_OPEN]]


def undecided(diagnosis: Diagnosis) -> list[Row]:
    """Rows that more blocks would decide."""
    return [row for row in diagnosis.rows if row.finding == "undecided"]


def cells(row: Row) -> list[str]:
    """A row's cells."""
    gain = "" if row.gain is None else f"{row.gained} {ratio(row.gain)}"
    share = "" if row.share is None else percent(row.share)
    doing = row.advice if row.finding != "undecided" else row.advice.removeprefix("peftopt diagnose ")
    return [f"{row.bottleneck}: {row.part}", row.phase, str(row.batch), row.finding, costs(row), share, doing, gain]


def costs(row: Row) -> str:
    """The ratio with its interval, else the share of requests, else the amount with its interval, else nothing."""
    if row.ratio is not None:
        return ratio(row.ratio)
    if row.extra is None or not math.isfinite(row.extra.estimate):
        return ""
    if row.unit.startswith("of "):
        return f"{percent(row.extra.estimate)} {row.unit}"
    bounds = f"{row.extra.low:.3g}–{row.extra.high:.3g}" if bounded(row.extra) else "open"
    return f"{row.extra.estimate:.3g} {row.unit} ({bounds})"


def ratio(value: Interval) -> str:
    """A ratio of times with its interval; the interval is open if there are too few blocks."""
    text = figure("latency.ratio", value)
    return text if bounded(value) else f"{text} (open)"


def lines(diagnosis: Diagnosis) -> list[str]:
    """The lines below the table."""
    usual = figure("latency.p50", diagnosis.usual_request_ms)
    threads = counted(diagnosis.threads, "thread")
    took = format_value("load_time", diagnosis.seconds)
    told = [f"a lone request takes {usual}; engine {diagnosis.engine}, {threads}; measured in {took}"]
    told += [f"costs are shown with the interval that is judged, at {level_text(LEVELS[0])} or more"]
    told += [f"fault: {row.sentence}" for row in diagnosis.rows if row.finding == "fault"]
    rest = undecided(diagnosis)[MOST_OPEN:]
    if rest:
        told.append(f"undecided too, likely for less: {named(rest)}")
    for bottleneck, what in BOTTLENECKS.items():
        free = [row for row in diagnosis.rows if row.bottleneck == bottleneck and row.finding == "no cost"]
        if free:
            told.append(f"{bottleneck} ({what}): no cost of {named(free)}")
    told += [
        f"{row.bottleneck}: {row.part} not asked: {row.why}" for row in diagnosis.rows if row.finding == "not asked"
    ]
    return [*told, *(f"note: {note}" for note in diagnosis.notes)]


def named(rows: Sequence[Row]) -> str:
    """Parts, each once, with their phases and batches."""
    by_part: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row.phase} at {row.batch}" if row.phase else ""
        by_part.setdefault(row.part, []).append(where)
    return ", ".join(f"{part} ({'; '.join(filter(None, where))})" for part, where in by_part.items())
