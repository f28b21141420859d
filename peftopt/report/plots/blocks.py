"""Blocks over time: whether times drift, and which blocks something else disturbed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from peftopt import stats
from peftopt.decision.evidence import FAILED, Evidence
from peftopt.decision.index import Field, times
from peftopt.records import TWIN, Decision
from peftopt.report import table, words
from peftopt.report.plots import axes
from peftopt.report.plots.axes import Scale
from peftopt.report.plots.picture import Figure, kind_of, listed
from peftopt.report.plots.rows import Row, Rows

STRIP = 36
FEWEST = 3
"""Blocks from which there is anything to see over time."""
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Blocks between two ticks."""
LEAST = 0.05
"""The log ratio that a strip spans up and down, at least."""


@dataclass(frozen=True)
class Series:
    """A row: a log ratio for each block, and the value in words that the deviations are from."""

    name: str
    kind: str
    logs: Mapping[int, float]
    what: str

    @property
    def centre(self) -> float:
        """The median of the blocks that did not fail."""
        return stats.median(log for log in self.logs.values() if abs(log) < FAILED)


def rows(decision: Decision, evidence: Evidence, workload: str) -> list[Series]:
    """The baseline's own times first, then each variant's ratio to it, its second copy among them."""
    field: Field = "cpu_ms" if table.ratio_name(decision, workload).startswith("cpu") else "request_duration_ms"
    medians = {
        block: stats.median(times(turn, field))
        for block, turn in sorted(evidence.turns.get((decision.baseline, workload), {}).items())
    }
    usual = stats.median(medians.values())
    own = {block: math.log(ms / usual) for block, ms in medians.items() if axes.drawable(ms, log=True)}
    found = [Series(decision.baseline, "baseline", own, "its own times")]
    arms = [(decision.baseline + TWIN, f"{decision.baseline}, second copy", "baseline")]
    arms += [
        (v.name, v.name, kind_of(v.name, v.outcome, decision.baseline))
        for v in decision.variants
        if v.name != decision.baseline
    ]
    for source, name, kind in arms:
        logs = evidence.series(source, decision.baseline, workload, field)
        found.append(Series(name, kind, logs, f"its ratio to {decision.baseline}"))
    return [series for series in found if sum(abs(log) < FAILED for log in series.logs.values()) >= FEWEST]


def figure(decision: Decision, evidence: Evidence, workload: str) -> Figure | None:
    """Each block's deviation from the row's own median; None where there are too few blocks."""
    found = rows(decision, evidence, workload)
    if not found:
        return None
    disturbed = evidence.disturbed(workload)
    numbers = sorted({block for series in found for block in series.logs})
    disturbed = {block: why for block, why in disturbed.items() if block in numbers}
    across = Scale.around(map(float, numbers), least=0.6)
    reach = _reach(found)
    title = f"Blocks over time on {workload}"
    rows_ = Rows(title, [_row(series) for series in found], STRIP, top=16)
    for block, why in disturbed.items():
        _mark(rows_, across, block, why)
    rows_.axis([(across.at(block), str(block)) for block in _ticks(numbers)], lines=False)
    for number, series in enumerate(found):
        _draw(rows_, number, series, across, reach, frozenset(disturbed))
    return Figure(
        title=title,
        caption=_caption(decision.baseline, reach, len(numbers), disturbed),
        svg=str(rows_.picture),
        command="peftopt export-data RUN --table blocks --to blocks.csv",
        table=_table(found, numbers, disturbed),
        secondary=True,
    )


def _reach(found: list[Series]) -> float:
    """The log ratio that a strip spans up and down: all but the outermost blocks lie in it."""
    deviations = [log - series.centre for series in found for log in series.logs.values() if abs(log) < FAILED]
    return max(LEAST, *(1.1 * abs(deviation) for deviation in axes.central(deviations, 0.98)))


def _ticks(numbers: list[int]) -> range:
    """Blocks at even, round steps: some eight of them."""
    first, last = numbers[0], numbers[-1]
    step = next((step for step in STEPS if (last - first) / step <= 8), last - first)
    return range(-(-first // step) * step, last + 1, step)


def _row(series: Series) -> Row:
    ratios = [math.exp(log - series.centre) for log in series.logs.values() if abs(log) < FAILED]
    failed = len(series.logs) - len(ratios)
    value = f"{min(ratios):.2f}x to {max(ratios):.2f}x" + (f", {failed} failed" if failed else "")
    return Row(series.name, series.kind, value, f"{series.name}: {series.what}, {value} of their median")


def _mark(rows_: Rows, across: Scale, block: int, why: list[str]) -> None:
    """A mark above all rows, and a line through their strips."""
    group = rows_.picture.group("disturbed", f"block {block}: {'; '.join(why)}")
    rows_.through(across.at(block), "through", group)
    rows_.picture.shape((across.at(block), 5), "M-5-5H5L0 5Z", "flag", group)


def _draw(rows_: Rows, number: int, series: Series, across: Scale, reach: float, disturbed: frozenset[int]) -> None:
    group, top = rows_.row(number)
    middle = top + STRIP / 2
    rows_.picture.line((0, middle), (1, middle), "one", group)
    for block, log in series.logs.items():
        deviation = max(-1.0, min(1.0, (log - series.centre) / reach))
        at = across.at(block), middle - deviation * (STRIP / 2 - 3)
        text = "failed" if abs(log) >= FAILED else f"{math.exp(log - series.centre):.3g}x of the median"
        if abs(log) >= FAILED:
            rows_.picture.shape(at, "M-3-3L3 3M-3 3L3-3", "mark", group)
            continue
        kind = "block hollow" if block in disturbed else "block"
        rows_.picture.dot(at, 2.6, kind, group, f"block {block}: {text}")


def _caption(baseline: str, reach: float, blocks: int, disturbed: Mapping[int, list[str]]) -> str:
    sentences = [
        f"A dot is a block. The first row has {baseline}'s own times: it shows what the machine did. The others are "
        f"ratios to {baseline} in the same block: they should lie around their line whatever the machine did.",
        f"Each strip goes from {math.exp(-reach):.2g}x to {math.exp(reach):.2g}x of the row's median; what is "
        "beyond lies at its edge.",
    ]
    if disturbed:
        sentences.append(
            f"{len(disturbed)} of {blocks} blocks are disturbed ({listed(disturbed)}): a mark above, a dotted line, "
            "hollow dots. Point at the mark to read by what."
        )
    return " ".join(sentences)


def _table(found: list[Series], numbers: list[int], disturbed: Mapping[int, list[str]]) -> words.Table:
    header = ["block", "disturbed by", *(words.clean(series.name) for series in found)]
    body = []
    for block in numbers:
        cells = [_cell(series, block) for series in found]
        body.append([str(block), words.clean("; ".join(disturbed.get(block, [])) or words.MISSING), *cells])
    return header, body


def _cell(series: Series, block: int) -> str:
    log = series.logs.get(block)
    if log is None:
        return words.MISSING
    return "failed" if abs(log) >= FAILED else f"{math.exp(log - series.centre):.3g}x"
