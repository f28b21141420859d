"""Adapters applied at every token: the costs in parts, each a pair of cells that differ in one thing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from peftopt.diagnose.bottlenecks import differs
from peftopt.diagnose.measuring import company
from peftopt.diagnose.measuring.cells import BASE, BATCH, Cell, Launch, Load, Pair, cells_of, evenly, launches_of
from peftopt.diagnose.measuring.company import Names
from peftopt.diagnose.measuring.measured import Measured
from peftopt.diagnose.measuring.passing import Pass, united
from peftopt.diagnose.records import Bottleneck, Row
from peftopt.diagnose.rows import beyond, costs, expected
from peftopt.diagnose.rows.parts import Part, alone, asking, gained, lone, rows_of, together
from peftopt.diagnose.setting import Setting, abilities
from peftopt.diagnose.unloading import resting
from peftopt.metrics import percent
from peftopt.models.adapter import WEIGHTS

NAME: Bottleneck = "unfused"
SWITCHES = 4
"""Requests that alternate between two adapters."""


def parts(setting: Setting, names: Names) -> list[Part]:
    """Every part that the engine supports, as far as there are names for it."""
    can = abilities(setting.engine)
    if not (can.apart and names.adapter):
        return []
    if not can.starts:
        running = Launch(adapters=names.all)
        return [
            *_adapter(setting, names, running),
            *_padding(setting, names, running),
            *_beside(setting, names, running),
        ]
    one, many = alone(setting, names), together(setting, names)
    return [
        *_adapter(setting, names, one),
        *_capability(setting, names, one),
        *_slots(setting, names, one, many),
        *_padding(setting, names, one if can.told else many),
        *_beside(setting, names, many),
    ]


def _capability(setting: Setting, names: Names, one: Launch) -> list[Part]:
    """A server that is able to serve the adapter, against one that is not; the base is asked."""
    subject = "A server that can serve adapters, asked for the base"
    return [
        Part(
            Pair("capability", costly=lone(setting, one, BASE, batch), plain=lone(setting, Launch(), BASE, batch)),
            batch,
            ("prefill", "decode"),
            subject,
            {},
        )
        for batch in (1, BATCH)
    ]


def _adapter(setting: Setting, names: Names, one: Launch) -> list[Part]:
    """The adapter asked against the base, on one server."""
    words = {"base": setting.base, "adapter": setting.adapters.get(names.adapter, names.adapter)}
    return [
        Part(
            Pair("the adapter", costly=lone(setting, one, names.adapter, batch), plain=lone(setting, one, BASE, batch)),
            batch,
            ("prefill", "decode"),
            f"{names.adapter}, not merged, against the base",
            words,
        )
        for batch in (1, BATCH)
    ]


def _slots(setting: Setting, names: Names, one: Launch, many: Launch) -> list[Part]:
    """Room for other adapters, which nobody asks."""
    if len(many.adapters) < 2:
        return []
    roomy = replace(one, slots=many.slots) if one.lora else many
    pair = Pair("slots", costly=lone(setting, roomy, names.adapter, 1), plain=lone(setting, one, names.adapter, 1))
    subject = f"{names.adapter} with room for {len(many.adapters)} adapters instead of one"
    return [Part(pair, 1, ("prefill", "decode"), subject, {"live": len(setting.adapters)})]


def _padding(setting: Setting, names: Names, launch: Launch) -> list[Part]:
    """A rank that is higher than the adapter's: of the engine's room where it has such a setting, else of its files."""
    if not names.other_rank:
        return []
    costly, plain = launch, launch
    high, low = (names.adapter, names.other_rank) if names.cut else (names.other_rank, names.adapter)
    subject = f"{names.adapter} padded with zeros to rank {names.padded_rank} instead of {names.rank}"
    if names.cut:
        subject = f"{names.adapter}, whose rank of {names.padded_rank} is zeros beyond {names.rank}"
    elif launch.lora:
        costly, high = replace(launch, rank=names.padded_rank), names.adapter
        subject = f"{names.adapter} with room for rank {names.padded_rank} instead of {names.rank}"
    return [
        Part(
            Pair("rank padding", costly=lone(setting, costly, high, batch), plain=lone(setting, plain, low, batch)),
            batch,
            ("prefill", "decode"),
            subject,
            {"rank": names.rank},
        )
        for batch in (1, BATCH)
    ]


def _beside(setting: Setting, names: Names, many: Launch) -> list[Part]:
    """What adapters cost that share a server: ranks that are mixed, switching from one to the other."""
    if not names.others:
        return []
    asked, other = names.adapter, names.others[0]
    found: list[Part] = []
    if names.other_rank and abilities(setting.engine).mixes:
        mixed = asking(setting, many, evenly((asked, names.other_rank), BATCH))
        alike = asking(setting, many, evenly((asked, other), BATCH))
        subject = f"A batch of ranks {names.rank} and {names.padded_rank} instead of two adapters of one rank"
        found.append(Part(Pair("mixed ranks", mixed, alike), BATCH, ("prefill", "decode"), subject, {}))
    load = Load((asked,) * SWITCHES, setting.prompt_tokens, (1,), order="one by one")
    alternating = replace(load, names=evenly((asked, other), SWITCHES))
    pair = Pair("switching", costly=Cell(many, alternating), plain=Cell(many, load))
    found.append(Part(pair, 1, ("prefill",), "Requests that alternate between two adapters", {}))
    return found


def why(setting: Setting, names: Names) -> str:
    """Why no part is measured."""
    if not names.adapter:
        return "no adapter changes layers: virtual tokens are a bottleneck of their own"
    return f"{setting.engine} tells no adapters apart by name"


async def rows(diagnosed: Pass) -> list[Row]:
    """Measure the parts and their costs."""
    setting, names = diagnosed.setting, diagnosed.names
    wanted = parts(setting, names)
    if not wanted:
        return [costs.not_asked(NAME, "the adapter", why(setting, names))]
    work = expected.read(Path(setting.base), Path(names.folders[names.adapter]))
    merged, caching = await asyncio.gather(_merged(diagnosed), diagnosed.caching())
    asked = [_with_merged(setting, part, merged) for part in wanted]
    await diagnosed.servers.up(launches_of(united(asked)))
    silent = await differs.unchanged(diagnosed, NAME, alone(setting, names), [names.adapter])
    measured = await diagnosed.measure(NAME, asked)
    told = [row for part in wanted for row in _rows(setting, part, measured, merged)]
    share = caching.adapter_share if caching else None
    more = beyond.rows(work, names, wanted, measured, _swollen(diagnosed)) if work else []
    return [*silent, *more, *(explained(beyond.explained(row, None if more else work), share) for row in told)]


def _with_merged(setting: Setting, part: Part, merged: Launch | None) -> list[Cell]:
    """The cells of a part; the merged model's too, where merging is what to do."""
    cells = cells_of([part.pair])
    if merged and part.pair.part == "the adapter":
        cells.append(lone(setting, merged, BASE, part.batch))
    return cells


def _swollen(diagnosed: Pass) -> bool:
    """Whether all adapters together take far more memory than their files do; False where that is not known."""
    setting, names, servers = diagnosed.setting, diagnosed.names, diagnosed.servers
    one, many = alone(setting, names), together(setting, names)
    if one == many or one.lora or not {one, many} <= servers.servers.keys():
        return False
    before, after = (resting.host_memory(servers.servers[launch].processes()) for launch in (one, many))
    if before is None or after is None:
        return False
    files = sum((Path(names.folders[name]) / WEIGHTS).stat().st_size for name in set(many.adapters) - set(one.adapters))
    return expected.swollen(after - before, files)


async def _merged(diagnosed: Pass) -> Launch | None:
    """The adapter merged, to measure what that gains; None where it cannot be."""
    note, servers = diagnosed.notes.append, diagnosed.servers
    if diagnosed.abilities.starts:
        diagnosed.tell("merging the adapter, to measure what that gains")
    merge = (diagnosed.setting, diagnosed.names, diagnosed.made, note)
    servers.merged = servers.merged or await asyncio.to_thread(company.merged, *merge)
    return Launch(model="merged") if servers.merged else None


def explained(row: Row, share: float | None) -> Row:
    """The row on a single token of the adapter, with the share of its matrices by a profile as an explanation."""
    if share is None or (row.part, row.phase, row.batch) != ("the adapter", "decode", 1):
        return row
    return replace(row, sentence=f"{row.sentence}; by a profile its matrices take {percent(share)} of a token's time")


def _rows(setting: Setting, part: Part, measured: Measured, merged: Launch | None) -> list[Row]:
    """The rows of a part; the adapter's own say what merging gained, where it was measured."""
    rows = rows_of(NAME, setting, part, measured)
    if part.pair.part != "the adapter" or not merged:
        return list(rows.values())
    after = lone(setting, merged, BASE, part.batch)
    return [gained(row, costs.gain(measured, part.pair.costly, after, phase), "merged") for phase, row in rows.items()]
