"""Versions at their engines: loaded, asked alone and among the others, unloaded.

An adapter goes to the gateway's engine, a merged model gets one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from peftopt.errors import BadInput, MissingEnvironment, PeftoptError
from peftopt.gateway import copies
from peftopt.gateway.engines import Engines, as_text
from peftopt.gateway.fingerprints import Fingerprints
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.registry import Registry, Stored
from peftopt.loadtest.client import Client
from peftopt.loadtest.protocols import Target

TRIES, AGAIN_S = 3, 0.5
"""A load that fails is tried again, each time after twice the pause."""


class Loader:
    """`url` of the gateway's engine, and `key_env`, the variable with its key; the `engines` beside it. A load may take
    `load_s` seconds."""

    def __init__(
        self,
        url: str,
        registry: Registry,
        metrics: Metrics,
        engines: Engines,
        fingerprints: Fingerprints,
        load_s: float,
        key_env: str,
    ) -> None:
        self.url, self._key_env, self._load_s = url, key_env, load_s
        self._registry, self._metrics, self._engines, self._fingerprints = registry, metrics, engines, fingerprints
        self.switched: dict[str, float] = {}
        """Seconds that each version's load took, by its name, until a request has told of it."""

    async def load(self, stored: Stored) -> str:
        """Load a version, timed; why not, "" when it is loaded."""
        name, pause, error = stored.version.served, AGAIN_S, ""
        for again in reversed(range(1 if stored.engine else TRIES)):
            started = time.perf_counter()
            error = await (self._started(stored) if stored.engine else self._added(stored))
            if not error:
                self.switched[name] = time.perf_counter() - started
                self._metrics.switch.labels(stored.name).observe(self.switched[name])
                with contextlib.suppress(MissingEnvironment):  # a full disk keeps no version from being loaded again
                    self._registry.keep(stored, switch_s=self.switched[name])
                return ""
            if again:
                await asyncio.sleep(pause)
                pause *= 2
        return error

    async def reload(self, stored: Stored) -> str:
        """Load a version from a copy that was made earlier; why not, "" when it is loaded."""
        try:
            await asyncio.to_thread(copies.check, Path(stored.folder))
        except BadInput as error:
            return as_text(error)
        return await self.load(stored)

    async def unload(self, stored: Stored) -> str:
        """Unload a version, and see that it is gone; what is wrong, "" for nothing."""
        name = stored.version.served
        self._fingerprints.drop(name)
        if stored.engine:
            await self._engines.stop(name)
            return ""
        async with self._client(timeout_s=self._load_s) as client:
            error = await client.lora("unload", name)
        return f"{name} is still served after its unload ({error or 'no error'})" if name in await self.listed() else ""

    async def listed(self) -> set[str]:
        """All that the gateway's engine serves. Raises MissingEnvironment and BadInput where it does not tell."""
        async with self._client() as client:
            return {str(model["id"]) for model in await client.models()}

    async def alone(self, name: str) -> None:
        """Take a version's fingerprints, at the engine that it runs on. Raises WorkerFailed without them."""
        own = self._engines.where(name)
        async with self._client(own.url if own else "") as client:
            await self._fingerprints.take(client, name, own.model if own else "")

    async def mixed(self, names: Sequence[str]) -> list[str]:
        """Ask all of them at once, each engine's apart, and count it; whose answers are not their own."""
        async with self._client() as client:
            seen = await self._fingerprints.together(client, names)
        answered, wrong = Counter(seen.answered), Counter(each.model for each in seen.wrong)
        told = [str(each) for each in seen.wrong]
        for name in names:
            own = self._engines.where(name)
            if own and name in self._fingerprints:
                async with self._client(own.url) as client:
                    seen = await self._fingerprints.again(client, name, own.model)
                answered[name], wrong[name] = len(seen.answered), len(seen.wrong)
                told += [f"{name} on its own engine: {each}" for each in seen.wrong]
        for name, n in answered.items():
            route, _, version = name.partition("@")
            self._metrics.canary.labels(route, version, "own").inc(n - wrong[name])
            if wrong[name]:
                self._metrics.canary.labels(route, version, "wrong").inc(wrong[name])
        return told

    # ---- small parts

    async def _started(self, stored: Stored) -> str:
        """Start an engine for a version, unless it runs; why not, "" when it does."""
        name = stored.version.served
        before = self._engines.where(name)
        try:
            version = await self._engines.start(stored)
        except PeftoptError as error:
            return as_text(error)
        if version is not before:  # it is another process: what the one before said proves nothing
            self._fingerprints.drop(name)
            self._registry.moved(version)
        return ""

    async def _added(self, stored: Stored) -> str:
        """Load an adapter into the engine, unless it has it: its name holds its hash; why not, "" when it does."""
        name = stored.version.served
        async with self._client(timeout_s=self._load_s) as client:
            error = await client.lora("load", name, stored.folder)
        if not error:
            return ""
        with contextlib.suppress(PeftoptError):
            if name in await self.listed():
                return ""
        return error

    def _client(self, url: str = "", timeout_s: float = 120.0) -> Client:
        return Client(Target(url or self.url, key_env="" if url else self._key_env, timeout_s=timeout_s))
