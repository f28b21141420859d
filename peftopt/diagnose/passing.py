"""A pass: what a bottleneck's module gets to measure with, within its time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftopt.diagnose import inside, judging
from peftopt.diagnose.asking import Turn, unanswered
from peftopt.diagnose.cells import Cell, launches_of
from peftopt.diagnose.company import Names
from peftopt.diagnose.measured import Kept, Measured, Turns
from peftopt.diagnose.records import Bottleneck
from peftopt.diagnose.serving import Servers
from peftopt.diagnose.setting import Abilities, Setting, abilities
from peftopt.measurements import Caching

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
    _caching: Caching | None = None
    _looked: bool = False

    @property
    def abilities(self) -> Abilities:
        """What the engine can be asked."""
        return abilities(self.setting.engine)

    @property
    def left_s(self) -> float:
        """Seconds until the bottleneck at hand has to be done."""
        return self.until - time.monotonic()

    async def caching(self) -> Caching | None:
        """What is seen of the model in a process of its own, where the engine is ours; it is looked at once."""
        if not self._looked:
            log = self.folder / "logs" / "inside.log"
            self._caching = await asyncio.to_thread(inside.look, self.setting, self.names, log, self.notes.append)
            self._looked = True
        return self._caching

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
                self.turns.add(Kept(name, block, cell, await self._turn(cell, block, number)))
            took = time.monotonic() - begun
            self.tell(f"{name}: block {block + 1} of {end}, {took:.1f} s")
            if self.left_s < took:
                break
        return self.turns.of(name)

    async def _turn(self, cell: Cell, block: int, number: int) -> Turn:
        """A cell asked once; an adapter that has to be fresh is loaded before, and unloaded after."""
        asker, load = self.servers.asker(cell.launch), cell.load
        if not load.fresh:
            return await asker.ask(load, block, number)
        client, name = self.servers.client(cell.launch), f"{load.names[0]}-fresh-{block}"
        if error := await client.lora("load", name, self.servers.folders[load.names[0]]):
            return unanswered(load, error)
        turn = await asker.ask(replace(load, names=(name,) * len(load.names)), block, number)
        error = await client.lora("unload", name)
        return unanswered(load, error) if error else replace(turn, names=load.names)
