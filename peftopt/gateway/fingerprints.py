"""What each version says when it is asked alone, and whether it still does among the others."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from peftopt.canary import mixed
from peftopt.canary.fingerprint import Known, Print
from peftopt.errors import WorkerFailed
from peftopt.loadtest.client import Client


class Fingerprints:
    """The fingerprints of all that is served, by the names at the engine."""

    def __init__(self, prompts: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
        self._prompts = prompts
        self._prints: dict[str, Mapping[str, Print]] = {}
        self._noise: dict[str, float] = {}
        self._own: set[str] = set()
        """Those on an engine of their own: no answer of another's can come from there."""

    def __contains__(self, name: str) -> bool:
        return name in self._prints

    @property
    def known(self) -> Known:
        """All of them."""
        return Known(self._prints, self._noise)

    def clear(self) -> None:
        """Forget all, as after a restart of the engine."""
        self._prints, self._noise, self._own = {}, {}, set()

    def drop(self, name: str) -> None:
        """Forget one."""
        self._prints.pop(name, None)
        self._noise.pop(name, None)
        self._own.discard(name)

    async def take(self, client: Client, name: str, model: str = "") -> None:
        """Ask one alone; `model` is its name on an engine of its own. Raises WorkerFailed without an answer, and for an
        engine that tells no log-probabilities: see `untold`."""
        asked = model or name
        known = await mixed.alone(client, [asked], self._prompts, lambda *_: None)
        self._prints[name] = known.prints[asked]
        self._noise[name] = known.noise[asked]
        if model:
            self._own.add(name)

    async def together(self, client: Client, names: Sequence[str]) -> mixed.Round:
        """Ask those of the names that have been asked alone, all at once. Raises WorkerFailed without an answer."""
        asked = [name for name in dict.fromkeys(names) if name in self and name not in self._own]
        return _answered(await mixed.together(client, self.known, asked, self._prompts, random.Random()))

    async def again(self, client: Client, name: str, model: str) -> mixed.Round:
        """Ask one on an engine of its own again, with all prompts at once. Raises WorkerFailed without an answer."""
        own = Known({model: self._prints[name]}, {model: self._noise[name]})
        return _answered(await mixed.together(client, own, [model], self._prompts, random.Random()))

    def alike(self) -> list[tuple[str, str]]:
        """Pairs on one engine that no prompt tells apart: a wrong answer between them would not be seen."""
        return [(a, b) for a, b in self.known.alike() if not self._own & {a, b}]

    def doubt(self, name: str) -> str:
        """What cannot be seen of a version: whom no prompt tells it from; "" for nothing."""
        alike = [b if a == name else a for a, b in self.alike() if name in (a, b)]
        return f" (no prompt tells it from {', '.join(alike)})" if alike else ""


def untold(error: WorkerFailed) -> bool:
    """Whether the engine has answered, and tells no log-probabilities."""
    return mixed.NO_LOGPROBS in error.detail


def _answered(seen: mixed.Round) -> mixed.Round:
    if seen.failed:
        raise WorkerFailed("no answer", seen.failed[0])
    return seen
