"""Cells, and pairs of them that differ in one thing. Pure.

A cell is a server, by how it is launched, and the requests that are sent to it together. The cells of a pair differ in
one thing, so the difference of their times is the cost of that thing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

BATCH = 8
"""Requests at once, where costs in a batch are asked for."""

BASE = "base"
"""What stands for the base's served name in a load; an adapter's own name stands for itself."""


@dataclass(frozen=True)
class Launch:
    """How a server is started. `model`: "base", or "merged" with the first adapter. `adapters`: the loaded ones, by
    their served names. `lora`: whether it can serve adapters, for engines that must be told; `slots` adapters in one
    batch and room for a `rank`, 0 if the engine has no such setting. `rows`: requests that it computes at once."""

    model: Literal["base", "merged"] = "base"
    adapters: tuple[str, ...] = ()
    lora: bool = False
    slots: int = 0
    rank: int = 0
    rows: int = BATCH
    prefix_caching: bool = False


Order = Literal["together", "one by one", "waves", "joining"]
"""How requests follow each other. "together": all at once. "one by one": each when the one before is answered.
"waves": BATCH at once, and the next when all of them are answered. "joining": BATCH at once, each new one when any is
answered."""


@dataclass(frozen=True)
class Load:
    """Requests: the name that each asks (`names`), and the tokens of its answer (`new_tokens`, one for all, or one for
    each in turn). Prompts have `prompt_tokens` of their own after `shared_tokens` that all have in common. `fresh`: the
    adapter has just been loaded, under a new name. `settled`: each adapter has just been asked once, so that an engine
    with room for all of them holds them, whatever was asked before."""

    names: tuple[str, ...]
    prompt_tokens: int
    new_tokens: tuple[int, ...]
    shared_tokens: int = 0
    order: Order = "together"
    fresh: bool = False
    settled: bool = False

    @property
    def answers(self) -> tuple[int, ...]:
        """The tokens of each request's answer."""
        return tuple(self.new_tokens[number % len(self.new_tokens)] for number in range(len(self.names)))


@dataclass(frozen=True)
class Cell:
    """A server and its requests."""

    launch: Launch
    load: Load


@dataclass(frozen=True)
class Pair:
    """Two cells that differ in one thing: `costly` has it, `plain` has not."""

    part: str
    costly: Cell
    plain: Cell

    @property
    def one_server(self) -> bool:
        """Whether both are asked on one server: then differences between launches do not affect their ratio."""
        return self.costly.launch == self.plain.launch


def differing(one: Cell, other: Cell) -> list[str]:
    """The things in which two cells differ, by their names in Launch and Load."""
    both = ((one.launch, other.launch), (one.load, other.load))
    return [each.name for a, b in both for each in fields(a) if getattr(a, each.name) != getattr(b, each.name)]


def cells_of(pairs: Iterable[Pair]) -> list[Cell]:
    """Every cell of the pairs once, in order."""
    return list(dict.fromkeys(cell for pair in pairs for cell in (pair.plain, pair.costly)))


def launches_of(cells: Iterable[Cell]) -> list[Launch]:
    """Every server that cells ask, once."""
    return list(dict.fromkeys(cell.launch for cell in cells))


def evenly(names: Sequence[str], requests: int) -> tuple[str, ...]:
    """The names for so many requests, each name in turn."""
    return tuple(names[number % len(names)] for number in range(requests))


def skewed(names: Sequence[str], requests: int) -> tuple[str, ...]:
    """The names for so many requests by Zipf's law with exponent 1: the k-th name by 1 / k, rounded to whole
    requests."""
    weights = [1 / place for place in range(1, len(names) + 1)]
    wanted = [requests * weight / sum(weights) for weight in weights]
    counts = [int(each) for each in wanted]
    rest = sorted(range(len(names)), key=lambda place: (counts[place] - wanted[place], place))
    for place in rest[: requests - sum(counts)]:
        counts[place] += 1
    return tuple(name for name, count in zip(names, counts, strict=True) for _ in range(count))
