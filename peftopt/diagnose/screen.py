"""A diagnosis on one screen: a table of what costs, or may cost, and a line for the rest. Pure."""

from __future__ import annotations

from peftopt.diagnose.records import BOTTLENECKS, Diagnosis, Finding, Row
from peftopt.metrics import format_value, percent
from peftopt.report.words import figure

HEADER = ["what", "phase", "batch", "finding", "costs", "of a request", "what to do", "gain measured"]

OUTCOMES: dict[Finding, str] = {
    "fault": "rejected",
    "costs": "rejected",
    "undecided": "inconclusive",
    "no cost": "accepted",
    "not asked": "not judged",
}
"""The colour of a finding: that of an outcome."""


def table(diagnosis: Diagnosis) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows and their outcomes: faults, costs and what is undecided."""
    shown = [row for row in diagnosis.rows if row.finding in ("fault", "costs", "undecided")]
    return HEADER, [cells(row) for row in shown], [OUTCOMES[row.finding] for row in shown]


def cells(row: Row) -> list[str]:
    """A row's cells."""
    return [
        f"{row.bottleneck}: {row.part}",
        row.phase,
        str(row.batch),
        row.finding,
        costs(row),
        "" if row.share is None else percent(row.share),
        row.advice,
        "" if row.gain is None else f"{figure('latency.ratio', row.gain)} {row.gained}",
    ]


def costs(row: Row) -> str:
    """The ratio with its interval, else the amount with its interval, else nothing."""
    if row.ratio is not None:
        return figure("latency.ratio", row.ratio)
    return "" if row.extra is None else f"{row.extra.estimate:.3g} {row.unit}"


def lines(diagnosis: Diagnosis) -> list[str]:
    """What the table has no room for."""
    told = [
        f"a lone request takes {figure('latency.p50', diagnosis.usual_request_ms)}; {diagnosis.engine}, "
        f"{diagnosis.threads} threads; measured in {format_value('load_time', diagnosis.seconds)}"
    ]
    for bottleneck, what in BOTTLENECKS.items():
        free = [row for row in diagnosis.rows if row.bottleneck == bottleneck and row.finding == "no cost"]
        names = dict.fromkeys(f"{row.part} ({row.phase}, batch {row.batch})" for row in free)
        if names:
            told.append(f"{what}: no cost of {', '.join(names)}")
    told += [f"not asked: {row.part}: {row.why}" for row in diagnosis.rows if row.finding == "not asked"]
    return [*told, *(f"note: {note}" for note in diagnosis.notes)]
