"""A diagnosis from start to end: measures the bottlenecks one after the other, within its time, and joins their
rows."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from peftopt import machine, scratch, stats
from peftopt.diagnose import keeping
from peftopt.diagnose.bottlenecks import batching, choice, prompts, unfused, unloading
from peftopt.diagnose.measuring import company
from peftopt.diagnose.measuring.measured import TURNS, Turns
from peftopt.diagnose.measuring.passing import Pass
from peftopt.diagnose.measuring.serving import Servers
from peftopt.diagnose.records import Bottleneck, Diagnosis, Row
from peftopt.diagnose.setting import OURS, Setting
from peftopt.forking import ForkServer
from peftopt.records import Interval
from peftopt.runner import process

Measure = Callable[[Pass], Awaitable[Sequence[Row]]]
"""A bottleneck's module: it measures with the pass, until `until`, and says what costs what."""

MODULES: Mapping[Bottleneck, Measure] = {
    "unfused": unfused.rows,
    "choice": choice.rows,
    "prompts": prompts.rows,
    "batching": batching.rows,
    "unloading": unloading.rows,
}
"""Who measures each bottleneck, in the order in which they are measured."""

SHARES: Mapping[Bottleneck, float] = {
    "unfused": 0.25,
    "choice": 0.25,
    "prompts": 0.1,
    "batching": 0.1,
    "unloading": 0.15,
}
"""Of the time, what each bottleneck gets at first. What is left then goes to what is undecided."""

LEAST_S = 15.0
"""With fewer seconds left no bottleneck gets further blocks: one block may take so long."""


def diagnose(
    setting: Setting, folder: Path, minutes: float, more: Bottleneck | None, tell: Callable[[str], None]
) -> Diagnosis:
    """Measure all bottlenecks in about so many `minutes`, or add blocks to one of an earlier diagnosis (`more`).
    Everything is stored in `folder`: setting.json, turns.jsonl, diagnosis.json, logs of servers.

    Raises BadInput for a base or an adapter that cannot be served, MissingEnvironment for an engine that is not
    installed, WorkerFailed for a server that does not start.
    """
    before = keeping.read(folder) if more else None
    keeping.begin(setting, folder)
    made = scratch.folder(tell)
    try:
        diagnosis = asyncio.run(_session(setting, folder, made, minutes, more, before, tell))
    finally:
        shutil.rmtree(made, ignore_errors=True)
    keeping.write(diagnosis, folder)
    return diagnosis


async def _session(
    setting: Setting,
    folder: Path,
    made: Path,
    minutes: float,
    more: Bottleneck | None,
    before: Diagnosis | None,
    tell: Callable[[str], None],
) -> Diagnosis:
    started = time.monotonic()
    notes: list[str] = []
    names = company.gathered(setting, made, notes.append)
    asked = [more] if more else list(MODULES)
    async with contextlib.AsyncExitStack() as stack:
        forks = _fork_server(setting, folder / "logs" / "forks.log", stack)
        servers = await stack.enter_async_context(Servers(setting, folder, names.folders, tell, forks))
        turns = Turns(folder / TURNS)
        end = started + 60 * minutes
        whole = Pass(setting, folder, made, servers, turns, names, end, more=bool(more), tell=tell, notes=notes)
        rows = [row for row in (before.rows if before else ()) if row.bottleneck not in asked]
        for place, bottleneck in enumerate(asked):
            spent = sum(SHARES[other] for other in asked[:place])
            whole.turn_to(1.0 if more else SHARES[bottleneck] / (1.0 - spent))
            rows += await MODULES[bottleneck](whole)
        if not more:
            rows = await _decided(whole, rows, end)
    seconds = time.monotonic() - started
    return Diagnosis(
        rows=ordered(rows),
        engine=setting.engine,
        base=setting.base,
        adapters=tuple(setting.adapters),
        threads=setting.threads or machine.cores(),
        seconds=seconds + (before.seconds if before else 0.0),
        usual_request_ms=usual(turns, setting),
        notes=tuple(dict.fromkeys([*(before.notes if before else ()), *notes])),
    )


async def _decided(whole: Pass, rows: list[Row], end: float) -> list[Row]:
    """The rows after the time that is left, which goes to undecided bottlenecks, those that may cost most first. Cycles
    of unloads are not added to: they have gone on until they told, or until their time was over."""
    whole.more = True
    had = -1
    while end - time.monotonic() > LEAST_S and (doubtful := undecided(rows)) and len(whole.turns.all()) > had:
        had = len(whole.turns.all())
        for place, bottleneck in enumerate(doubtful):
            if end - time.monotonic() > LEAST_S:
                whole.turn_to(1 / (len(doubtful) - place))
                others = [row for row in rows if row.bottleneck != bottleneck]
                rows = [*others, *await MODULES[bottleneck](whole)]
    return rows


def undecided(rows: Sequence[Row]) -> list[Bottleneck]:
    """Bottlenecks that further blocks may decide, by the largest share of a request that one of their undecided rows
    may cost."""
    most: dict[Bottleneck, float] = {}
    for row in rows:
        if row.finding == "undecided" and row.bottleneck != "unloading":
            most[row.bottleneck] = max(most.get(row.bottleneck, 0.0), row.share or 0.0)
    return sorted(most, key=lambda bottleneck: -most[bottleneck])


def _fork_server(setting: Setting, log: Path, stack: contextlib.AsyncExitStack) -> ForkServer | None:
    """What our own servers begin as copies of; None for another engine, and where no process can."""
    if setting.engine != OURS:
        return None
    threads = setting.threads or machine.cores()
    return stack.enter_context(process.fork_server(log, threads, "uvicorn", "peftopt.engines._rows"))


FIRST_TO_LAST = ("fault", "costs", "undecided", "no cost", "not asked")


def ordered(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Faults first, then costs by their share of a request, the largest first, and so on; rows without a measurement
    last."""
    return tuple(sorted(rows, key=lambda row: (FIRST_TO_LAST.index(row.finding), -(row.share or 0.0))))


def usual(turns: Turns, setting: Setting) -> Interval:
    """The time of a lone request: of the first adapter, else of any that was asked alone (ms)."""
    alone = [
        (cell.load.names[0] != setting.first, turn.ttft_ms[0] + turn.tpot_ms[0] * (setting.new_tokens - 1))
        for cell, turn in turns.all()
        if len(turn.ttft_ms) == len(turn.tpot_ms) == len(cell.load.names) == 1 and cell.launch.model == "base"
    ]
    others = min((other for other, _ in alone), default=False)
    return stats.quantile([whole for other, whole in alone if other == others], 0.5)
