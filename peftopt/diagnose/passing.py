"""A pass: what a bottleneck's module gets to measure with, within its time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftopt.diagnose import judging
from peftopt.diagnose.cells import Cell, launches_of
from peftopt.diagnose.company import Names
from peftopt.diagnose.measured import Kept, Measured, Turns
from peftopt.diagnose.records import Bottleneck
from peftopt.diagnose.serving import Servers
from peftopt.diagnose.setting import Abilities, Setting, abilities

FIRST_LOOK = judging.LOOKS[0]


@dataclass
class Pass:
    """`until`: when the bottleneck at hand has to be done, in time.monotonic(); it sets no block off later. `folder`
    keeps what is measured; `made` is gone after the pass. `more`: whether blocks are added to a pass before."""

    setting: Setting
    folder: Path
    made: Path
    servers: Servers
    turns: Turns
    names: Names
    until: float = 0.0
    more: bool = False
    tell: Callable[[str], None] = lambda text: None
    notes: list[str] = field(default_factory=list)
    """What a reader should know of the whole pass."""

    @property
    def abilities(self) -> Abilities:
        """What the engine can be asked."""
        return abilities(self.setting.engine)

    @property
    def left_s(self) -> float:
        """Seconds until the bottleneck at hand has to be done."""
        return self.until - time.monotonic()

    async def measure(self, name: Bottleneck, cells: Sequence[Cell], blocks: int = FIRST_LOOK) -> Measured:
        """Ask every cell in each block, in random order, their servers all up; all turns of these cells so far.

        So many `blocks`, or up to the next number at which a comparison is judged where the pass adds to one before; at
        least one, and fewer than that where the time is up.
        """
        if not cells:
            return self.turns.of(name)
        await self.servers.up(launches_of(cells))
        start = self.turns.of(name).next_block
        end = judging.next_look(start) if self.more else blocks
        for block in range(start, end):
            begun = time.monotonic()
            for number in random.SystemRandom().sample(range(len(cells)), len(cells)):
                cell = cells[number]
                turn = await self.servers.asker(cell.launch).ask(cell.load, block, number)
                self.turns.add(Kept(name, block, cell, turn))
            took = time.monotonic() - begun
            self.tell(f"{name}: block {block + 1} of {end}, {took:.1f} s")
            if self.left_s < took:
                break
        return self.turns.of(name)
