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
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftopt import fingerprint
from peftopt.canary import ask
from peftopt.client import Client, Target
from peftopt.errors import ACCEPTED, INCONCLUSIVE, REJECTED, WorkerFailed
from peftopt.fingerprint import Known, Print, Wrong

NAME = "peftopt-canary"
"""Under which adapters are loaded here; their own names on the server are left alone."""

Prompts = Mapping[str, Sequence[Mapping[str, str]]]


@dataclass(frozen=True)
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

    async def session() -> Lived:
        async with Client(target) as client:
            known = await _known(client, folders, prompts, show)
            found = Lived(alike=bool(known.alike()))
            with tempfile.TemporaryDirectory(prefix="peftopt-canary-") as place:
                for n in range(2 * rounds):
                    which = n % 2
                    found = await _turn(
                        client, found, known, _own(which), folders[which], Path(place, "adapter"), prompts
                    )
                    show(2 + n + 1, f"{found.asked} answers, {len(found.wrong)} stale")
            return found

    return asyncio.run(session())


def _own(which: int) -> str:
    return f"{NAME}-{'ab'[which]}"


async def _known(
    client: Client, folders: tuple[Path, Path], prompts: Prompts, show: Callable[[int, str], None]
) -> Known:
    """Both adapters' fingerprints, each under a name that the server has never heard: no cache can know it."""
    prints: dict[str, dict[str, Print]] = {}
    noise: dict[str, float] = {}
    for which, folder in enumerate(folders):
        name, fresh = _own(which), f"{_own(which)}-{time.time_ns()}"
        await _loaded(client, fresh, folder)
        prints[name] = {id_: await _fingerprint(client, fresh, messages) for id_, messages in prompts.items()}
        again = {id_: await _fingerprint(client, fresh, messages) for id_, messages in prompts.items()}
        noise[name] = max(fingerprint.distance(prints[name][id_], again[id_]) for id_ in prompts)
        await client.lora("unload", fresh)
        show(which + 1, f"{folder.name} alone")
    return Known(prints, noise)


async def _turn(
    client: Client, found: Lived, known: Known, own: str, folder: Path, place: Path, prompts: Prompts
) -> Lived:
    """Put the weights at the place, load them, ask everything, unload, and ask once more."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    load = await _timed(_loaded(client, NAME, place))
    first_id, *_ = prompts
    times, wrong = [], []
    for id_, messages in (*prompts.items(), (first_id, prompts[first_id])):
        started = time.perf_counter()
        answer = await _fingerprint(client, NAME, messages)
        times.append(time.perf_counter() - started)
        if seen := fingerprint.judge(known, own, id_, answer, alone=True):
            wrong.append(seen)
    unload = await _timed(_unloaded(client, NAME))
    kept = not isinstance(await ask(client, NAME, prompts[first_id]), str)
    return replace(
        found,
        load_s=[*found.load_s, load],
        first_s=[*found.first_s, times[0]],
        warm_s=[*found.warm_s, times[-1]],
        unload_s=[*found.unload_s, unload],
        asked=found.asked + len(times),
        wrong=[*found.wrong, *wrong],
        kept=found.kept + kept,
    )


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


async def _fingerprint(client: Client, name: str, messages: Sequence[Mapping[str, str]]) -> Print:
    answer = await ask(client, name, messages)
    if isinstance(answer, str):
        raise WorkerFailed("no fingerprint", f"{name}: {answer}", "it takes a server of log-probabilities")
    return answer
