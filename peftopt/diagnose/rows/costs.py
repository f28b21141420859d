"""A pair's turns as a row: the cost, its certainty, and the part of a request that it takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from peftopt import stats
from peftopt.diagnose import judging
from peftopt.diagnose.measuring.cells import Cell, Pair
from peftopt.diagnose.measuring.measured import Measured
from peftopt.diagnose.records import Bottleneck, Row
from peftopt.metrics import counted
from peftopt.records import Interval

Phase = Literal["prefill", "decode", "whole request"]

TIMES: dict[Phase, str] = {
    "prefill": "the time to the first token",
    "decode": "the time per token after the first",
    "whole request": "the whole request",
}


@dataclass(frozen=True)
class Told:
    """A row's texts: `subject` begins its sentence, `advice` is for a cost."""

    subject: str
    advice: str
    batch: int
    aside: str = ""
    """More to know, after the figures."""


def row(bottleneck: Bottleneck, pair: Pair, phase: Phase, measured: Measured, told: Told, tokens: int) -> Row:
    """The row of a pair for a phase, with answers of so many tokens. Without blocks it is "undecided", and a "fault" if
    the server refused."""
    costly, plain = measured.paired(pair, phase)
    blank = Row(
        bottleneck=bottleneck, part=pair.part, phase=phase, batch=told.batch, finding="undecided", sentence=told.subject
    )
    refused = measured.failures(pair.costly) or measured.failures(pair.plain)
    if refused and not costly:
        sentence = f"{told.subject}: requests are not answered: {refused[0]}"
        return replace(blank, finding="fault", sentence=sentence, advice="read the server's log", why=refused[0])
    if not costly:
        why = "no block was measured in the time"
        return replace(blank, sentence=f"{told.subject}: {why}", why=why, advice=more(bottleneck))
    judged = judging.judged(judging.logs_of(costly, plain), pair.one_server)
    extra = judging.difference(costly, plain)
    return replace(
        blank,
        finding=judged.finding,
        sentence=_sentence(judged, phase, costly, plain, told),
        advice=_advice(judged, bottleneck, told),
        ratio=judged.ratio,
        extra=extra,
        share=share(measured, pair.costly, phase, extra.estimate, tokens),
        blocks=judged.blocks,
        why=judged.why,
    )


def not_asked(bottleneck: Bottleneck, part: str, why: str, batch: int = 1) -> Row:
    """A part that could not be measured here."""
    return Row(
        bottleneck=bottleneck,
        part=part,
        phase="",
        batch=batch,
        finding="not asked",
        sentence=f"{part}: not asked",
        why=why,
    )


def more(bottleneck: Bottleneck) -> str:
    """How to decide an undecided row."""
    return f"peftopt diagnose --more {bottleneck}"


def share(measured: Measured, cell: Cell, phase: Phase, extra_ms: float, tokens: int) -> float | None:
    """The part of the cell's request that so many more ms of a phase take, 0 to 1; None if not known."""
    times = "whole request" if phase == "whole request" else "prefill"
    known = list(measured.values(cell, times).values())
    gaps = list(measured.values(cell, "decode").values())
    if not known or (phase != "whole request" and not gaps):
        return None
    whole = stats.median(known)
    if phase != "whole request":
        whole += stats.median(gaps) * (tokens - 1)
    extra = extra_ms * (tokens - 1) if phase == "decode" else extra_ms
    return min(max(extra / whole, 0.0), 1.0)


def gain(measured: Measured, before: Cell, after: Cell, phase: Phase = "whole request") -> Interval | None:
    """The time after a piece of advice over the time before, if both were measured; else None."""
    return judging.ratio(*measured.paired(Pair("gain", costly=after, plain=before), phase))


def _sentence(judged: judging.Judged, phase: Phase, costly: Sequence[float], plain: Sequence[float], told: Told) -> str:
    before, after = (_ms(stats.median(times)) for times in (plain, costly))
    figures = f"{TIMES[phase]} is {after} instead of {before} ({counted(judged.blocks, 'block')})"
    aside = f"; {told.aside}" if told.aside else ""
    return f"{told.subject}: {figures}{aside}"


def _advice(judged: judging.Judged, bottleneck: Bottleneck, told: Told) -> str:
    if judged.finding == "costs":
        return told.advice
    return more(bottleneck) if judged.finding == "undecided" else ""


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"
