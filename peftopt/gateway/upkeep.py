"""Keeps the served versions as the registry has them: at the engine's start, after it has lost something, after a
failure.

A version that does not load or does not answer as itself answers no users until it does; the others are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from peftopt.errors import MissingEnvironment, WorkerFailed
from peftopt.gateway import copies
from peftopt.gateway.fingerprints import untold
from peftopt.gateway.registry import Stored
from peftopt.gateway.routes import Route, Version

if TYPE_CHECKING:
    from peftopt.gateway.lives import Lives


class Upkeep:
    """Keeps the versions of one gateway loaded, each answering as itself."""

    def __init__(self, lives: Lives) -> None:
        self.lives = lives
        self.registry, self.loader, self.failures = lives.registry, lives.loader, lives.failures

    async def begin(self) -> list[str]:
        """Load every recorded version, and ask all of them. Returns oddities, a sentence each. A version that does not
        load or does not answer goes to `failures`, and the others are served. Raises WorkerFailed for an engine that
        does not answer, or answers wrongly."""
        async with self.lives.one_at_a_time:
            self.lives.ready = False
            self.lives.fingerprints.clear()
            self.lives.doubts.clear()
            notes = self._bring()
            for stored in list(self.registry.versions.values()):
                notes += await self._reload(stored)
            notes += await self._all_asked()
            self.lives.show()
            self.lives.ready = True
            await self.lives.published()
            self.lives.trials.resume()
            return notes

    def _bring(self) -> list[str]:
        """Route what the engine brings under the names it has there now: another engine may have been before. What was
        put over it stays, a sentence each."""
        brought = {name: Version("", at_engine) for name, at_engine in self.lives.brings.items()}
        for name, route in list(self.registry.table.routes.items()):
            now = route.bringing(brought.get(name))
            if now != route:
                self.registry.route(name, now)
        for name, version in brought.items():
            if name not in self.registry.table.routes:
                self.registry.route(name, Route(version))
        live = {name: self.registry.table.routes[name].live for name in brought}
        return [
            f"{name} is answered by {version.served}, put over what the gateway was started with; to go back: peftopt "
            f"adapters remove {name}"
            for name, version in live.items()
            if version.id
        ]

    async def _reload(self, stored: Stored) -> list[str]:
        """Load a version that is on record; what is odd about it, a sentence each."""
        name = stored.version.served
        if name not in self.registry.table.served():
            # A crash came between its load and its route: nobody was ever answered by it.
            await self.loader.unload(stored)
            with contextlib.suppress(MissingEnvironment):  # a full disk: it is forgotten the next time
                self.registry.forget(name)
            return []
        error = await self.loader.reload(stored)
        if not error:
            self.failures.clear(name)
            return []
        self.lives.fails(name, error)
        if await asyncio.to_thread(copies.whole, Path(stored.folder)):
            return [f"{name} does not load: {error}"]
        return [f"{name} cannot be loaded: {error}", *await self._without(stored)]

    async def _without(self, stored: Stored) -> list[str]:
        """Route a name without a version whose copy is damaged, where that can be; what was done."""
        route = self.registry.table.routes[stored.name]
        now = route.without(stored.version)
        if now is None:
            return [f"{stored.name} has no earlier version: it answers nobody until it is put again"]
        with contextlib.suppress(MissingEnvironment):  # a full disk: it stays as it is, and is not answered
            await self.lives.change(stored.name, now)
            return [f"{stored.name} is answered by {now.live.served}"]
        return []

    async def _all_asked(self) -> list[str]:
        """Ask every version that is loaded, alone and then all at once; what is odd, a sentence each."""
        all_names = dict.fromkeys([*self.lives.brings.values(), *self.registry.table.served()])
        served = [name for name in all_names if name not in self.failures]
        self.lives.tell(f"asking whether each answers as itself: {', '.join(served)}")
        silent = []
        for name in served:
            try:
                await self.loader.alone(name)
            except WorkerFailed as error:
                if untold(error):
                    silent.append(name)
                    self.loader.untold(name)
                elif name in self.registry.versions:
                    self.lives.fails(name, error.message)
                else:
                    raise
        if wrong := await self.lives.wrong(served):
            raise WorkerFailed("wrong answers", "; ".join(wrong[:3]), "run peftopt canary against the engine")
        notes = [
            f"no prompt tells {a} and {b} apart: a wrong answer between them would not be seen"
            for a, b in self.lives.fingerprints.alike()
        ]
        if silent:
            what = f"nothing tells whether {', '.join(silent)} answer as themselves"
            notes.append(f"{what}: the engine gives no log-probabilities. The log says certified: false of them")
        return notes

    async def reconcile(self) -> list[str]:
        """Load again what the engine has lost, as after an unnoticed restart, and ask it before it is served; returns
        the lost names. Raises WorkerFailed if answers are then wrong."""
        async with self.lives.one_at_a_time:
            listed = await self.loader.listed()
            served = self.registry.table.served()
            missing = [
                name
                for name, stored in self.registry.versions.items()
                if name in served and name not in listed and name not in self.failures and not stored.engine
            ]
            for name in missing:
                self.lives.fails(name, "the engine has lost it: it is loaded again")
            for name in missing:
                await self._mended(name)
            return missing

    async def mend(self) -> list[str]:
        """Try failed versions again, each at its time, and engines that have died; returns those that are served
        again."""
        served = self.registry.table.served()
        for name, why in self.lives.engines.dead().items():
            if name in served and name not in self.failures:
                self.lives.metrics.restarts.inc()
                self.lives.fails(name, f"its engine has died: {why}")
        mended = []
        if self.failures.due(time.monotonic()):
            async with self.lives.one_at_a_time:
                for name in self.failures.due(time.monotonic()):
                    if await self._mended(name):
                        mended.append(name)
        return mended

    async def _mended(self, name: str) -> bool:
        """Load a version again, ask it and those beside it, and let its route be answered; whether that went well."""
        stored = self.registry.versions.get(name)
        if stored is None or name not in self.registry.table.served():
            self.failures.clear(name)
            return False
        if why := await self.loader.reload(stored):
            self.lives.fails(name, why)
            return False
        try:
            if name not in self.lives.fingerprints:
                await self.loader.alone(name)
            wrong = await self.lives.wrong(self.registry.table.served(), name)
        except WorkerFailed as error:
            if not untold(error):
                self.lives.fails(name, error.message)
                return False
            wrong = []
        if wrong:
            self.lives.fails(name, wrong[0])
            raise WorkerFailed("wrong answers", f"after {name} was loaded again: {wrong[0]}")
        self.failures.clear(name)
        self.lives.show()
        await self.lives.published()
        return True
