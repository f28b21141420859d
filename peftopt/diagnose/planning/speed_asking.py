"""Measures an engine's `Speeds` for a plan: two servers, one merged and one with adapters, asked in turns."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from peftopt import scratch, stats, store
from peftopt.diagnose import keeping
from peftopt.diagnose.measuring import company, making
from peftopt.diagnose.measuring.cells import BASE, BATCH, Launch
from peftopt.diagnose.measuring.serving import Servers
from peftopt.diagnose.planning.speeds import Speeds, Times
from peftopt.diagnose.planning.traffic import Traffic
from peftopt.diagnose.setting import Setting, abilities
from peftopt.engines._server import Server
from peftopt.errors import BROKEN, BadInput, WorkerFailed
from peftopt.loadtest import arrivals
from peftopt.loadtest.client import Reply
from peftopt.loadtest.protocols import Prompt
from peftopt.measurements import as_json, structured
from peftopt.records import Json

T = TypeVar("T")

SPEEDS = "speeds.json"

WEIGHTS = ".safetensors"
"""How files of weights are named, which engines map into memory."""

BLOCKS, FEWEST_BLOCKS, ENOUGH_S = 7, 3, 45.0
"""Every cell is asked once a block. No block is begun after ENOUGH_S, but for the fewest."""

ROWS, MIXED_ROWS = (1, 2, 4, BATCH), (2, BATCH)
"""Requests at once whose decode steps are timed, of one adapter and of as many adapters. Their prompts are short: a
step's time is that of the weights."""

STEPS = 7
"""Tokens of an answer whose gaps are a step's time."""

SHORT_TOKENS, MOST_TOKENS = 16, 512
"""Prompts whose prefill is timed: short ones, and those of the plan up to so many tokens."""

LOADS = 3
"""How often an adapter is unloaded and loaded, to time it."""

Cell = tuple[str, str, int]
"""("merged", "apart" or "mixed", "prefill" or "step", tokens of the prompt or rows)."""


def speeds(setting: Setting, traffic: Traffic, folder: Path, tell: Callable[[str], None]) -> Speeds:
    """The values for a plan, from the folder if they were measured before for the same setting, else measured and
    stored there. Raises BadInput for an engine that cannot serve both merged models and adapters by name."""
    if (folder / keeping.SETTING).is_file() and keeping.read_setting(folder) != setting:
        raise BadInput(f"{folder} holds what was measured of another setting", "choose another --out")
    if (folder / SPEEDS).is_file():
        tell(f"times of {folder / SPEEDS} are used; another --out measures anew")
        return read(folder)
    can = abilities(setting.engine)
    if not (can.starts and can.apart and can.loads):
        hint = "choose --engine eager or vllm"
        raise BadInput(f"--plan needs an engine that is started here and tells adapters apart: {setting.engine}", hint)
    keeping.begin(setting, folder)
    made = scratch.folder(tell)
    try:
        measured = asyncio.run(_session(replace(setting, prompts=""), traffic, folder, made, tell))
    finally:
        shutil.rmtree(made, ignore_errors=True)
    store.write(folder / SPEEDS, json.dumps(as_json(measured), indent=1) + "\n")
    return measured


def read(folder: Path) -> Speeds:
    """The stored measurements. Raises BadInput for a folder without them."""
    try:
        values: Json = json.loads((folder / SPEEDS).read_text(encoding="utf-8"))
        for times in (values["merged"], values["apart"]):
            times.update({name: _numbered(times[name]) for name in ("prefill", "step")})
        values["mixed"] = _numbered(values["mixed"])
    except (OSError, *BROKEN) as error:
        raise BadInput(f"{folder} holds no times of an engine: {error!r}", "choose another --out") from error
    return structured(Speeds, values, "speeds")


def _numbered(values: Json) -> dict[int, Json]:
    """JSON has only texts for keys."""
    return {int(key): value for key, value in values.items()}


async def _session(setting: Setting, traffic: Traffic, folder: Path, made: Path, tell: Callable[[str], None]) -> Speeds:
    notes: list[str] = []
    names = company.gathered(setting, made, notes.append)
    if not names.adapter:
        raise BadInput("--plan needs an adapter that can be merged", "for prompt methods, see peftopt bake")
    async with Servers(setting, folder, names.folders, tell) as servers:
        tell("merging the adapter")
        merge_s, servers.merged = await _timed(asyncio.to_thread(company.merged, setting, names, made, notes.append))
        if not servers.merged:
            raise BadInput("the adapter cannot be merged", "; ".join(notes) or "give another adapter")
        merged = Launch(model="merged")
        apart = Launch(adapters=names.live, lora=True, slots=len(names.live), rank=names.rank)
        tell("starting a server with the merged model, and one with adapters")
        start_s, _ = await _timed(servers.up([merged]))
        await servers.up([apart])
        asking = _Asking(servers, merged, apart, names.live, min(traffic.prompt_tokens, MOST_TOKENS))
        await asking.blocks(tell)
        load_s = [await _reload(servers, apart, names.adapter) for _ in range(LOADS)]
        adapter = Path(names.folders[names.adapter])
        return Speeds(
            engine=setting.engine,
            merged=asking.times("merged"),
            apart=asking.times("apart"),
            mixed=asking.steps("mixed"),
            rows=BATCH,
            sharing=tuple(asking.sharing),
            engine_bytes=memory(servers.servers[merged]),
            apart_bytes=memory(servers.servers[apart]),
            adapter_bytes=sum(file.stat().st_size for file in adapter.glob(f"*{WEIGHTS}")),
            kv_bytes_per_token=making.shape_of(Path(setting.base)).kv_bytes,
            kv_tokens=BATCH * (SHORT_TOKENS + STEPS),
            load_s=tuple(load_s),
            merge_s=(merge_s,),
            start_s=(start_s,),
            notes=tuple(notes),
        )


class _Asking:
    """The cells, asked block by block, each block in another order."""

    def __init__(
        self, servers: Servers, merged: Launch, apart: Launch, names: Sequence[str], prompt_tokens: int
    ) -> None:
        self._servers, self._merged, self._apart, self._names = servers, merged, apart, names
        self.prompt_tokens = max(prompt_tokens, SHORT_TOKENS + 1)
        self._samples: dict[Cell, list[float]] = defaultdict(list)
        self._asked = 0
        self._lengths: dict[int, int] = {}
        """Tokens that a prompt was meant to have -> that the server counted."""
        self.sharing: list[float] = []

    async def blocks(self, tell: Callable[[str], None]) -> None:
        """Ask all cells in blocks, until there are BLOCKS of them or the time is up."""
        cells: list[Cell] = [
            *((way, "prefill", n) for way in ("merged", "apart") for n in (SHORT_TOKENS, self.prompt_tokens)),
            *((way, "step", rows) for way in ("merged", "apart") for rows in ROWS),
            *(("mixed", "step", rows) for rows in MIXED_ROWS),
        ]
        started = time.monotonic()
        for block in range(BLOCKS):
            if block >= FEWEST_BLOCKS and time.monotonic() - started > ENOUGH_S:
                break
            for cell in random.SystemRandom().sample(cells, len(cells)):
                self._samples[cell].append(await self._time(cell))
            self.sharing.append(await self._shared())
            tell(f"block {block + 1} of at most {BLOCKS}, {time.monotonic() - started:.0f} s")

    def times(self, way: str) -> Times:
        """What was measured of one way, in seconds."""
        prefill = {
            self._lengths.get(n, n): tuple(samples)
            for (other, phase, n), samples in self._samples.items()
            if (other, phase) == (way, "prefill")
        }
        return Times(prefill=prefill, step=self.steps(way))

    def steps(self, way: str) -> dict[int, tuple[float, ...]]:
        """Rows -> seconds of a decode step."""
        return {
            rows: tuple(samples)
            for (other, phase, rows), samples in sorted(self._samples.items())
            if (other, phase) == (way, "step")
        }

    async def _time(self, cell: Cell) -> float:
        way, phase, size = cell
        rows = size if phase == "step" else 1
        if way == "merged":
            launch, names = self._merged, (BASE,) * rows
        else:
            launch = self._apart
            names = tuple(self._names[:rows]) if way == "mixed" else (self._names[0],) * rows
        if phase == "step":
            return step_s(await self._replies(launch, names, SHORT_TOKENS, STEPS))
        (reply,) = await self._replies(launch, names, size, 2)
        self._lengths[size] = reply.prompt_tokens or size
        return (reply.times[0] - reply.sent) / 1e9

    async def _shared(self) -> float:
        """How many times longer a step of one row takes while the other server computes too: the mean over both."""
        # the merged model is faster: with more tokens, both compute until about the same time
        merged = self._replies(self._merged, (BASE,), SHORT_TOKENS, 2 * STEPS)
        apart = self._replies(self._apart, (self._names[0],), SHORT_TOKENS, STEPS)
        both = [step_s(replies) for replies in await asyncio.gather(merged, apart)]
        alone = [self._samples["merged", "step", 1][-1], self._samples["apart", "step", 1][-1]]
        return sum(together / single for together, single in zip(both, alone, strict=True)) / 2

    async def _replies(self, launch: Launch, names: Sequence[str], prompt_tokens: int, new_tokens: int) -> list[Reply]:
        """Ask all names at once, each with a prompt of its own. Raises WorkerFailed where one is not answered whole."""
        client = self._servers.client(launch)
        bodies = []
        for name in names:
            self._asked += 1
            prompt = Prompt(text=arrivals.made_up(prompt_tokens, self._asked))
            bodies.append(client.encoded(prompt, self._servers.called(name), new_tokens, stop=False))
        replies = await asyncio.gather(*(client.send(body) for body in bodies))
        for reply in replies:
            if reply.error or len(reply.times) < 2:
                why = reply.error or f"{len(reply.times)} of {new_tokens} tokens came"
                raise WorkerFailed("request failed", why, "the server's log is in the folder's logs")
        return replies


def step_s(replies: Sequence[Reply]) -> float:
    """Seconds of a decode step of all rows: the median request's time per token, while all of them were running."""
    start, end = max(reply.times[0] for reply in replies), min(reply.times[-1] for reply in replies)
    each = []
    for reply in replies:
        times = [at for at in reply.times if start <= at <= end]
        if len(times) < 2 or times[0] == times[-1]:  # hardly ever together: by itself, then
            times = reply.times
        per_message = (reply.new_tokens - 1) / (len(reply.times) - 1)
        each.append((times[-1] - times[0]) / (len(times) - 1) / per_message)
    return stats.median(each) / 1e9


async def _timed(awaited: Awaitable[T]) -> tuple[float, T]:
    started = time.monotonic()
    result = await awaited
    return time.monotonic() - started, result


async def _reload(servers: Servers, launch: Launch, name: str) -> float:
    """Seconds until an adapter that was unloaded is loaded again."""
    client = servers.client(launch)
    error = await client.lora("unload", name)
    seconds, refused = await _timed(client.lora("load", name, servers.folders[name]))
    if error or refused:
        raise WorkerFailed("reload failed", error or refused, "the server's log is in the folder's logs")
    return seconds


def memory(server: Server) -> int:
    """Bytes of one more server of this kind beside this one: the private memory of its processes, and its weights, even
    if another server maps the same file."""
    import psutil

    return sum(_held(psutil.Process(pid).memory_maps()) for pid in server.processes())


def _held(maps: Sequence[Any]) -> int:
    private = sum(int(each.private_clean + each.private_dirty) for each in maps)
    return private + sum(int(each.shared_clean + each.shared_dirty) for each in maps if each.path.endswith(WEIGHTS))
