"""A picture of rows under each other, one for each variant, on one axis: what most figures of a report are. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from peftopt import stats
from peftopt.report import words
from peftopt.report.plots.axes import Scale
from peftopt.report.plots.picture import NAME, Picture

FOOT = 22
"""Pixels below the rows, for the axis."""
HEAD = 18
"""Pixels of a row above its strip, for a name and a value."""
BETWEEN = 10
"""Pixels between a strip and the next row."""
FEW = 20
"""Samples below which a tenth of them is no number."""
OUTERMOST = 6
"""Samples at either end that are drawn as dots, at most."""


@dataclass(frozen=True)
class Row:
    """A variant's row: what it is (a key of picture.SHAPES), its value in words, and the hover title."""

    name: str
    kind: str
    value: str
    hint: str


class Rows:
    """Rows of which each has a name and a value above a strip of so many pixels, which the figure draws into."""

    def __init__(self, title: str, rows: Sequence[Row], strip: float, top: float = 0.0) -> None:
        self.strip = strip
        self.step = HEAD + strip + BETWEEN
        self.top = top
        self.bottom = top + len(rows) * self.step
        self.picture = Picture(title, self.bottom + FOOT, "rows")
        self.rows = rows

    def axis(self, ticks: Sequence[tuple[float, str]], lines: bool = True) -> None:
        """Numbers below the rows, and lines through their strips. Before the rows, so that it lies behind them."""
        for share, text in ticks:
            if lines:
                self.through(share, "grid")
            self.picture.text((share, self.bottom + 17), text, "tick middle")

    def through(self, share: float, kind: str, into: Element | None = None) -> None:
        """A line from top to bottom through every strip. It leaves out what is between them: the names and values."""
        for number in range(len(self.rows)):
            top = self._top(number) + HEAD
            self.picture.line((share, top), (share, top + self.strip), kind, into)

    def row(self, number: int) -> tuple[Element, float]:
        """A row's group with its name and value, and where its strip begins."""
        row = self.rows[number]
        top = self._top(number)
        group = self.picture.group(row.kind.replace(" ", "-"), row.hint)
        self.picture.corner(True, top + 13, words.clip(row.name, NAME), "name", group)
        self.picture.corner(False, top + 13, row.value, "value", group)
        return group, top + HEAD

    def spread(self, number: int, group: Element, across: Scale, samples: Sequence[float]) -> None:
        """How samples are spread in a row's strip: P5 to P95 as a line, P25 to P75 as a band, each tenth as a tick, and
        the outermost ones as dots; of few samples each one, and the median. An infinite sample lies at the edge."""
        middle = self._top(number) + HEAD + self.strip / 2
        if len(samples) < FEW:
            share = across.at(quantile(samples, 0.5))
            self.picture.line((share, middle - self.strip / 2), (share, middle + self.strip / 2), "median", group)
            for sample in samples:
                self.picture.dot((across.at(sample), middle), 2.5, "dot", group)
            return
        at = {percent: across.at(quantile(samples, percent / 100)) for percent in (5, 25, 75, 95, *range(10, 100, 10))}
        half = self.strip / 2 - 2
        self.picture.line((at[5], middle), (at[95], middle), "range", group)
        self.picture.bar((at[25], middle - half), at[75] - at[25], 2 * half, "band", group)
        for percent in range(10, 100, 10):
            reach = half + 2 if percent == 50 else half / 2
            kind = "median" if percent == 50 else "tenth"
            self.picture.line((at[percent], middle - reach), (at[percent], middle + reach), kind, group)
        ordered = sorted(samples)
        few = min(len(ordered) // 20, OUTERMOST)
        for sample in [*ordered[:few], *ordered[len(ordered) - few :]]:
            self.picture.dot((across.at(sample), middle), 1.8, "dot", group)

    def _top(self, number: int) -> float:
        return self.top + number * self.step


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile as the tables have it: stats.quantile_of_groups."""
    return stats.quantile_of_groups([samples], q).estimate
