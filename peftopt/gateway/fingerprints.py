"""How each version answers when it is asked alone, and whether it still does in a batch with the others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence

from peftopt.canary import mixed
from peftopt.canary.fingerprint import Known, Print
from peftopt.errors import WorkerFailed
from peftopt.loadtest.client import Client

EARLIER = 4
"""Of each adapter so many earlier versions are remembered, so that a stale answer can be told."""


class Fingerprints:
    """The fingerprints of all served versions, by their names at the engine, and of `prompts` by their ids."""

    def __init__(self, prompts: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
        self.prompts = prompts
        self._prints: dict[str, Mapping[str, Print]] = {}
        self._noise: dict[str, float] = {}
        self._own: set[str] = set()
        """Those on an engine of their own: no answer of another's can come from there."""
        self._earlier: dict[str, tuple[Mapping[str, Print], float]] = {}
        """Of versions that were served before: their prints and their noise."""

    def __contains__(self, name: str) -> bool:
        return name in self._prints

    @property
    def known(self) -> Known:
        """All of them."""
        return Known(self._prints, self._noise)

    @property
    def _all_known(self) -> Known:
        """Those that are served, and those that were."""
        prints = self._prints | {name: prints for name, (prints, _) in self._earlier.items()}
        return Known(prints, self._noise | {name: noise for name, (_, noise) in self._earlier.items()})

    def of(self, name: str) -> Mapping[str, Print] | None:
        """Those of one version, the same object until they are taken again; None for one that was not asked."""
        return self._prints.get(name)

    def clear(self) -> None:
        """Forget all served versions, as after a restart of the engine."""
        self._prints, self._noise, self._own = {}, {}, set()

    def drop(self, name: str) -> None:
        """Forget one."""
        self._prints.pop(name, None)
        self._noise.pop(name, None)
        self._own.discard(name)

    def retire(self, name: str) -> None:
        """Forget one that was served, but keep enough to recognise its answers: another version must not give them."""
        if name in self._prints and name not in self._own:
            self._earlier[name] = (self._prints[name], self._noise[name])
            adapter = name.partition("@")[0]
            older = [other for other in self._earlier if other.partition("@")[0] == adapter][:-EARLIER]
            for other in older:
                del self._earlier[other]
        self.drop(name)

    async def take(self, client: Client, name: str, own: bool = False) -> None:
        """Ask one alone; `own`: it has its own engine. Raises WorkerFailed without an answer, and for an engine without
        log-probabilities: see `untold`."""
        known = await mixed.alone(client, [name], self.prompts, lambda *_: None)
        self._earlier.pop(name, None)
        self._prints[name] = known.prints[name]
        self._noise[name] = known.noise[name]
        if own:
            self._own.add(name)

    async def together(self, client: Client, names: Sequence[str]) -> mixed.Round:
        """Ask all of these names at once that were asked alone before. Raises WorkerFailed without an answer."""
        asked = [name for name in dict.fromkeys(names) if name in self and name not in self._own]
        return _answered(await mixed.together(client, self._all_known, asked, self.prompts, random.Random()))

    async def again(self, client: Client, name: str) -> mixed.Round:
        """Ask one on an engine of its own again, with all prompts at once. Raises WorkerFailed without an answer."""
        answers = await asyncio.gather(*(mixed.ask(client, name, prompt) for prompt in self.prompts.values()))
        return _answered(self.compared(name, dict(zip(self.prompts, answers, strict=True))))

    def compared(self, name: str, answers: Mapping[str, Print | str]) -> mixed.Round:
        """Judge answers of one version, by their prompts: each a fingerprint, or the reason for none."""
        own = Known({name: self._prints[name]}, {name: self._noise[name]})
        known = own if name in self._own else self._all_known
        return mixed.judged(known, [(name, id_) for id_ in answers], list(answers.values()))

    def alike(self) -> list[tuple[str, str]]:
        """Pairs on one engine that no prompt distinguishes: a wrong answer between them would go unnoticed."""
        return [(a, b) for a, b in self.known.alike() if not self._own & {a, b}]

    def doubt(self, name: str) -> str:
        """The versions that no prompt distinguishes from this one, as a sentence; "" for none."""
        alike = [b if a == name else a for a, b in self.alike() if name in (a, b)]
        return f" (no prompt tells it from {', '.join(alike)})" if alike else ""


def untold(error: WorkerFailed) -> bool:
    """Whether the engine has answered, but without log-probabilities."""
    return mixed.NO_LOGPROBS in error.detail


def _answered(seen: mixed.Round) -> mixed.Round:
    if seen.failed:
        name, why = seen.failed[0]
        raise WorkerFailed("no answer", f"{name}: {why}")
    return seen
