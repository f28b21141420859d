"""A figure of a report, and the SVG that it is drawn as. Pure.

A picture is as wide as the page lets it be: places from left to right are shares of the width, places from top to
bottom are pixels. So text keeps its size on a phone, in print and on a wide screen. Colours are classes, whose rules
are in plots.html.j2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from peftopt.report import words
from peftopt.report.words import Table

EDGE = 0.01
"""The share of the width that stays free at either side, so that no mark is cut."""
NAME = 24
"""Characters of a name that a picture shows; the hover title has the whole name."""

Place = tuple[float, float]
"""A share of the width, and pixels from the top."""

SHAPES = {
    "baseline": "M-4.5-4.5H4.5V4.5H-4.5Z",
    "accepted": "M-5 0A5 5 0 1 1 5 0A5 5 0 1 1-5 0Z",
    "rejected": "M-4.5-4.5L4.5 4.5M-4.5 4.5L4.5-4.5",
    "inconclusive": "M0-6L6 0L0 6L-6 0Z",
    "not judged": "M0-5L5 4H-5Z",
}
"""What a variant is -> its mark, around 0 0. A shape tells what a colour tells, so print and every eye can read it."""


@dataclass(frozen=True)
class Figure:
    """A picture with its words: `caption` says what to see in it, `command` writes its data again, `table` has the same
    for who cannot see it. A `secondary` figure is folded."""

    title: str
    caption: str
    svg: str
    command: str
    table: Table
    secondary: bool = False


def kind_of(name: str, outcome: str, baseline: str) -> str:
    """What a variant is in a picture: a key of SHAPES."""
    if name == baseline:
        return "baseline"
    return outcome if outcome in SHAPES else "not judged"


class Picture:
    """An SVG picture of so many pixels in height. Numbers that are not finite raise ValueError: none reaches a page."""

    def __init__(self, title: str, height: float, kind: str) -> None:
        self.height = height
        self.root = Element("svg", {"class": kind, "role": "img", "height": _text(height)})
        titled(self.root, title)

    def __str__(self) -> str:
        return ElementTree.tostring(self.root, encoding="unicode")

    def group(self, kind: str, hint: str = "", into: Element | None = None) -> Element:
        """A group of marks that share a colour and a hover title."""
        group = SubElement(self.root if into is None else into, "g", {"class": kind})
        if hint:
            titled(group, hint)
        return group

    def line(self, start: Place, end: Place, kind: str, into: Element | None = None) -> None:
        """A straight line."""
        (x1, y1), (x2, y2) = start, end
        places = {"x1": _percent(x1), "y1": _text(y1), "x2": _percent(x2), "y2": _text(y2)}
        SubElement(self.root if into is None else into, "line", {"class": kind, **places})

    def dot(self, at: Place, radius: float, kind: str, into: Element | None = None, hint: str = "") -> None:
        """A circle."""
        places = {"cx": _percent(at[0]), "cy": _text(at[1]), "r": _text(radius)}
        dot = SubElement(self.root if into is None else into, "circle", {"class": kind, **places})
        if hint:
            titled(dot, hint)

    def bar(self, corner: Place, width: float, height: float, kind: str, into: Element | None = None) -> Element:
        """A rectangle from its upper left corner; `width` is a share of the picture's."""
        share = width * (1 - 2 * EDGE)
        places = {"x": _percent(corner[0]), "y": _text(corner[1])}
        places |= {"width": f"{_text(100 * share)}%", "height": _text(height)}
        return SubElement(self.root if into is None else into, "rect", {"class": kind, **places})

    def text(self, at: Place, text: str, kind: str, into: Element | None = None, shift: float = 0) -> None:
        """Words that begin, end or are centred at a place, as their class says; `shift` in pixels to the right."""
        places = {"x": _percent(at[0]), "y": _text(at[1])}
        if shift:
            places["dx"] = _text(shift)
        words_ = SubElement(self.root if into is None else into, "text", {"class": kind, **places})
        words_.text = words.clean(text)

    def corner(self, left: bool, y: float, text: str, kind: str, into: Element | None = None) -> None:
        """Words at the left edge, or at the right one."""
        places = {"x": "0" if left else "100%", "y": _text(y)}
        words_ = SubElement(self.root if into is None else into, "text", {"class": kind, **places})
        words_.text = words.clean(text)

    def shape(self, at: Place, path: str, kind: str, into: Element | None = None) -> None:
        """A small path around a place, in pixels."""
        places = {"x": _percent(at[0]), "y": _text(at[1])}
        inner = SubElement(self.root if into is None else into, "svg", places)
        SubElement(inner, "path", {"class": kind, "d": path})

    def curve(self, places: Sequence[Place], kind: str, into: Element | None = None) -> None:
        """A line through places, as wide as the picture; its stroke keeps its width."""
        whole = {
            "viewBox": f"0 0 100 {_text(self.height)}",
            "preserveAspectRatio": "none",
            "height": _text(self.height),
        }
        inner = SubElement(self.root if into is None else into, "svg", whole)
        points = " ".join(f"{_percent(x)[:-1]},{_text(y)}" for x, y in places)
        SubElement(inner, "polyline", {"class": kind, "points": points, "vector-effect": "non-scaling-stroke"})


def leader(side: int, dy: float) -> str:
    """The path from a mark to its label, `dy` pixels below it, on the right (1) or the left (-1)."""
    return f"M{4 * side} {_text(math.copysign(4, dy))}L{9 * side} {_text(dy)}"


def listed(values: Iterable[object], most: int = 8) -> str:
    """ "1, 2, 3 and 4 more"."""
    shown = [str(value) for value in values]
    rest = len(shown) - most
    return ", ".join(shown) if rest <= 0 else f"{', '.join(shown[:most])} and {rest} more"


def titled(element: Element, text: str) -> None:
    """Give a mark its hover title."""
    SubElement(element, "title").text = words.clean(text)


def per_cent(share: float) -> float:
    """A share of the width in per cent, within the edges."""
    return round(100 * (EDGE + (1 - 2 * EDGE) * share), 2)


def _percent(share: float) -> str:
    return f"{_text(per_cent(share))}%"


def _text(number: float) -> str:
    if not math.isfinite(number):
        raise ValueError(f"{number} has no place in a picture")
    text = f"{number:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
