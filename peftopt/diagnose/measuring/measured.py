"""The turns of a diagnosis: stored on disk as they come, and compared by block."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt.diagnose.measuring.asking import Turn
from peftopt.diagnose.measuring.cells import Cell, Pair
from peftopt.errors import BadInput
from peftopt.measurements import as_json, structured
from peftopt.redaction import redacted

TURNS = "turns.jsonl"


@dataclass(frozen=True)
class Kept:
    """A line of the file: a cell's turn in a block of a bottleneck."""

    bottleneck: str
    block: int
    cell: Cell
    turn: Turn


class Turns:
    """All turns of a diagnosis."""

    def __init__(self, file: Path) -> None:
        """Reads those of a diagnosis that goes on. Raises BadInput for a line that is not one."""
        self._file = file
        self._kept: list[Kept] = []
        if file.exists():
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                self._kept.append(_read(file, number, line))

    def add(self, kept: Kept) -> None:
        """One more, on disk before this returns."""
        self._kept.append(kept)
        with self._file.open("a", encoding="utf-8", errors="backslashreplace") as lines:
            lines.write(redacted(json.dumps(as_json(kept), ensure_ascii=False)) + "\n")
            lines.flush()
            os.fsync(lines.fileno())

    def all(self) -> list[tuple[Cell, Turn]]:
        """Every turn of every bottleneck."""
        return [(kept.cell, kept.turn) for kept in self._kept]

    def of(self, bottleneck: str) -> Measured:
        """Those of a bottleneck."""
        return Measured([kept for kept in self._kept if kept.bottleneck == bottleneck])


class Measured:
    """The turns of a bottleneck, by cell and block. Pure."""

    def __init__(self, kept: Sequence[Kept]) -> None:
        self._turns: dict[Cell, dict[int, Turn]] = {}
        for each in kept:
            self._turns.setdefault(each.cell, {})[each.block] = each.turn

    @property
    def next_block(self) -> int:
        """The number of the block that comes next."""
        return 1 + max((block for turns in self._turns.values() for block in turns), default=-1)

    def turns(self, cell: Cell) -> dict[int, Turn]:
        """A cell's turns by block; {} for one that was not asked."""
        return self._turns.get(cell, {})

    def blocks_of(self, cells: Sequence[Cell]) -> int:
        """The number of blocks in which all of these cells were asked."""
        return len(set.intersection(*(set(self.turns(cell)) for cell in cells)))

    def values(self, cell: Cell, phase: str) -> dict[int, float]:
        """A cell's times by block, if all its requests were answered."""
        values = {block: turn.value(phase) for block, turn in self.turns(cell).items()}
        return {block: value for block, value in values.items() if value is not None}

    def paired(self, pair: Pair, phase: str) -> tuple[list[float], list[float]]:
        """The times of both cells in the blocks that have both, in order: (costly, plain)."""
        costly, plain = self.values(pair.costly, phase), self.values(pair.plain, phase)
        blocks = sorted(costly.keys() & plain.keys())
        return [costly[block] for block in blocks], [plain[block] for block in blocks]

    def failures(self, cell: Cell) -> list[str]:
        """Why requests of the cell were not answered."""
        return [why for turn in self.turns(cell).values() for why in turn.failed]


def _read(file: Path, number: int, line: str) -> Kept:
    try:
        return structured(Kept, json.loads(line), "turn")
    except (ValueError, BadInput) as error:
        hint = "start anew with another --out, or remove the line"
        raise BadInput(f"{file}:{number} is not a turn of a diagnosis: {error}", hint) from error
