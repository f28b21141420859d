"""A comparison of runs as files: data, Markdown, and one HTML page with a plot of the times. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from peftopt.decision.comparing import ERROR, Compared, Comparison
from peftopt.records import FORMAT, JsonValue
from peftopt.report import comparison as told
from peftopt.report import html, markdown, words
from peftopt.report.as_json import plain
from peftopt.report.plots.axes import Scale, drawable
from peftopt.report.plots.picture import per_cent
from peftopt.report.words import Section


@dataclass(frozen=True)
class Bar:
    """A run's interval in the plot; positions in per cent of the width."""

    label: str
    text: str
    x: float
    low: float
    high: float


@dataclass(frozen=True)
class Plot:
    """The ratios of one metric on a log scale, variant by variant, a bar for each run that has it."""

    title: str
    one: float
    ticks: tuple[tuple[float, str], ...]
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]


def as_json(comparison: Comparison) -> str:
    """The comparison as a file of JSON."""
    return json.dumps(data(comparison), indent=2, allow_nan=False) + "\n"


def data(comparison: Comparison) -> dict[str, JsonValue]:
    """The comparison as data, without the decisions, which have their own files."""
    runs = [
        {
            "label": label,
            "name": run.name,
            "recipe": run.decision.recipe,
            "baseline": run.decision.baseline,
            "minimize": run.decision.minimize,
            "chosen": run.decision.chosen,
            "outcome": run.decision.outcome,
            "facts": run.facts,
            "lacks": run.lacks,
        }
        for label, run in zip(ascii_uppercase, comparison.runs, strict=False)
    ]
    verdicts = [
        {"variant": v.variant, "rule": v.rule, "outcomes": v.outcomes, "changed": v.changed}
        for v in comparison.verdicts
    ]
    return {
        "format": FORMAT,
        "sentence": told.sentence(comparison),
        "runs": plain(runs),
        "differing": plain(comparison.differing),
        "only": plain(comparison.only),
        "cautions": plain(told.cautions(comparison)),
        "remarks": plain(told.remarks(comparison)),
        "error": ERROR,
        "family": comparison.family,
        "level": comparison.level,
        "values": plain(comparison.values),
        "verdicts": plain(verdicts),
    }


def as_markdown(comparison: Comparison) -> str:
    """The comparison as GitHub Markdown."""
    parts = [
        Section("Runs", "", told.runs(comparison)),
        Section("What differs", told.ABOUT_DIFFERING, told.differing(comparison)),
        Section("Values", f"{told.ABOUT_VALUES} {told.how_sure(comparison)}", told.values(comparison)),
        Section("Verdicts", told.ABOUT_VERDICTS, told.verdicts(comparison)),
    ]
    notes = [*told.cautions(comparison), *told.remarks(comparison), *told.unshared(comparison)]
    shown = [part for part in parts if part.table[1]]
    return markdown.sections("Runs compared", told.sentence(comparison), notes, shown)


def as_html(comparison: Comparison) -> str:
    """The comparison as one page that loads no other files."""
    return html.page(
        "compare.html.j2",
        sentence=told.sentence(comparison),
        cautions=told.cautions(comparison),
        remarks=told.remarks(comparison),
        runs=told.runs(comparison),
        differing=told.differing(comparison),
        values=told.values(comparison),
        verdicts=told.verdicts(comparison),
        unshared=told.unshared(comparison),
        same=told.same(comparison),
        plots=plots(comparison),
        about_differing=told.ABOUT_DIFFERING,
        about_values=told.ABOUT_VALUES,
        about_verdicts=told.ABOUT_VERDICTS,
        how_sure=told.how_sure(comparison),
    )


def plots(comparison: Comparison) -> list[Plot]:
    """A plot for each workload's latency, as a ratio to the baseline."""
    rows = [value for value in comparison.values if value.metric.startswith("latency.ratio@")]
    return [_plot([row for row in rows if row.metric == name]) for name in dict.fromkeys(row.metric for row in rows)]


def _plot(rows: Sequence[Compared]) -> Plot:
    edges = [x for row in rows for v in row.values if v for x in (v.estimate, v.low, v.high) if 0 < x < math.inf]
    scale = Scale.around([1.0, *edges], log=True)
    groups = []
    for row in rows:
        bars = [
            Bar(label, words.figure("ratio", v), *map(per_cent, (scale.at(v.estimate), *scale.ends(v))))
            for label, v in zip(ascii_uppercase, row.values, strict=False)
            if v and drawable(v.estimate, log=True)
        ]
        groups.append((row.variant, tuple(bars)))
    ticks = tuple((per_cent(share), f"{value:g}x") for share, value in scale.ticks(first=[1.0]))
    return Plot(told.title(rows[0].metric), per_cent(scale.at(1.0)), ticks, tuple(groups))
