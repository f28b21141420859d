"""Scales, ticks and where labels find room: numbers to places. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftopt.records import Interval
from peftopt.report.words import clip

MARGIN = 0.06
"""What stays free at either end of a scale, of its length."""
DIGITS = (1, 2, 5, 3, 7, 1.5, 4)
"""Ticks within a power of ten, the roundest first."""
MOST = 1e150
"""Numbers beyond this, or so near 0, are drawn at the edge: no scale is stretched to them."""


@dataclass(frozen=True)
class Scale:
    """A number -> its share of an axis, from 0 to 1. What lies beyond an end is drawn at that end."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], log: bool = False, least: float = 0.02) -> Scale:
        """The scale on which all these lie that can; `least` is the margin at either end, at least."""
        known = [value for value in values if drawable(value, log)]
        if not known:
            return cls(0.0, 1.0, log)
        inner = [math.log(value) if log else value for value in known]
        low, high = min(inner), max(inner)
        margin = max((high - low) * MARGIN, least, 1e-9 * max(abs(low), abs(high)))
        return cls(low - margin, high + margin, log)

    def at(self, value: float) -> float:
        """Where a number lies."""
        if math.isnan(value):
            raise ValueError("a value that is not a number has no place on an axis")
        share = (self._inner(value) - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)

    def ends(self, interval: Interval) -> tuple[float, float]:
        """Where an interval begins and ends; a bound that is not known is drawn as none."""
        low, high = (interval.estimate if math.isnan(bound) else bound for bound in (interval.low, interval.high))
        return self.at(low), self.at(high)

    def ticks(self, apart: float = 0.12, first: Sequence[float] = ()) -> list[tuple[float, float]]:
        """Shares and their numbers, in order, so far `apart`: some `first`, then round numbers where there is room."""
        kept: list[tuple[float, float]] = []
        for value in (*first, *self._round()):
            if not self._inside(value):
                continue
            share = self.at(value)
            if all(abs(share - other) >= apart for other, _ in kept):
                kept.append((share, value))
        return sorted(kept)

    def _inner(self, value: float) -> float:
        if not self.log:
            return value
        return math.log(value) if value > 0 else -math.inf

    def _inside(self, value: float) -> bool:
        return self.low <= self._inner(value) <= self.high

    def _round(self) -> list[float]:
        """Round numbers on the scale, the roundest first: of each power of ten, or evenly spaced on a short one."""
        if self.log and self.high - self.low > math.log(3):
            first = math.floor(self.low / math.log(10))
            last = math.ceil(self.high / math.log(10))
            return [digit * 10.0**power for digit in DIGITS for power in range(first, last + 1)]
        low, high = (math.exp(self.low), math.exp(self.high)) if self.log else (self.low, self.high)
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
        first, last = math.ceil(low / step), math.floor(high / step)
        return [round(n * step, 12) for n in range(first, last + 1)]


def drawable(value: float | None, log: bool = False) -> bool:
    """Whether a number has a place of its own on a scale."""
    if value is None or not math.isfinite(value):
        return False
    return (1 / MOST < value < MOST) if log else abs(value) < MOST


def central(values: Iterable[float], share: float = 0.9) -> list[float]:
    """The middle of the values, so that a few far out do not press the others together."""
    ordered = sorted(value for value in values if math.isfinite(value))
    cut = round(len(ordered) * (1 - share) / 2)
    return ordered[cut : len(ordered) - cut]


# ---- labels ------------------------------------------------------------------------------------

LETTER, LINE, AWAY = 6.9, 13.0, 10.0
"""Pixels: the width of a letter, the height of a line, and from a mark to its label."""
MARK = 6.0
"""Half the size of a mark."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""


@dataclass(frozen=True)
class Layout:
    """How wide a picture is on some page, in pixels, and how many letters of a name it has room for: labels find their
    place for each layout, and the page shows those of its own."""

    kind: str
    width: float
    letters: int


LAYOUTS = (Layout("narrow", 290, 16), Layout("wide", 700, 24))


@dataclass(frozen=True)
class Label:
    """A mark's label, and where it stands: `side` 1 for right of it, -1 for left; so many pixels below its middle."""

    text: str
    side: int = 1
    dy: float = 0.0


def place(
    marks: Sequence[tuple[float, float]],
    names: Sequence[str],
    layout: Layout,
    height: float,
    taken: Sequence[Box] = (),
) -> list[Label]:
    """A place for each mark's name where it covers no mark, no other label and nothing that is `taken`.

    `marks` are shares of the width, and pixels. Labels that find no room stand beside their mark all the same.
    """
    texts = [clip(name, layout.letters) for name in names]
    boxes = [*taken, *(_around(x * layout.width, y) for x, y in marks)]
    placed: dict[int, Label] = {}
    steps = [0.0, *(sign * step * LINE for step in range(1, 9) for sign in (-1, 1))]
    for n in sorted(range(len(marks)), key=lambda n: (marks[n][1], marks[n][0])):
        x, y = marks[n]
        labels = [Label(texts[n], side, dy) for dy in steps for side in (1, -1)]
        choices = [(label, _box(label, x * layout.width, y)) for label in labels]
        free = [(label, box) for label, box in choices if _fits(box, layout.width, height) and not _hits(box, boxes)]
        placed[n], box = free[0] if free else choices[0]
        boxes.append(box)
    return [placed[n] for n in range(len(marks))]


def text_box(text: str, right: float, bottom: float) -> Box:
    """What a line of words takes that ends there, in pixels."""
    return right - LETTER * len(text), bottom - LINE, right, bottom


def _around(x: float, y: float) -> Box:
    return x - MARK, y - MARK, x + MARK, y + MARK


def _box(label: Label, x: float, y: float) -> Box:
    near, far = x + label.side * AWAY, x + label.side * (AWAY + LETTER * len(label.text))
    return min(near, far), y + label.dy - LINE / 2, max(near, far), y + label.dy + LINE / 2


def _fits(box: Box, width: float, height: float) -> bool:
    left, top, right, bottom = box
    return left >= -20 and right <= width + 10 and top >= 0 and bottom <= height


def _hits(box: Box, taken: Iterable[Box]) -> bool:
    left, top, right, bottom = box
    return any(left < x2 and x1 < right and top < y2 and y1 < bottom for x1, y1, x2, y2 in taken)
