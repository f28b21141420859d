"""An adapter's life on a running server: load, answer, unload, and another's weights under the same name and path.

two adapters, each under a name of its own, and what is served beside them -> their fingerprints
    -> both in turn under one name -> after each load and unload all are asked again, alone and at once

A cache that knows an adapter only by its name goes on serving the old one's: that is what a reload looks for. Whether a
load or an unload spoils what others are served is what the others are asked for.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftopt import scratch
from peftopt.canary import fingerprint, mixed
from peftopt.canary.fingerprint import Known, Wrong
from peftopt.errors import ACCEPTED, INCONCLUSIVE, REJECTED, WorkerFailed
from peftopt.loadtest.client import Client
from peftopt.loadtest.protocols import Target

NAME = "peftopt-canary"
"""Under which adapters are loaded here; their own names on the server are left alone."""

Prompts = Mapping[str, Sequence[Mapping[str, str]]]


@dataclass
class Lived:
    """What was seen. Times in seconds, in order: `load_s` of a load, `first_s` of the first request after it, `warm_s`
    of the same request again, `unload_s`.

    Of `asked` answers, `stale` are those of the reloaded name that were not of the weights just loaded, and `wrong`
    those of another model that is served; `kept`: times that a name was still served after its unload; `alike`: pairs
    that no prompt tells apart; `failed` requests of mixed batches.
    """

    residents: list[str]
    alike: list[tuple[str, str]]
    load_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)
    unload_s: list[float] = field(default_factory=list)
    asked: int = 0
    failed: int = 0
    stale: list[Wrong] = field(default_factory=list)
    wrong: list[Wrong] = field(default_factory=list)
    kept: int = 0

    @property
    def outcome(self) -> int:
        """The exit code: a stale or a wrong answer rejects; models that no prompt tells apart prove nothing."""
        if self.stale or self.wrong or self.kept:
            return REJECTED
        return INCONCLUSIVE if self.alike or self.failed else ACCEPTED


def residents(target: Target, named: Sequence[str]) -> list[str]:
    """Who is watched: the names that the user gives, or all that the server lists. Raises BadInput for a name that is
    not served."""

    async def session() -> list[str]:
        async with Client(target) as client:
            return await client.served(list(named) or [str(m["id"]) for m in await client.models()])

    return asyncio.run(session())


def live(
    target: Target,
    folders: tuple[Path, Path],
    residents: Sequence[str],
    prompts: Prompts,
    rounds: int,
    show: Callable[[int, str], None],
) -> Lived:
    """Load two adapters in turn under one name and path, `rounds` times; the server must see this machine's files.
    `residents`: the served names to watch beside them.

    Raises WorkerFailed for a server that has no way to load adapters, or does not take these.
    """
    # Names that the server has never heard: no cache can know them.
    names = [f"{folder.name}-{time.time_ns()}-{n}" for n, folder in enumerate(folders)]

    async def session() -> Lived:
        async with Client(target) as client:
            for name, folder in zip(names, folders, strict=True):
                await loaded(client, name, folder)
            known = await mixed.alone(client, names, prompts, show, batches=False)
            for name in names:
                await unloaded(client, name)
            beside = await mixed.alone(client, residents, prompts, lambda n, what: show(2 * mixed.ALONE + n, what))
            # The two first: an answer that is theirs and a resident's, which may be the same adapter, is theirs.
            known = Known({**known.prints, **beside.prints}, {**known.noise, **beside.noise})
            # One of the two may be a resident's twin; that says nothing against either.
            alike = [pair for pair in known.alike() if len(set(pair) & set(names)) != 1]
            named = {name: folder.name for name, folder in zip(names, folders, strict=True)}
            found = Lived(list(residents), [(named.get(a, a), named.get(b, b)) for a, b in alike])
            life = _Life(client, found, known, named, prompts)
            with scratch.temporary() as place:
                for n in range(2 * rounds):
                    await life.turn(names[n % 2], folders[n % 2], place / "adapter")
                    done = mixed.ALONE * (2 + len(residents)) + n + 1
                    show(done, f"{found.asked} answers, {len(found.stale)} stale, {len(found.wrong)} wrong")
            return found

    return asyncio.run(session())


@dataclass
class _Life:
    """Turns of the reloaded name, and what they leave in `found`. `named`: what the two adapters are called."""

    client: Client
    found: Lived
    known: Known
    named: Mapping[str, str]
    prompts: Prompts

    async def turn(self, own: str, folder: Path, place: Path) -> None:
        """Put the weights at the place, load them, ask everything, the first once more, unload, and ask once more."""
        client, found, first = self.client, self.found, next(iter(self.prompts.items()))
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        found.load_s.append(await _timed(loaded(client, NAME, place)))
        times = []
        for id_, messages in (*self.prompts.items(), first):
            started = time.perf_counter()
            answer = await mixed.fingerprinted(client, NAME, messages)
            times.append(time.perf_counter() - started)
            self._judge(own, id_, answer, alone=True)
        found.first_s.append(times[0])
        found.warm_s.append(times[-1])
        await self._beside()
        await self._mixed([*found.residents, own])
        found.unload_s.append(await _timed(unloaded(client, NAME)))
        found.kept += not isinstance(await mixed.ask(client, NAME, first[1]), str)
        await self._beside()
        await self._mixed(found.residents)

    async def _beside(self) -> None:
        """What is served beside it, one request at a time. A prefix cache may hold what a mixed batch computed, so that
        more than noise alone is needed here too."""
        for name in self.found.residents:
            for id_, messages in self.prompts.items():
                self._judge(name, id_, await mixed.fingerprinted(self.client, name, messages), alone=False)

    async def _mixed(self, names: Sequence[str]) -> None:
        """Every name with every prompt, all at once."""
        jobs = [(name, id_) for name in names for id_ in self.prompts]
        random.Random(len(self.found.load_s)).shuffle(jobs)
        asked = (mixed.ask(self.client, NAME if n in self.named else n, self.prompts[id_]) for n, id_ in jobs)
        for (name, id_), answer in zip(jobs, await asyncio.gather(*asked), strict=True):
            if isinstance(answer, str):
                self.found.failed += 1
            else:
                self._judge(name, id_, answer, alone=False)

    def _judge(self, name: str, id_: str, answer: fingerprint.Print, alone: bool) -> None:
        self.found.asked += 1
        if seen := fingerprint.judge(self.known, name, id_, answer, alone):
            # An answer of the reloaded name that is not another served model's is a remnant of what it was before.
            remnant = name in self.named and seen.like not in self.found.residents
            said = replace(seen, model=NAME if name in self.named else name, like=self.named.get(seen.like, seen.like))
            (self.found.stale if remnant else self.found.wrong).append(said)


async def _timed(doing: Awaitable[None]) -> float:
    started = time.perf_counter()
    await doing
    return time.perf_counter() - started


async def loaded(client: Client, name: str, folder: Path) -> None:
    """Load an adapter. Raises WorkerFailed where the server refuses, or has no way to load one."""
    if error := await client.lora("load", name, str(folder.resolve())):
        hint = "vLLM takes adapters at run time when it is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        raise WorkerFailed("cannot load", f"{folder}: {error}", f"{hint}; peftopt serve --engine-only does so")


async def unloaded(client: Client, name: str) -> None:
    """Unload it. Raises WorkerFailed where the server refuses."""
    if error := await client.lora("unload", name):
        raise WorkerFailed("cannot unload", f"{name}: {error}")
