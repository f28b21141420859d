"""Forest plot: each variant's latency as a ratio to the baseline's, with its interval and its blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peftopt.decision.evidence import Evidence
from peftopt.metrics import percent_of_level
from peftopt.records import Decision, Interval, VariantDecision
from peftopt.report import measured, table, words
from peftopt.report.plots import axes
from peftopt.report.plots.axes import Scale
from peftopt.report.plots.picture import Figure, kind_of
from peftopt.report.plots.rows import Row, Rows

STRIP = 38
MIDDLE = 9
"""Of a strip, pixels to the interval's line."""
BELOW = 8
"""Pixels from a strip to the foot of the words below it."""


@dataclass(frozen=True)
class RatioRow:
    """A variant's ratio, its blocks' ratios (infinite where its turn failed), and what a rule asks of it."""

    variant: VariantDecision
    ratio: Interval
    blocks: tuple[float, ...]
    limit: float | None


def rows(decision: Decision, evidence: Evidence, workload: str) -> list[RatioRow]:
    """The variants that have a ratio on this workload, in the recipe's order."""
    name = table.ratio_name(decision, workload)
    blocks = measured.block_ratios(decision, evidence, workload)
    found = []
    for variant in decision.variants:
        ratio = variant.figures.get(name)
        if ratio and axes.drawable(ratio.estimate, log=True):
            limit = _limit(decision, variant, workload)
            found.append(RatioRow(variant, ratio, tuple(blocks.get(variant.name, ())), limit))
    return found


def scale(found: Sequence[RatioRow]) -> Scale:
    """The scale of the ratios: 1, every estimate with its interval, and all but the outermost blocks lie on it."""
    values = [1.0]
    for row in found:
        values += [row.ratio.estimate, row.ratio.low, row.ratio.high]
        values += [row.limit] if row.limit is not None else []
    blocks = [ratio for row in found for ratio in row.blocks if axes.drawable(ratio, log=True)]
    return Scale.around([*values, *axes.central(blocks)], log=True)


def figure(decision: Decision, evidence: Evidence, workload: str) -> Figure | None:
    """Ratio to the baseline by variant, with the raw block ratios beneath; None when there is no ratio."""
    found = rows(decision, evidence, workload)
    if not found:
        return None
    across = scale(found)
    title = f"Latency against {decision.baseline} on {workload}"
    rows_ = Rows(title, [_row(decision, row) for row in found], STRIP)
    rows_.axis([(share, f"{value:g}x") for share, value in across.ticks(apart=0.1, first=[1.0])])
    rows_.through(across.at(1.0), "one")
    told = None
    for number, row in enumerate(found):
        _draw(rows_, number, row, across, row.limit != told)
        told = row.limit
    clock = "CPU time" if table.ratio_name(decision, workload).startswith("cpu") else "the wall clock"
    limits = any(row.limit is not None for row in found)
    return Figure(
        title=title,
        caption=f"Ratio on {clock}, log scale: left of 1x is faster. The large mark is the estimate, the bar its "
        f"interval at {percent_of_level(found[0].ratio.level)}, each small dot a block (at the edge: beyond it)."
        + (" The dashed line is what a rule asks of that variant." if limits else ""),
        svg=str(rows_.picture),
        command="peftopt export-data RUN --table figures --to figures.csv",
        table=(
            ["variant", "ratio", "limit", "blocks", "fastest block", "slowest block"],
            [_cells(decision, row) for row in found],
        ),
        secondary=workload != decision.minimize.partition("@")[2],
    )


def _row(decision: Decision, row: RatioRow) -> Row:
    is_baseline = row.variant.name == decision.baseline
    name = f"{row.variant.name} (baseline)" if is_baseline else row.variant.name
    value = words.speed(row.ratio, compact=True)
    return Row(name, kind_of(row.variant.name, row.variant.outcome, decision.baseline), value, f"{name}: {value}")


def _draw(rows_: Rows, number: int, row: RatioRow, across: Scale, tell_limit: bool) -> None:
    picture = rows_.picture
    group, top = rows_.row(number)
    middle = top + MIDDLE
    if row.limit is not None:
        share = across.at(row.limit)
        picture.line((share, top), (share, top + STRIP), "limit", group)
    if row.limit is not None and tell_limit:
        side = "start" if share < 0.8 else "end"
        below = share, top + STRIP + BELOW
        picture.text(below, f"limit {row.limit:.2f}x", f"limit-text {side}", group)
    low, high = across.ends(row.ratio)
    picture.line((low, middle), (high, middle), "interval", group)
    picture.dot((across.at(row.ratio.estimate), middle), 6, "estimate", group)
    for n, ratio in enumerate(row.blocks):
        picture.dot((across.at(ratio), top + 21 + 5 * (n % 3)), 2, "dot", group)


def _cells(decision: Decision, row: RatioRow) -> list[str]:
    blocks = [ratio for ratio in row.blocks if not math.isnan(ratio)]
    return [
        words.clean(_row(decision, row).name),
        words.speed(row.ratio),
        words.MISSING if row.limit is None else f"{row.limit:.2f}x",
        str(len(blocks) or words.MISSING),
        f"{min(blocks):.2f}x" if blocks else words.MISSING,
        f"{max(blocks):.2f}x" if blocks else words.MISSING,
    ]


def _limit(decision: Decision, variant: VariantDecision, workload: str) -> float | None:
    """The ratio a rule asks for, where the rule compares what the plot compares."""
    if workload != decision.minimize.partition("@")[2]:
        return None
    asked = [
        v.limit
        for v in variant.verdicts
        if v.rule.endswith((".gain", ".not_slower")) and v.against == decision.baseline and v.unit == "x"
    ]
    return next((limit for limit in asked if limit is not None and axes.drawable(limit, log=True)), None)
