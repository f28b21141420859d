"""A pass: the state with which a bottleneck's module measures, within its time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftopt.diagnose import judging
from peftopt.diagnose.measuring import inside
from peftopt.diagnose.measuring.asking import MOST, Turn, unanswered
from peftopt.diagnose.measuring.cells import Cell, launches_of
from peftopt.diagnose.measuring.company import Names
from peftopt.diagnose.measuring.measured import Kept, Measured, Turns
from peftopt.diagnose.measuring.serving import Servers
from peftopt.diagnose.records import Bottleneck
from peftopt.diagnose.setting import Abilities, Setting, abilities
from peftopt.measurements import Caching

FIRST_LOOK = judging.LOOKS[0]
SETTLING = MOST - 1
"""In the place of a cell's number: the prompts of requests that are not timed are not those of any cell."""


@dataclass
class Pass:
    """`end`: when the pass must be done, in time.monotonic(); `share`: the part of the time left that the current
    bottleneck gets. `folder` stores the measurements; `made` is deleted after the pass. `more`: whether blocks are
    added to an earlier pass."""

    setting: Setting
    folder: Path
    made: Path
    servers: Servers
    turns: Turns
    names: Names
    end: float
    share: float = 1.0
    more: bool = False
    tell: Callable[[str], None] = lambda text: None
    notes: list[str] = field(default_factory=list)
    """What a reader should know of the whole pass."""
    _until: float | None = None
    _caching: Caching | None = None
    _looked: bool = False

    @property
    def abilities(self) -> Abilities:
        """What the engine supports."""
        return abilities(self.setting.engine)

    def turn_to(self, share: float) -> None:
        """Go on with the next bottleneck, which gets this part of the time that is left when its servers are up."""
        self.share, self._until = share, None

    @property
    def left_s(self) -> float:
        """Seconds until the current bottleneck must be done; no block starts later. Its time begins when this is first
        asked: the servers that it starts serve later bottlenecks too, so all pay for them."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + (self.end - now) * self.share
        return self._until - now

    async def caching(self) -> Caching | None:
        """The result of looking at the model in a separate process, for peftopt's own engine; it is measured once."""
        if not self._looked:
            log = self.folder / "logs" / "inside.log"
            self._caching = await asyncio.to_thread(
                inside.look, self.setting, self.names, log, self.notes.append, self.servers.forks
            )
            self._looked = True
        return self._caching

    async def measure(self, name: Bottleneck, groups: Sequence[Sequence[Cell]]) -> Measured:
        """Ask cells in blocks, each in random order, with all servers up; returns all turns of the bottleneck so far.

        `groups`: the cells of each comparison, the likely largest costs first. The first block has them all. Then as
        many groups go on as can reach the first look in the time that is left, and at least one: a comparison that
        stops early decides nothing. A pass that adds to an earlier one brings groups below the first look to it, else
        all to the next. Groups stay whole, since a cell is useless in a block without the others of its comparison.
        """
        groups = [group for group in groups if group]
        if not groups:
            return self.turns.of(name)
        await self.servers.up(launches_of(united(groups)))
        self.tell(f"{name}: {max(self.left_s, 0.0):.0f} s for its blocks")
        had = [self.turns.of(name).blocks_of(group) for group in groups]
        least = min(had)
        if self.more and least < FIRST_LOOK:
            groups = [group for group, blocks in zip(groups, had, strict=True) if blocks < FIRST_LOOK]
        wanted = united(groups)
        blocks = (judging.next_look(least) if self.more else FIRST_LOOK) - least
        start = self.turns.of(name).next_block
        for block in range(start, start + blocks):
            begun = time.monotonic()
            took = await self._block(name, wanted, block)
            self.tell(f"{name}: block {block - start + 1} of {blocks}, {time.monotonic() - begun:.1f} s")
            if block == start:
                wanted = fitting(groups, took, self.left_s / max(blocks - 1, 1))
            if self.left_s < time.monotonic() - begun:
                break
        return self.turns.of(name)

    async def _block(self, name: Bottleneck, cells: Sequence[Cell], block: int) -> dict[Cell, float]:
        """Every cell once, in random order; the seconds of each."""
        took = {}
        for number in random.SystemRandom().sample(range(len(cells)), len(cells)):
            begun = time.monotonic()
            self.turns.add(Kept(name, block, cells[number], await self._turn(cells[number], block, number)))
            took[cells[number]] = time.monotonic() - begun
        return took

    async def _turn(self, cell: Cell, block: int, number: int) -> Turn:
        """A cell asked once; an adapter that has to be fresh is loaded before, and unloaded after."""
        asker, load = self.servers.asker(cell.launch), cell.load
        if load.settled:
            await asker.ask(replace(load, names=tuple(dict.fromkeys(load.names)), new_tokens=(1,)), block, SETTLING)
        if not load.fresh:
            return await asker.ask(load, block, number)
        client, name = self.servers.client(cell.launch), f"{load.names[0]}-fresh-{block}"
        if error := await client.lora("load", name, self.servers.folders[load.names[0]]):
            return unanswered(load, error)
        turn = await asker.ask(replace(load, names=(name,) * len(load.names)), block, number)
        error = await client.lora("unload", name)
        return unanswered(load, f"its unload: {error}") if error else replace(turn, names=load.names)


def united(groups: Iterable[Iterable[Cell]]) -> list[Cell]:
    """The cells of all groups, each once."""
    return list(dict.fromkeys(cell for group in groups for cell in group))


def fitting(groups: Sequence[Sequence[Cell]], took: Mapping[Cell, float], seconds: float) -> list[Cell]:
    """The cells of the first groups that fit in so many seconds a block, and of the first one in any case. Cells that
    were not asked in this pass need no time. Pure."""
    asked = [[cell for cell in group if cell in took] for group in groups]
    kept: list[list[Cell]] = []
    for group in filter(None, asked):
        more = united([*kept, group])
        if not kept or sum(took[cell] for cell in more) <= seconds:
            kept.append(group)
    return united(kept)
