"""Latency distributions: how each variant's requests are spread, not only their median."""

from __future__ import annotations

import itertools
import math

from peftopt.decision.evidence import Evidence
from peftopt.metrics import counted, format_value
from peftopt.records import Decision, VariantDecision
from peftopt.report import words
from peftopt.report.plots import axes
from peftopt.report.plots.axes import Scale
from peftopt.report.plots.picture import Figure, kind_of
from peftopt.report.plots.rows import FEW, Row, Rows, quantile
from peftopt.stats import fewest_for

STRIP = 16
FEWEST = 5
"""Requests from which a distribution is drawn."""
SHOWN = (0.05, 0.25, 0.5, 0.75, 0.95)


def figure(decision: Decision, evidence: Evidence, workload: str) -> Figure | None:
    """The times of all timed requests on a workload, a failed one as infinite; None where they are too few."""
    samples = _samples(decision, evidence, workload)
    if not samples:
        return None
    kept = [variant for variant in decision.variants if variant.name in samples]
    inner = [q for values in samples.values() for q in (quantile(values, 0.05), quantile(values, 0.95))]
    across = Scale.around(inner, log=True)
    title = f"How requests on {workload} are spread"
    rows_ = Rows(title, [_row(decision, variant, samples[variant.name]) for variant in kept], STRIP)
    rows_.axis([(share, f"{value:,g}") for share, value in across.ticks(apart=0.14)])
    for number, variant in enumerate(kept):
        group, _ = rows_.row(number)
        rows_.spread(number, group, across, samples[variant.name])
    return Figure(
        title=title,
        caption="Time of a whole request in ms, log scale: left is faster. The tall mark is the median, short ones are "
        "each tenth of the requests, the band is their middle half, the line goes from P5 to P95, dots are the "
        f"outermost; of fewer than {FEW} requests each is a dot. Marks in two heaps are two kinds of "
        "request, such as short and long prompts, or a machine that was disturbed for a while.",
        svg=str(rows_.picture),
        command="peftopt export-data RUN --table requests --to requests.csv",
        table=(
            ["variant", "requests", "failed", *(f"P{100 * q:.0f}" for q in SHOWN)],
            [_cells(variant.name, samples[variant.name]) for variant in kept],
        ),
        secondary=workload != decision.minimize.partition("@")[2],
    )


def _samples(decision: Decision, evidence: Evidence, workload: str) -> dict[str, list[float]]:
    """The times of a variant's requests in ms, by variant; those with too few answered ones are left out."""
    found = {}
    for variant in decision.variants:
        groups = evidence.samples(variant.name, workload, "request_duration_ms")
        values = [value for value in itertools.chain.from_iterable(groups) if value > 0]
        if sum(axes.drawable(value, log=True) for value in values) >= FEWEST:
            found[variant.name] = values
    return found


def _row(decision: Decision, variant: VariantDecision, values: list[float]) -> Row:
    tail = f"P95 {_ms(quantile(values, 0.95))}" if len(values) >= fewest_for(0.95) else f"n = {len(values)}"
    value = f"P50 {_ms(quantile(values, 0.5))} · {tail}"
    failed = sum(map(math.isinf, values))
    lost = f", {failed} failed (at the right edge)" if failed else ""
    kind = kind_of(variant.name, variant.outcome, decision.baseline)
    return Row(variant.name, kind, value, f"{variant.name}: {value} of {counted(len(values), 'request')}{lost}")


def _cells(name: str, values: list[float]) -> list[str]:
    failed = sum(map(math.isinf, values))
    return [words.clean(name), str(len(values)), str(failed), *(_ms(quantile(values, q)) for q in SHOWN)]


def _ms(value: float) -> str:
    return format_value("ms", value)
