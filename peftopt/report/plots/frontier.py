"""Quality against latency: which variants are worth choosing between."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peftopt.decision.evidence import Evidence
from peftopt.metrics import described, format_value
from peftopt.records import Decision, Interval
from peftopt.report import words
from peftopt.report.plots import axes
from peftopt.report.plots.axes import Label, Layout, Scale
from peftopt.report.plots.dominance import Limit, Point, direction, frontier, limits, points, quality_of
from peftopt.report.plots.picture import SHAPES, Figure, Picture, Place, leader

HEAD, PLOT = 26, 340
"""Pixels: the legend above, and the plot."""
FAR = 1.5
"""A limit further off than so many times what the points span is said, not drawn."""


def figure(decision: Decision, evidence: Evidence) -> Figure | None:
    """The frontier; None where fewer than two variants have a time and a quality."""
    found = points(decision, evidence)
    if not found:
        return None
    quality = quality_of(decision)
    asked = limits(decision, evidence)
    times = [x for p in found for x in (p.x.estimate, *p.bar)]
    qualities = [y for p in found for y in (p.y.estimate, p.y.low, p.y.high)]
    across = _scale(times, [a.value for a in asked if a.metric == decision.minimize], log=True)
    up = _scale(qualities, [a.value for a in asked if a.metric == quality], log=False)
    title = _title(quality)[:1].upper() + _title(quality)[1:] + f" against {_title(decision.minimize)}"
    picture = Picture(title, HEAD + PLOT + 40, "plane")
    _axes(picture, across, up, decision.minimize, quality)
    beyond = [a.text for a in asked if not _draw_limit(picture, a, across, up, decision.minimize)]
    front = frontier(found, direction(quality))
    picture.curve(_steps(front, across, up), "front")
    places = [(across.at(p.x.estimate), _y(up, p.y.estimate)) for p in found]
    placed = {layout.kind: _labels(found, places, layout, asked, up, quality) for layout in axes.LAYOUTS}
    for n, point in enumerate(found):
        labels = {kind: of_all[n] for kind, of_all in placed.items()}
        _draw_point(picture, point, across, up, labels, point.variant.name == decision.chosen)
    _legend(picture, [p.kind for p in found])
    return Figure(
        title=title,
        caption=_caption(found, beyond, direction(quality)),
        svg=str(picture),
        command="peftopt export-data RUN --table figures --to figures.csv",
        table=_table(decision, quality, found),
    )


# ---- drawing -----------------------------------------------------------------------------------


def _scale(shown: Sequence[float], asked: Sequence[float], log: bool) -> Scale:
    """The scale of all points with their intervals, and of limits that are not far off."""
    least = 0.03 if log else 0.01
    scale = Scale.around(shown, log, least)
    return Scale.around([*shown, *(limit for limit in asked if _near(scale, limit))], log, least)


def _near(scale: Scale, limit: float) -> bool:
    if not axes.drawable(limit, scale.log):
        return False
    inner = math.log(limit) if scale.log else limit
    reach = FAR * (scale.high - scale.low)
    return scale.low - reach <= inner <= scale.high + reach


def _y(up: Scale, value: float) -> float:
    return HEAD + PLOT * (1 - up.at(value))


def _axes(picture: Picture, across: Scale, up: Scale, time: str, quality: str) -> None:
    bottom = HEAD + PLOT
    for share, value in across.ticks(apart=0.15):
        picture.line((share, HEAD), (share, bottom), "grid")
        picture.text((share, bottom + 16), f"{value:,g}", "tick middle")
    for share, value in up.ticks(apart=0.1):
        y = HEAD + PLOT * (1 - share)
        picture.line((0, y), (1, y), "grid")
        picture.text((0, y + 4), format_value(quality, value), "tick end", shift=-6)
    spec = described(time)
    unit = f", {spec.unit}" if spec else ""
    picture.corner(False, bottom + 34, f"{_title(time)}{unit} (log)", "axis end")


def _draw_limit(picture: Picture, asked: Limit, across: Scale, up: Scale, time: str) -> bool:
    """Whether the limit lies on the picture, and is drawn."""
    scale = across if asked.metric == time else up
    if not _near(scale, asked.value):
        return False
    group = picture.group("asked", f"required: {asked.text}")
    if asked.metric == time:
        share = across.at(asked.value)
        side = "start" if share < 0.5 else "end"
        picture.line((share, HEAD), (share, HEAD + PLOT), "limit", group)
        picture.text((share, HEAD + 12), asked.text, f"limit-text {side}", group, 5 if share < 0.5 else -5)
    else:
        y = _y(up, asked.value)
        picture.line((0, y), (1, y), "limit", group)
        picture.text((1, y - 5), asked.text, "limit-text end", group)
    return True


def _steps(front: Sequence[Point], across: Scale, up: Scale) -> list[tuple[float, float]]:
    """The frontier as steps: what it takes in time to have more quality."""
    places: list[tuple[float, float]] = []
    for point in front:
        place = across.at(point.x.estimate), _y(up, point.y.estimate)
        if places:
            places.append((place[0], places[-1][1]))
        places.append(place)
    return places


def _draw_point(
    picture: Picture, point: Point, across: Scale, up: Scale, labels: dict[str, Label], chosen: bool
) -> None:
    pale = " dominated" if point.dominated_by else ""
    group = picture.group(f"point {point.kind.replace(' ', '-')}{pale}{' chosen' if chosen else ''}", _hint(point))
    at = across.at(point.x.estimate), _y(up, point.y.estimate)
    picture.line((across.at(point.bar[0]), at[1]), (across.at(point.bar[1]), at[1]), "interval", group)
    if words.bounded(point.y):
        picture.line((at[0], _y(up, point.y.low)), (at[0], _y(up, point.y.high)), "interval", group)
    if chosen:
        picture.dot(at, 9, "ring", group)
    picture.shape(at, SHAPES[point.kind], "mark", group)
    for kind, label in labels.items():
        inner = picture.group(kind, into=group)
        if abs(label.dy) > 5:
            picture.shape(at, leader(label.side, label.dy), "leader", inner)
        side = "start" if label.side > 0 else "end"
        picture.text((at[0], at[1] + label.dy + 4), label.text, f"label {side}", inner, axes.AWAY * label.side)


def _labels(
    found: Sequence[Point],
    places: Sequence[Place],
    layout: Layout,
    asked: Sequence[Limit],
    up: Scale,
    quality: str,
) -> list[Label]:
    """Where the names stand, clear of the words of limits of quality."""
    taken = [axes.text_box(a.text, layout.width, _y(up, a.value) - 2) for a in asked if a.metric == quality]
    return axes.place(places, [p.variant.name for p in found], layout, HEAD + PLOT, taken)


def _legend(picture: Picture, kinds: Sequence[str]) -> None:
    present = [kind for kind in SHAPES if kind in kinds]
    for n, kind in enumerate(present):
        group = picture.group(f"key {kind.replace(' ', '-')}")
        share = n * min(0.25, 1 / len(present))
        picture.shape((share, 8), SHAPES[kind], "mark", group)
        picture.text((share, 12), kind, "value start", group, 10)


# ---- words -------------------------------------------------------------------------------------


def _title(metric: str) -> str:
    """ "latency P50 on chat": a metric's name for a sentence."""
    name, _, workload = metric.partition("@")
    spec = described(name)
    title = spec.title if spec else name
    family = "latency " if name.startswith("latency.") else ""
    return f"{family}{title} on {workload}" if workload else f"{family}{title}"


def _hint(point: Point) -> str:
    by = f"; dominated by {', '.join(point.dominated_by)}" if point.dominated_by else ""
    return f"{point.variant.name}: {_bare(point.x)}, {_bare(point.y)}; {point.kind}{by}"


def _bare(value: Interval) -> str:
    if not words.bounded(value):
        return f"{value.estimate:.4g}"
    return f"{value.estimate:.4g} ({value.low:.4g} to {value.high:.4g})"


def _caption(found: Sequence[Point], beyond: Sequence[str], better: int) -> str:
    sentences = [f"The best corner is {'bottom' if better > 0 else 'top'} left. Bars are 95 % intervals."]
    if not all(words.bounded(point.x) for point in found):
        sentences.append(
            "Where launches are too few for an interval of the time, the bar is that of its ratio to the baseline."
        )
    sentences.append(
        "The dotted steps join the variants that no other one beats in both estimates; they pass over rejected ones."
    )
    pale = sum(bool(point.dominated_by) for point in found)
    if pale:
        sentences.append(
            f"{pale} of {len(found)} are pale: another variant is as good or better in both, and shown to be better in "
            "one."
        )
    if beyond:
        sentences.append(f"Beyond the picture: {', '.join(beyond)}.")
    return " ".join(sentences)


def _table(decision: Decision, quality: str, found: Sequence[Point]) -> words.Table:
    header = ["variant", "outcome", _title(decision.minimize), _title(quality), "dominated by"]
    body = [
        [
            point.variant.name,
            point.kind,
            words.figure(decision.minimize, point.x),
            words.figure(quality, point.y),
            ", ".join(point.dominated_by) or words.MISSING,
        ]
        for point in found
    ]
    return header, [[words.clean(cell) for cell in row] for row in body]
