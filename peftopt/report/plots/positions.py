"""Divergence by position: where in an answer a variant leaves the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from peftopt.decision.evidence import Evidence
from peftopt.measurements import Answer
from peftopt.metrics import counted, format_value
from peftopt.records import Decision
from peftopt.report import words
from peftopt.report.plots.axes import Scale
from peftopt.report.plots.picture import Figure, Picture, kind_of, titled
from peftopt.report.plots.rows import Row, Rows

STRIP = 34
FEWEST = 5
"""Prompts whose answers reach a position, from which its mean is shown."""
LEAST = 1e-6
"""Nats below which a mean is drawn as nothing: the last digits of a sum."""

Span = tuple[int, int]
"""The first and the last position, from 1."""


@dataclass(frozen=True)
class Curve:
    """A variant's mean by span of positions, in nats, and of how many prompts it is."""

    name: str
    kind: str
    means: Mapping[Span, float]
    prompts: Mapping[Span, int]


@dataclass(frozen=True)
class Reading:
    """What is read of an answer at each scored token, and what it is called."""

    of: Callable[[Answer], tuple[float, ...]]
    title: str
    about: str


READINGS = (
    Reading(
        lambda answer: answer.kl_tokens,
        "KL divergence by position",
        "Mean KL divergence from {baseline} at a token of the scored answers, in nats.",
    ),
    Reading(
        lambda answer: answer.noise,
        "Shift of preference by position",
        "By how many nats the preference for {baseline}'s first choice over its second changes at a token, on average.",
    ),
)
"""In the order of preference: runs of an older peftopt have only the second."""


def spans(longest: int) -> list[Span]:
    """1, 2, 3 to 4, 5 to 8, … up to `longest`: few tokens apart where much happens, many where little does."""
    found = [(1, 1)]
    while found[-1][1] < longest:
        last = found[-1][1]
        found.append((last + 1, 2 * last))
    return found


def curves(decision: Decision, evidence: Evidence, reading: Reading) -> list[Curve]:
    """Each variant's means, of the baseline those of its second run; a variant without scores is left out."""
    found = []
    for variant in decision.variants:
        is_baseline = variant.name == decision.baseline
        answers = evidence.rows(variant.name, 2 if is_baseline else 1).values()
        told = [values for answer in answers if (values := reading.of(answer)) and all(map(math.isfinite, values))]
        means, prompts = {}, {}
        for first, last in spans(max(map(len, told), default=0)):
            inside = [values[first - 1 : last] for values in told if len(values) >= first]
            if len(inside) >= FEWEST:
                means[first, last] = sum(map(sum, inside)) / sum(map(len, inside))
                prompts[first, last] = len(inside)
        if means:
            name = f"{variant.name}, second run" if is_baseline else variant.name
            found.append(Curve(name, kind_of(variant.name, variant.outcome, decision.baseline), means, prompts))
    return found


def figure(decision: Decision, evidence: Evidence) -> Figure | None:
    """Bars by position on a log scale; None where no variant was scored."""
    for reading in READINGS:
        found = curves(decision, evidence, reading)
        if any(mean > LEAST for curve in found if curve.kind != "baseline" for mean in curve.means.values()):
            return _figure(decision, found, reading)
    return None


def _figure(decision: Decision, found: Sequence[Curve], reading: Reading) -> Figure:
    shown = sorted({span for curve in found for span in curve.means})
    up = Scale.around([mean for curve in found for mean in curve.means.values() if mean > LEAST], log=True, least=0.3)
    noise = next((curve.means for curve in found if curve.kind == "baseline"), {})
    rows_ = Rows(reading.title, [_row(curve) for curve in found], STRIP)
    width = 1 / len(shown)
    rows_.axis([((n + 0.5) * width, _span(span)) for n, span in enumerate(shown)], lines=False)
    for number, curve in enumerate(found):
        group, top = rows_.row(number)
        for n, span in enumerate(shown):
            _draw(rows_.picture, group, top, up, (n * width, width), span, curve, noise)
    beside = "The thin mark in each bar's place is its second run: what chance gives." if noise else ""
    return Figure(
        title=reading.title,
        caption=f"{reading.about.format(baseline=decision.baseline)} A bar is a span of positions, the first token on "
        f"the left; its height is on a log scale from {_nats(math.exp(up.low))} to {_nats(math.exp(up.high))}. "
        f"Bars that rise to the right tell of errors that add up. {beside}".strip(),
        svg=str(rows_.picture),
        command="peftopt export-data RUN --table answers --to answers.csv",
        table=(
            ["variant", *(f"tokens {_span(span)}" for span in shown)],
            [[words.clean(curve.name), *(_cell(curve, span) for span in shown)] for curve in found],
        ),
        secondary=True,
    )


def _draw(
    picture: Picture,
    group: Element,
    top: float,
    up: Scale,
    place: tuple[float, float],
    span: Span,
    curve: Curve,
    noise: Mapping[Span, float],
) -> None:
    """A bar in its place (its left edge and width), and the noise."""
    left, width = place
    mean = curve.means.get(span)
    if mean is not None and mean > LEAST:
        height = STRIP * up.at(mean)
        bar = picture.bar((left + 0.06 * width, top + STRIP - height), 0.88 * width, height, "column", group)
        titled(bar, f"tokens {_span(span)}: {_nats(mean)} ({counted(curve.prompts[span], 'prompt')})")
    if span in noise and noise[span] > LEAST and curve.kind != "baseline":
        y = top + STRIP * (1 - up.at(noise[span]))
        picture.line((left + 0.02 * width, y), (left + 0.98 * width, y), "noise", group)


def _row(curve: Curve) -> Row:
    first, last = min(curve.means), max(curve.means)
    value = f"{curve.means[first]:.2g} → {curve.means[last]:.2g} nats"
    hint = f"{curve.name}: {_nats(curve.means[first])} at the first token, {_nats(curve.means[last])} at the last ones"
    return Row(curve.name, curve.kind, value, hint)


def _span(span: Span) -> str:
    first, last = span
    return str(first) if first == last else f"{first}–{last}"


def _nats(value: float) -> str:
    return format_value("nats", value)


def _cell(curve: Curve, span: Span) -> str:
    return _nats(curve.means[span]) if span in curve.means else words.MISSING
