"""Versions at their engines: loads them, asks them alone and among the others, unloads them.

An adapter goes to the gateway's engine, a merged model gets its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from peftopt.canary import mixed
from peftopt.canary.fingerprint import Print
from peftopt.errors import BadInput, MissingEnvironment, PeftoptError
from peftopt.gateway import copies, itself
from peftopt.gateway.engines import Engines, as_text
from peftopt.gateway.fingerprints import Fingerprints
from peftopt.gateway.itself import Check, Itself
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.registry import Registry, Stored
from peftopt.loadtest.client import Client
from peftopt.loadtest.protocols import Target
from peftopt.redaction import ENGINE_KEY

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
        self.write: Callable[[Check], object] = _nowhere
        """Adds a check to the log."""

    async def load(self, stored: Stored) -> str:
        """Load a version, timed; returns the error, "" for none."""
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
        """Load a version from a copy that was made earlier; returns the error, "" for none."""
        try:
            await asyncio.to_thread(copies.check, Path(stored.folder))
        except BadInput as error:
            return as_text(error)
        return await self.load(stored)

    async def unload(self, stored: Stored) -> str:
        """Unload a version, and check that it is gone; returns the error, "" for none."""
        name = stored.version.served
        self._fingerprints.drop(name)
        if stored.engine:
            await self._engines.stop(name)
            return ""
        async with self._client(timeout_s=self._load_s) as client:
            error = await client.lora("unload", name)
        return f"{name} is still served after its unload ({error or 'no error'})" if name in await self.listed() else ""

    async def listed(self) -> set[str]:
        """The names that the gateway's engine serves. Raises MissingEnvironment and BadInput if it does not list
        them."""
        async with self._client() as client:
            return {str(model["id"]) for model in await client.models()}

    async def alone(self, name: str) -> None:
        """Take a version's fingerprints on its engine. Raises WorkerFailed without them."""
        own = self._engines.where(name)
        async with self._client(own.url if own else "") as client:
            await self._fingerprints.take(client, name, own is not None)

    async def mixed(self, names: Sequence[str]) -> list[str]:
        """Ask all of them at once, for each engine separately, and note the results; returns the names with wrong
        answers."""
        async with self._client() as client:
            rounds = [await self._fingerprints.together(client, names)]
        for name in names:
            own = self._engines.where(name)
            if own and name in self._fingerprints:
                async with self._client(own.url) as client:
                    rounds.append(await self._fingerprints.again(client, name))
        for seen in rounds:
            for name in dict.fromkeys(seen.answered):
                self._note(name, itself.judged(name, seen))
        return [str(each) for seen in rounds for each in seen.wrong]

    async def one_by_one(self, name: str, place: Callable[[], AbstractAsyncContextManager[object]]) -> Check | None:
        """Ask one again beside the users, one prompt after the other, each in its own `place`; notes the result. None
        if it was asked alone or unloaded meanwhile: then the answers decide nothing."""
        if name not in self._registry.table.served():
            return None
        before, own = self._fingerprints.of(name), self._engines.where(name)
        if before is None:
            return self.untold(name)
        answers: dict[str, Print | str] = {}
        async with self._client(own.url if own else "") as client:
            for id_, prompt in self._fingerprints.prompts.items():
                async with place():
                    answers[id_] = await mixed.ask(client, name, prompt)
        if self._fingerprints.of(name) is not before:
            return None
        return self._note(name, itself.judged(name, self._fingerprints.compared(name, answers)))

    def untold(self, name: str) -> Check:
        """Note that the engine gives no log-probabilities, so nothing shows whether a version answers as itself."""
        return self._note(name, Itself("unclear", why=mixed.NO_LOGPROBS, answers={"unclear": 1}))

    def _note(self, name: str, said: Itself) -> Check:
        """Count what was asked of a version, and add it to the log."""
        adapter, version, arm = self._registry.table.which(name)
        for verdict, n in said.answers.items():
            if n:
                self._metrics.canary.labels(adapter, version, verdict).inc(n)
        check = Check(adapter, version, arm, said.verdict, time.time(), said.distance, said.why, said.answers)
        self.write(check)
        return check

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
        return Client(Target(url or self.url, key_env=ENGINE_KEY if url else self._key_env, timeout_s=timeout_s))


def _nowhere(check: Check) -> None:
    """There is no log."""
