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

    def __contains__(self, name: str) -> bool:
        return name in self._prints

    @property
    def known(self) -> Known:
        """All of them."""
        return Known(self._prints, self._noise)

    def clear(self) -> None:
        """Forget all, as after a restart of the engine."""
        self._prints, self._noise = {}, {}

    def drop(self, name: str) -> None:
        """Forget one."""
        self._prints.pop(name, None)
        self._noise.pop(name, None)

    async def take(self, client: Client, name: str) -> None:
        """Ask one alone. Raises WorkerFailed for an engine that tells no log-probabilities."""
        known = await mixed.alone(client, [name], self._prompts, lambda *_: None)
        self._prints |= known.prints
        self._noise |= known.noise

    async def together(self, client: Client, names: Sequence[str]) -> mixed.Round:
        """Ask those of the names that have been asked alone, all at once. Raises WorkerFailed without an answer."""
        asked = [name for name in dict.fromkeys(names) if name in self]
        seen = await mixed.together(client, self.known, asked, self._prompts, random.Random())
        if seen.failed:
            raise WorkerFailed("no answer", seen.failed[0])
        return seen

    def doubt(self, name: str) -> str:
        """What cannot be seen of a version: whom no prompt tells it from; "" for nothing."""
        alike = [b if a == name else a for a, b in self.known.alike() if name in (a, b)]
        return f" (no prompt tells it from {', '.join(alike)})" if alike else ""
