"""Parts of bottlenecks: a pair to measure and its texts; servers and requests that many share. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from peftopt.diagnose.measuring.cells import Cell, Launch, Load, Pair, cells_of
from peftopt.diagnose.measuring.company import Names
from peftopt.diagnose.measuring.measured import Measured
from peftopt.diagnose.records import Bottleneck, Row
from peftopt.diagnose.rows import costs
from peftopt.diagnose.rows.advice import advice
from peftopt.diagnose.rows.costs import Phase, Told
from peftopt.diagnose.setting import Setting, abilities
from peftopt.records import Interval


@dataclass(frozen=True)
class Part:
    """A pair to measure, and its texts: the `phases` to compare, the `subject` of its sentences, the `words` of its
    advice."""

    pair: Pair
    batch: int
    phases: tuple[Phase, ...]
    subject: str
    words: Mapping[str, object] = field(default_factory=dict)


def groups(parts: Iterable[Part]) -> list[list[Cell]]:
    """The cells of each part, for a pass without time for all."""
    return [cells_of([part.pair]) for part in parts]


def rows_of(bottleneck: Bottleneck, setting: Setting, part: Part, measured: Measured) -> dict[Phase, Row]:
    """A row for each phase of a part."""
    told = Told(part.subject, advice(part.pair.part, setting.engine, **part.words), part.batch)
    tokens = setting.new_tokens
    return {phase: costs.row(bottleneck, part.pair, phase, measured, told, tokens) for phase in part.phases}


def all_rows(bottleneck: Bottleneck, setting: Setting, parts: Iterable[Part], measured: Measured) -> list[Row]:
    """The rows of all parts."""
    return [row for part in parts for row in rows_of(bottleneck, setting, part, measured).values()]


def gained(row: Row, gain: Interval | None, what: str) -> Row:
    """The row with the gain of its advice."""
    return replace(row, gain=gain, gained=what) if gain else row


# ---- servers -------------------------------------------------------------------------------------


def alone(setting: Setting, names: Names) -> Launch:
    """A server of one adapter."""
    can = abilities(setting.engine)
    if not can.starts:
        return Launch(adapters=names.all)
    return Launch(adapters=(names.adapter,), lora=can.told, slots=int(can.told), rank=names.rank if can.told else 0)


def together(setting: Setting, names: Names) -> Launch:
    """A server of all adapters."""
    one = alone(setting, names)
    if not one.lora:
        return replace(one, adapters=names.all)
    return replace(one, adapters=names.all, slots=len(names.all), rank=names.padded_rank or names.rank)


# ---- requests ------------------------------------------------------------------------------------


def asking(setting: Setting, launch: Launch, names: tuple[str, ...]) -> Cell:
    """A cell of the usual requests, sent together."""
    return Cell(launch, Load(names, setting.prompt_tokens, (setting.steps,)))


def lone(setting: Setting, launch: Launch, name: str, batch: int) -> Cell:
    """A cell of one name."""
    return asking(setting, launch, (name,) * batch)
