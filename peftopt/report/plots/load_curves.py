"""Load curves: what users wait for, and how many are served well, as more of them come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

from peftopt.decision.evidence import Evidence
from peftopt.loadtest import summary
from peftopt.measurements import Load, Sent
from peftopt.records import Decision, Interval, VariantDecision
from peftopt.report import words
from peftopt.report.plots import axes
from peftopt.report.plots.axes import Scale
from peftopt.report.plots.picture import Figure, Picture

HEAD, PANEL, GAP = 20, 120, 34
"""Pixels: above a panel for its title, a panel, and below it."""
FEWEST = 2
"""Rates from which there is a curve."""
SHAPES = (
    "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1-4 0Z",
    "M-4-4H4V4H-4Z",
    "M0-5L5 4H-5Z",
    "M0-5L5 0L0 5L-5 0Z",
    "M0 5L5-4H-5Z",
    "M-4-4L4 4M-4 4L4-4",
    "M0-5V5M-5 0H5",
    "M-5-2H5V2H-5Z",
)
"""The marks of the curves, in turn: they tell curves apart where colours do not."""


@dataclass(frozen=True)
class Step:
    """A variant under one load: requests a second that came in and that were served well; times in ms."""

    rate: float
    ttft: Interval | None
    tpot: Interval | None
    goodput: float | None
    stopped: str = ""


@dataclass(frozen=True)
class Curve:
    """A variant's loads by rate, and the highest rate that a search found to hold."""

    name: str
    steps: tuple[Step, ...]
    highest: float | None = None


@dataclass(frozen=True)
class Panel:
    """A value of a step, as its own panel."""

    title: str
    of: Callable[[Step], Interval | None]
    log: bool


PANELS = (
    Panel("TTFT P50, ms", lambda step: step.ttft, True),
    Panel("TPOT P50, ms", lambda step: step.tpot, True),
    Panel("goodput, requests/s", lambda step: _exactly(step.goodput), False),
)


def curves(decision: Decision, evidence: Evidence) -> list[Curve]:
    """Loads that were run apart at several rates; else the recipe's workloads under load, where they are several."""
    found = [
        Curve(
            variant.name,
            _in_order(_step(load) for load in evidence.loads_apart.get(variant.name, ())),
            max((load.highest_rate or 0.0 for load in evidence.loads_apart.get(variant.name, ())), default=0.0) or None,
        )
        for variant in decision.variants
    ]
    if not any(len(curve.steps) >= FEWEST for curve in found):
        found = [Curve(variant.name, _of_workloads(evidence, variant)) for variant in decision.variants]
    return [curve for curve in found if len(curve.steps) >= FEWEST]


def figure(decision: Decision, evidence: Evidence) -> Figure | None:
    """TTFT, TPOT and goodput against the rate; None where no variant was loaded at two rates."""
    found = curves(decision, evidence)
    panels = [panel for panel in PANELS if any(_drawable(panel, step) for curve in found for step in curve.steps)]
    if not panels:
        return None
    title = "Under load: TTFT, TPOT and goodput against the rate"
    picture = Picture(title, len(panels) * (HEAD + PANEL + GAP), "plane")
    across = Scale.around([step.rate for curve in found for step in curve.steps], log=True)
    for number, panel in enumerate(panels):
        _draw(picture, number, panel, found, across)
    return Figure(
        title=title,
        caption=_caption(found),
        svg=str(picture),
        command="peftopt export-data RUN --table requests --to requests.csv",
        table=_table(found),
    )


# ---- from requests to steps --------------------------------------------------------------------


def _step(load: Load) -> Step | None:
    """A load in numbers; None of one that tells no rate."""
    timed = [_request(sent) for sent in load.requests if not sent.warmup]
    if len(timed) < FEWEST:
        return None
    found = summary.figures(timed, [summary.slo(text) for text in load.slo])
    if found.offered_rate is None or not axes.drawable(found.offered_rate, log=True):
        return None
    served = found.request_rate if found.goodput_rate is None else found.goodput_rate
    return Step(found.offered_rate, found.ttft_p50_ms, found.tpot_p50_ms, served, load.stopped)


def _request(sent: Sent) -> summary.Request:
    """What was kept of a request, as the load test had it."""
    kept = {each.name: getattr(sent, each.name) for each in fields(summary.Request)}
    return summary.Request(**{**kept, "sent": sent.scheduled if sent.sent is None else sent.sent})


def _of_workloads(evidence: Evidence, variant: VariantDecision) -> tuple[Step, ...]:
    """The variant under each workload of the recipe that is a load, with the values of the decision."""
    steps = []
    for name, workload in evidence.plan.recipe.workloads.items():
        turns = evidence.turns.get((variant.name, name), {}).values() if workload.loaded else ()
        spans = [turn[0].turn_ms for turn in turns if turn and turn[0].turn_ms]
        seconds = sum(spans) / 1e3
        if not axes.drawable(seconds, log=True):
            continue
        served = sum(len(turn) for turn in turns) / seconds
        values = variant.figures
        steps.append(
            Step(workload.rate or served, values.get(f"ttft.p50@{name}"), values.get(f"tpot.p50@{name}"), served)
        )
    return _in_order(steps)


def _in_order(steps: Iterable[Step | None]) -> tuple[Step, ...]:
    return tuple(sorted((step for step in steps if step), key=lambda step: step.rate))


# ---- drawing -----------------------------------------------------------------------------------


def _draw(picture: Picture, number: int, panel: Panel, found: Sequence[Curve], across: Scale) -> None:
    top = number * (HEAD + PANEL + GAP) + HEAD
    drawn = [(n, curve, [step for step in curve.steps if _drawable(panel, step)]) for n, curve in enumerate(found)]
    drawn = [(n, curve, steps) for n, curve, steps in drawn if steps]
    values = [panel.of(step) for _, _, steps in drawn for step in steps]
    up = Scale.around([x for value in values if value for x in (value.estimate, value.low, value.high)], panel.log)

    def y(share: float) -> float:
        return top + PANEL * (1 - share)

    picture.corner(True, top - 6, panel.title, "name")
    for share, tick in across.ticks():
        picture.line((share, top), (share, top + PANEL), "grid")
        picture.text((share, top + PANEL + 16), f"{tick:g}/s", "tick middle")
    for share, tick in up.ticks(apart=0.2):
        picture.line((0, y(share)), (1, y(share)), "grid")
        picture.text((0, y(share) + 4), f"{tick:,g}", "tick end", shift=-6)
    ends = []
    for n, curve, steps in drawn:
        group = picture.group(f"series s{n % len(SHAPES)}", curve.name)
        places = []
        for step in steps:
            value = panel.of(step)
            assert value is not None
            low, high = up.ends(value)
            at = across.at(step.rate), y(up.at(value.estimate))
            places.append(at)
            picture.line((at[0], y(low)), (at[0], y(high)), "interval", group)
            picture.shape(at, SHAPES[n % len(SHAPES)], "mark", group)
        picture.curve(places, "curve", group)
        ends.append(places[-1])
    for layout in axes.LAYOUTS:
        inner = picture.group(layout.kind)
        placed = axes.place([(x, y_ - top) for x, y_ in ends], [curve.name for _, curve, _ in drawn], layout, PANEL)
        for (n, _, _), at, label in zip(drawn, ends, placed, strict=True):
            group = picture.group(f"series s{n % len(SHAPES)}", into=inner)
            side = "start" if label.side > 0 else "end"
            picture.text((at[0], at[1] + label.dy + 4), label.text, f"label {side}", group, axes.AWAY * label.side)


def _drawable(panel: Panel, step: Step) -> bool:
    value = panel.of(step)
    return value is not None and axes.drawable(value.estimate, panel.log)


def _exactly(value: float | None) -> Interval | None:
    return None if value is None else Interval(value, value, value, 1)


def _caption(found: Sequence[Curve]) -> str:
    sentences = [
        "Each mark is a load; to the right more requests come in each second. Times that bend upwards, and goodput "
        "that no longer rises, show where the server is full: flat times are good. Bars are 95 % intervals. Goodput "
        "counts the requests that met every service level of the load, or those that were answered where "
        "none was asked.",
    ]
    highest = [f"{curve.name} {curve.highest:.3g}/s" for curve in found if curve.highest is not None]
    if highest:
        sentences.append(f"The highest rate that held: {', '.join(highest)}.")
    return " ".join(sentences)


def _table(found: Sequence[Curve]) -> words.Table:
    header = ["variant", "requests/s", "TTFT P50", "TPOT P50", "goodput, requests/s", "stopped"]
    body = [
        [
            words.clean(curve.name),
            f"{step.rate:.3g}",
            words.figure("ttft.p50", step.ttft),
            words.figure("tpot.p50", step.tpot),
            words.MISSING if step.goodput is None else f"{step.goodput:.3g}",
            words.clean(step.stopped or words.MISSING),
        ]
        for curve in found
        for step in curve.steps
    ]
    return header, body
