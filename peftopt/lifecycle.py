"""An adapter's life on a running server: load, answer, unload, and another's weights under the same name and path.

two adapters, each under a name of its own -> their fingerprints -> both in turn under one name -> every answer judged

A cache that knows an adapter only by its name goes on serving the old one's: that is what a reload looks for.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftopt import canary, fingerprint
from peftopt.client import Client, Target
from peftopt.errors import ACCEPTED, INCONCLUSIVE, REJECTED, WorkerFailed
from peftopt.fingerprint import Known, Wrong

NAME = "peftopt-canary"
"""Under which adapters are loaded here; their own names on the server are left alone."""

Prompts = Mapping[str, Sequence[Mapping[str, str]]]


@dataclass
class Lived:
    """What was seen. Times in seconds, in order: `load_s` of a load, `first_s` of the first request after it, `warm_s`
    of the same request again, `unload_s`. `wrong` answers that were not of the weights just loaded; `kept`: times that
    a name was still served after its unload."""

    alike: bool
    load_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)
    unload_s: list[float] = field(default_factory=list)
    asked: int = 0
    wrong: list[Wrong] = field(default_factory=list)
    kept: int = 0

    @property
    def outcome(self) -> int:
        """The exit code: a stale answer rejects; two adapters that no prompt tells apart prove nothing."""
        return REJECTED if self.wrong or self.kept else INCONCLUSIVE if self.alike else ACCEPTED


def live(
    target: Target, folders: tuple[Path, Path], prompts: Prompts, rounds: int, show: Callable[[int, str], None]
) -> Lived:
    """Load two adapters in turn under one name and path, `rounds` times; the server must see this machine's files.

    Raises WorkerFailed for a server that has no way to load adapters, or does not take these.
    """
    # Names that the server has never heard: no cache can know them.
    names = [f"{folder.name}-{time.time_ns()}-{n}" for n, folder in enumerate(folders)]

    async def session() -> Lived:
        async with Client(target) as client:
            for name, folder in zip(names, folders, strict=True):
                await _loaded(client, name, folder)
            known = await canary.alone(client, names, prompts, show, batches=False)
            for name in names:
                await _unloaded(client, name)
            found = Lived(alike=bool(known.alike()))
            with tempfile.TemporaryDirectory(prefix="peftopt-canary-") as place:
                for n in range(2 * rounds):
                    own, folder = names[n % 2], folders[n % 2]
                    await _turn(client, found, known, own, folder, Path(place, "adapter"), prompts)
                    show(canary.ALONE * 2 + n + 1, f"{found.asked} answers, {len(found.wrong)} stale")
            return found

    return asyncio.run(session())


async def _turn(
    client: Client, found: Lived, known: Known, own: str, folder: Path, place: Path, prompts: Prompts
) -> None:
    """Put the weights at the place, load them, ask everything, the first once more, unload, and ask once more."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    found.load_s.append(await _timed(_loaded(client, NAME, place)))
    first = next(iter(prompts.items()))
    times = []
    for id_, messages in (*prompts.items(), first):
        started = time.perf_counter()
        answer = await canary.fingerprinted(client, NAME, messages)
        times.append(time.perf_counter() - started)
        if seen := fingerprint.judge(known, own, id_, answer, alone=True):
            found.wrong.append(seen)
    found.first_s.append(times[0])
    found.warm_s.append(times[-1])
    found.asked += len(times)
    found.unload_s.append(await _timed(_unloaded(client, NAME)))
    found.kept += not isinstance(await canary.ask(client, NAME, first[1]), str)


async def _timed(doing: Awaitable[None]) -> float:
    started = time.perf_counter()
    await doing
    return time.perf_counter() - started


async def _loaded(client: Client, name: str, folder: Path) -> None:
    if error := await client.lora("load", name, str(folder.resolve())):
        hint = "vLLM takes adapters at run time when it is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        raise WorkerFailed("cannot load", f"{folder}: {error}", f"{hint}; peftopt serve does so")


async def _unloaded(client: Client, name: str) -> None:
    if error := await client.lora("unload", name):
        raise WorkerFailed("cannot unload", f"{name}: {error}")
