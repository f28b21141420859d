"""The columns of tables with a row per variant: title, the text of a variant's cell, and the sort key. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftopt.metrics import counted, described
from peftopt.records import Decision, VariantDecision
from peftopt.report import words
from peftopt.report.words import MISSING, Table, clean

Cell = Callable[[VariantDecision], str]

ALWAYS = ("variant", "verdict", "decided by")
"""Columns that stay even if no variant fills them."""

RANKS = {"validity": 1, "gpu_memory_allocated": 1, "latency.p95": 2, "perplexity": 3, "load_time": 4}
"""The order in which columns leave a too wide first table: the highest number first."""

OTHER_SPEEDS = 2
"""The rank of the speed under a workload that is not minimized."""


@dataclass(frozen=True)
class Column:
    """A column: its title, a variant's cell, the name of the value that sorts it, "" to sort by its text, and the
    metric that it shows, "" for none.

    `rank`: columns of a lower rank stay in the first table where it would be too wide.
    """

    title: str
    cell: Cell
    sorts: str = ""
    metric: str = ""
    rank: int = 0


@dataclass(frozen=True)
class Sheet:
    """A table with a row per variant. `keys`: for each cell the number that sorts it, None for its text; `metrics`:
    the metric that each column shows, "" for none."""

    header: list[str]
    body: list[list[str]]
    keys: list[list[float | None]]
    metrics: list[str]

    @property
    def table(self) -> Table:
        """The header and the rows."""
        return self.header, self.body


def sheet(decision: Decision, columns: Sequence[Column]) -> Sheet:
    """A row per variant."""
    return Sheet(
        [clean(column.title) for column in columns],
        [[clean(column.cell(variant)) for column in columns] for variant in decision.variants],
        [[_key(variant, column) for column in columns] for variant in decision.variants],
        [column.metric for column in columns],
    )


def _key(variant: VariantDecision, column: Column) -> float | None:
    value = variant.figures.get(column.sorts)
    return value.estimate if value and math.isfinite(value.estimate) else None


def filled(decision: Decision, columns: Sequence[Column]) -> list[Column]:
    """The columns with a value of any variant. "Too few requests" is not a value: the notes say it once for all
    variants."""
    return [
        column
        for column in columns
        if column.title in ALWAYS or any(words.measured(column.cell(variant)) for variant in decision.variants)
    ]


# ---- columns of metrics ------------------------------------------------------------------------


def of_metrics(workloads: Sequence[str], *names: str) -> list[Column]:
    """A column for each metric and workload; [""] for metrics of the whole variant."""
    return [of_metric(f"{name}@{workload}" if workload else name) for name in names for workload in workloads]


def of_metric(name: str) -> Column:
    """A metric's column, under its title, each value written as its kind is."""
    metric = name.partition("@")[0]
    sorts = "flips_worse" if metric == "flips" else name
    return Column(title(name), _cell_of(name), sorts, metric, RANKS.get(metric, 0))


def speed(ratio: str, heading: str, rank: int = 0) -> Column:
    """A ratio of times to the baseline's, in words."""
    return Column(heading, lambda v: words.speed(v.figures.get(ratio)), ratio, ratio.partition("@")[0], rank)


def title(name: str) -> str:
    """The heading of a metric's column: "P50@chat"."""
    spec = described(name)
    _, at, workload = name.partition("@")
    return f"{spec.title if spec else name}{at}{workload}"


def _cell_of(name: str) -> Cell:
    metric, _, workload = name.partition("@")
    spec = described(metric)
    if metric == "flips":
        return _flipped
    if metric == "warm_up":
        return _warm_up(workload)
    if metric == "cpu.ratio":
        return lambda v: words.speed(v.figures.get(name))
    if spec and spec.unit == "count":
        return _count(name)
    if spec and spec.unit == "requests":
        return _mean(name)
    return lambda v: words.figure(name, v.figures.get(name))


def _count(name: str) -> Cell:
    """A count: the most of any launch, or of a break-even the estimate and its range."""

    def cell(variant: VariantDecision) -> str:
        value = variant.figures.get(name)
        if value is None or math.isnan(value.estimate):
            return MISSING
        if name != "break_even":
            return f"{value.high:.0f}"
        worst = f"{value.high:,.0f}" if math.isfinite(value.high) else "never"
        return f"{value.estimate:,.0f} ({value.low:,.0f} to {worst})"

    return cell


def _mean(name: str) -> Cell:
    def cell(variant: VariantDecision) -> str:
        value = variant.figures.get(name)
        return MISSING if value is None else f"{value.estimate:.1f} ({value.low:.1f}–{value.high:.1f})"

    return cell


def _flipped(variant: VariantDecision) -> str:
    worse = variant.figures.get("flips_worse")
    better = variant.figures.get("flips_better")
    if worse is None or better is None or not math.isfinite(worse.estimate + better.estimate):
        return MISSING
    text = f"{worse.estimate:.0f} worse, {better.estimate:.0f} better"
    p = variant.figures.get("flips_p")
    return f"{text}, p = {p.estimate:.2g}" if p and worse.estimate else text


def _warm_up(workload: str) -> Cell:
    """ "1 request, 2.4x": how many requests of a launch are slower than the rest, and by how much the first is."""

    def cell(variant: VariantDecision) -> str:
        slow = variant.figures.get(f"warm_up@{workload}")
        first = variant.figures.get(f"first_request@{workload}")
        if slow is None or first is None or not math.isfinite(slow.estimate + first.estimate):
            return MISSING
        if not slow.estimate:
            return "none"
        return f"{counted(round(slow.estimate), 'request')}, the first {first.estimate:.2g}x"

    return cell
