"""What a diagnosis says: a row for each part of a bottleneck, with what it costs and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftopt.records import Interval

Bottleneck = Literal["unfused", "choice", "prompts", "batching", "unloading"]

BOTTLENECKS: dict[Bottleneck, str] = {
    "unfused": "adapters applied at every token",
    "choice": "adapters chosen per request",
    "prompts": "virtual tokens",
    "batching": "requests computed alone",
    "unloading": "memory kept after an unload",
}
"""The five, by the name that `--more` takes: what each is."""

Finding = Literal["costs", "no cost", "undecided", "fault", "not asked"]
"""What a row shows. "costs": its interval lies beyond FREE. "no cost": it lies within. "undecided": it does not say.
"fault": something does not work, whatever it costs. "not asked": `why` it could not be measured here."""

FREE = 1.03
"""A ratio up to which a cost is not worth a user's time."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One part of a bottleneck: two ways of serving that differ in one thing, measured in turns.

    `ratio` is the time (or memory) with it over the time without it, paired by block: 1.12 = 12 % more; of what was
    judged, with the interval that was judged, at its level. `extra` is the difference in `unit`. `share` orders rows:
    the part of a usual request's time that it takes, 0 to 1; None where the row is not about a request's time. `advice`
    is what to do, as a command, flag or setting; `gain` what that gained where it was measured here, as a ratio of
    times (0.7 = 30 % less), with `gained` in words; None where it was not. `why` it is undecided, or was not asked.
    """

    bottleneck: Bottleneck
    part: str
    phase: str
    """"prefill", "decode", "whole request", "memory", …"""
    batch: int
    finding: Finding
    sentence: str
    """What was seen, in plain words, with its figures."""
    advice: str = ""
    ratio: Interval | None = None
    extra: Interval | None = None
    unit: str = "ms"
    share: float | None = None
    gain: Interval | None = None
    gained: str = ""
    why: str = ""
    blocks: int = 0


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All rows, dearest first, and how they were measured."""

    rows: tuple[Row, ...]
    engine: str
    base: str
    adapters: tuple[str, ...]
    threads: int
    seconds: float
    """Wall clock of the whole pass."""
    usual_request_ms: Interval
    """A request of the first adapter as it is served: what `Row.share` is a share of."""
    notes: tuple[str, ...] = ()
