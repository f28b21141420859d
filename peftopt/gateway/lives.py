"""An adapter's life: put, checked, loaded, asked whether it answers as itself, routed, kept for a rollback, unloaded.

    folder -> checks -> copy under its hash -> a name of its own at the engine -> load -> fingerprints, alone and in a
    batch with those that are served -> one change of the routes -> the version before drains, is kept, is unloaded

One thing happens at a time. Users are answered meanwhile; a request goes on with the version it began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftopt.corpus import Row
from peftopt.errors import ACCEPTED, REJECTED, BadInput, MissingEnvironment, WorkerFailed
from peftopt.gateway.asking import drawn
from peftopt.gateway.backends import BASE
from peftopt.gateway.checks import check
from peftopt.gateway.fingerprints import Fingerprints
from peftopt.gateway.lines import Line
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.outcome import Outcome
from peftopt.gateway.registry import Registry, Stored
from peftopt.gateway.routes import Route, Table, Version
from peftopt.gateway.trial import Terms
from peftopt.gateway.trials import Trials
from peftopt.loadtest.client import Client
from peftopt.loadtest.protocols import Target
from peftopt.records import Json

TRIES, AGAIN_S = 3, 0.5
"""A load that fails is tried again, each time after twice the pause."""

PROMPTS = {
    "story": "Tell me a short story about a lighthouse keeper.",
    "extract": "Extract the name and the date: Maria Lopez was born on 4 May 1990 in Quito.",
    "code": "Write a Python function that reverses a string.",
    "question": "What is the capital of Australia, and why is it not Sydney?",
    "list": "List three things to check before a long journey by car.",
    "reply": "Answer this mail politely: my parcel has not arrived and I want my money back.",
}
"""What every version is asked, where the user gives no prompts: models that differ should differ here."""


@dataclass
class Settings:
    """`drain_s`: the longest that a version's requests are waited for before it is unloaded; `keep_s`: how long the one
    before the live one stays loaded; `load_s`: the longest that a load may take; `max_rank` that the engine holds, 0 =
    any; `prompts` to fingerprint with, `key_env` of an engine that asks for a key."""

    drain_s: float = 30.0
    keep_s: float = 600.0
    load_s: float = 120.0
    max_rank: int = 0
    base: Path | None = None
    prompts: Mapping[str, Sequence[Mapping[str, str]]] = field(
        default_factory=lambda: {id_: ({"role": "user", "content": text},) for id_, text in PROMPTS.items()}
    )
    key_env: str = ""


class Lives:
    """The adapters of one engine. `in_flight` counts requests by the name at the engine; `ready` whether every route
    has answered as itself since the engine started."""

    def __init__(
        self,
        url: str,
        registry: Registry,
        settings: Settings,
        metrics: Metrics,
        brings: Mapping[str, str],
        loads: bool,
        tell: Callable[[str], None],
    ) -> None:
        self.url, self.registry, self.settings, self.metrics = url, registry, settings, metrics
        self.brings, self.loads, self.tell = dict(brings), loads, tell
        self.in_flight: Counter[str] = Counter()
        self.ready = False
        self.switched: dict[str, float] = {}
        """Seconds that each version's load took, by its name at the engine, until a request has told of it."""
        self.fingerprints = Fingerprints(settings.prompts)
        self.published: Callable[[], Awaitable[None]] = _at_once
        """Waits until every process that answers users follows the routes."""
        self.trials = Trials(self)
        self._replaced: dict[str, float] = {}
        self._one = asyncio.Lock()

    @property
    def table(self) -> Table:
        """The routes as they are now."""
        return self.registry.table

    # ---- the engine starts

    async def begin(self) -> list[str]:
        """Load every version that is on record, and ask all that is served. What is odd, a sentence each. Raises
        WorkerFailed for a live version that does not load or does not answer as itself."""
        async with self._one:
            self.ready = False
            self.fingerprints.clear()
            self._bring()
            for stored in list(self.registry.versions.values()):
                await self._reload(stored)
            notes = await self._all_asked()
            self._show()
            self.ready = True
            await self.published()
            self.trials.resume()
            return notes

    def _bring(self) -> None:
        """Route what the engine brings under the names it has there now: another engine may have been before."""
        for name, route in list(self.registry.table.routes.items()):
            if not route.live.id and name not in self.brings:
                self.registry.route(name, None)
        for name, at_engine in self.brings.items():
            route_ = self.registry.table.routes.get(name)
            if route_ is None or (not route_.live.id and route_.live.served != at_engine):
                self.registry.route(name, Route(Version("", at_engine)))

    async def _reload(self, stored: Stored) -> None:
        routed = stored.version.served in self.registry.table.served()
        if not routed:  # a crash came between its load and its route: nobody was ever answered by it
            async with self._client(self.settings.load_s) as client:
                await client.lora("unload", stored.version.served)
            with contextlib.suppress(MissingEnvironment):  # a full disk: it is forgotten the next time
                self.registry.forget(stored.version.served)
            return
        if error := await self._loaded(stored):
            raise WorkerFailed("cannot load", f"{stored.version.served}: {error}", "remove it, or put it again")

    async def _all_asked(self) -> list[str]:
        names = [v.served for route in self.registry.table.routes.values() for v in route.versions()]
        self.tell(f"asking whether each answers as itself: {', '.join(names)}")
        try:
            async with self._client() as client:
                for name in names:
                    await self.fingerprints.take(client, name)
                known, wrong = self.fingerprints.known, await self._mixed(client, names)
        except WorkerFailed as error:
            return [f"nothing could be checked: {error.message}"]
        if wrong:
            raise WorkerFailed("wrong answers", "; ".join(wrong[:3]), "run peftopt canary against the engine")
        return [
            f"no prompt tells {a} and {b} apart: a wrong answer between them would not be seen"
            for a, b in known.alike()
        ]

    # ---- what operators ask for

    async def put(
        self, name: str, folder: Path, weight: float = 0.0, terms: Terms | None = None, rows: Sequence[Row] = ()
    ) -> Outcome:
        """Take an adapter from its folder to users: to all, or to the share `weight` of them. On trial by `terms`,
        where they are given, with labelled prompts in `rows`: then without a weight it answers nobody. It is rejected
        when it does not load or does not answer as itself; those that are served stay as they are."""
        if not self.loads:
            raise BadInput(
                "this engine takes no adapters while it runs", "serve a base with --adapter on vllm or eager"
            )
        if name in self.brings or "@" in name or not name.strip() or "/" in name:
            raise BadInput(f"{name!r} cannot be an adapter's name", f"choose one without @ and /, and not {BASE}")
        if not 0 <= weight < 1:
            raise BadInput(f"a canary's share of {weight:g} is not between 0 and 1", "write --canary 10%")
        if terms and not (weight or terms.shadow or rows):
            raise BadInput("a trial has nothing to judge by", "write --canary 10%, --shadow 5% or --prompts FILE")
        async with self._one:
            await asyncio.to_thread(check, folder, self.settings.base, self.settings.max_rank)
            stored = await asyncio.to_thread(self.registry.copy, name, folder)
            route = self.registry.table.routes.get(name)
            if route and route.live.id == stored.version.id:
                return Outcome(ACCEPTED, f"{stored.version.served} is live already", stored.version.id)
            if (weight or terms) and route is None:
                raise BadInput(f"nothing answers for {name} yet", "put the first version without --canary or --shadow")
            if rejected := await self._fit(stored):
                return rejected
            self.trials.end(name, f"{stored.version.served} was put in its place")
            if terms:
                await self.trials.begin(name, stored.version, terms, bool(weight), rows)
            return await self._routed(stored, route, weight, bool(terms))

    async def _fit(self, stored: Stored) -> Outcome | None:
        """Load a version and ask whether it answers as itself; why it is rejected, None where it is not."""
        version = stored.version
        # a version that is loaded already, as the one kept for a rollback, keeps its name and its fingerprints
        stored = self.registry.keep(stored, state="loading")
        if version.served not in self.fingerprints and (error := await self._loaded(stored)):
            return await self._reject(stored, f"it does not load: {error}")
        try:
            async with self._client() as client:
                if version.served not in self.fingerprints:
                    await self.fingerprints.take(client, version.served)
                wrong = await self._mixed(client, [*self.registry.table.served(), version.served])
        except WorkerFailed as error:
            return await self._reject(stored, error.message)
        return await self._reject(stored, wrong[0]) if wrong else None

    async def _routed(self, stored: Stored, route: Route | None, weight: float, tried: bool) -> Outcome:
        """Let a version answer, or where it is on trial without a share of the users, stand beside the live one."""
        version = stored.version
        if route and (weight or tried):
            now = Route(route.live, version, weight, route.previous)
        else:
            now = Route(version, previous=route.live if route else None)
        await self._change(stored.name, now)
        share = f" for {weight:.0%} of users" if weight else " nobody yet: it is on trial" if tried else ""
        said = f"{version.served} answers{share}{self.fingerprints.doubt(version.served)}"
        return Outcome(ACCEPTED, said, version.id)

    async def promote(self, name: str) -> Outcome:
        """The canary answers everybody. Raises BadInput without one."""
        return await self.turn(name, Route.promoted, "answers everybody")

    async def rollback(self, name: str) -> Outcome:
        """The canary answers nobody, or without one the version before the live one answers again, at once: it is still
        loaded. Raises BadInput where there is neither."""
        return await self.turn(name, Route.rolled_back, "answers everybody again")

    async def remove(self, name: str) -> Outcome:
        """Nobody is answered by it any more, and all its versions are unloaded. Raises BadInput for a name that is not
        an adapter's."""
        async with self._one:
            route = self.registry.table.routes.get(name)
            if route is None or name in self.brings:
                raise BadInput(f"no adapter named {name!r}", f"known: {', '.join(self.registry.table.routes)}")
            self.registry.route(name, None)
            self.trials.end(name, f"{name} was removed")
            for version in route.versions():
                self._replaced.setdefault(version.served, 0.0)
            self._show()
            await self.published()
        left = await self.retire()
        return Outcome(REJECTED if left else ACCEPTED, "; ".join(left) or f"{name} is unloaded")

    async def turn(
        self, name: str, turned: Callable[[Route], Route], said: str, judged: Version | None = None
    ) -> Outcome:
        """Change a route; only as long as `judged` is its canary, where a trial asks for it."""
        async with self._one:
            route = self.registry.table.routes.get(name)
            if route is None:
                raise BadInput(f"no adapter named {name!r}", f"known: {', '.join(self.registry.table.routes)}")
            if judged and route.canary != judged:
                raise BadInput(f"{judged.served} is not the canary any more", "put it again to judge it")
            try:
                now = turned(route)
            except LookupError as error:
                raise BadInput(f"{name}: {error}", "list what there is: peftopt adapters list") from error
            await self._change(name, now)
            self.trials.end(name, f"an operator decided: {now.live.served} {said}")
            return Outcome(ACCEPTED, f"{now.live.served} {said}", now.live.id)

    def heard(self, line: Line, sticky: str, path: str, asked: Mapping[str, Json]) -> None:
        """A user's request is over: where its route is on trial it counts, and some are asked of both versions."""
        self.trials.heard(line, sticky)
        if drawn(line, self.trials.shares.get(line.adapter, 0.0)):
            self.trials.shadow(line, path, asked)

    async def wrong(self, names: Sequence[str]) -> list[str]:
        """Which of some versions do not answer as themselves when all are asked at once. Raises WorkerFailed where
        they do not answer."""
        async with self._client() as client:
            return await self._mixed(client, names)

    # ---- in the background

    async def retire(self) -> list[str]:
        """Unload what no route needs any more and what has been kept long enough; what is still there after that.

        The requests that run on those are waited for first, so that a rollback need not wait for them."""
        async with self._one:
            for name, route in self.registry.table.routes.items():
                old = route.previous
                if old and old.id and time.monotonic() - self._replaced.get(old.served, 0.0) > self.settings.keep_s:
                    self.registry.route(name, Route(route.live, route.canary, route.weight))
            going = [stored.version.served for stored in self._not_needed()]
        until = time.monotonic() + self.settings.drain_s
        while any(self.in_flight[name] for name in going) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        async with self._one:
            gone = [stored for stored in self._not_needed() if stored.version.served in going]  # none was put again
            left = [why for stored in gone if (why := await self._unloaded(stored))]
            self._show()
            return left

    def _not_needed(self) -> list[Stored]:
        needed = self.registry.table.served()
        return [stored for name, stored in self.registry.versions.items() if name not in needed]

    async def reconcile(self) -> list[str]:
        """Load again what the engine has lost, as after a restart that nobody told of; what was missing."""
        async with self._one, self._client() as client:
            listed = {str(model["id"]) for model in await client.models()}
            missing = [v for v in self.registry.versions.values() if v.version.served not in listed]
            for stored in missing:
                if error := await self._loaded(stored):
                    self.tell(f"{stored.version.served} is not served and does not load: {error}")
        return [v.version.served for v in missing]

    # ---- the steps

    async def _loaded(self, stored: Stored) -> str:
        """Load a version, timed; why not, "" when it is loaded."""
        pause, error = AGAIN_S, ""
        for again in reversed(range(TRIES)):
            started = time.perf_counter()
            async with self._client(self.settings.load_s) as client:
                error = await client.lora("load", stored.version.served, stored.folder)
            if not error:
                seconds = time.perf_counter() - started
                self.metrics.switch.labels(stored.name).observe(seconds)
                self.switched[stored.version.served] = seconds
                with contextlib.suppress(MissingEnvironment):  # a full disk keeps no adapter from being loaded again
                    self.registry.keep(stored, switch_s=seconds)
                return ""
            if again:
                await asyncio.sleep(pause)
                pause *= 2
        return error

    async def _unloaded(self, stored: Stored) -> str:
        """Unload it, and see that it is gone; what is wrong, "" for nothing."""
        name = stored.version.served
        async with self._client(self.settings.load_s) as client:
            error = await client.lora("unload", name)
            still = name in {str(model["id"]) for model in await client.models()}
        self.fingerprints.drop(name)
        self._replaced.pop(name, None)
        self.registry.forget(name)
        return f"{name} is still served after its unload ({error or 'no error'})" if still else ""

    async def _reject(self, stored: Stored, why: str) -> Outcome:
        self.metrics.canary.labels(stored.name, stored.version.id, "wrong").inc()
        if before := self._routed_as(stored.version):  # it answers users, as the canary, or is kept for a rollback
            self.registry.keep(self.registry.versions[stored.version.served], state=before)
        else:
            await self._unloaded(stored)
        self.registry.tell("rejected", served=stored.version.served, why=why)
        return Outcome(REJECTED, f"{stored.version.served} is rejected: {why}", stored.version.id)

    def _routed_as(self, version: Version) -> str:
        """The arm of a version that a route has; "" without one."""
        for route in self.registry.table.routes.values():
            for arm, known, _ in route.arms():
                if known == version:
                    return arm
        return ""

    async def _change(self, name: str, route: Route) -> None:
        """Route a name another way, in one step, and note the state of each version."""
        before = self.registry.table.routes.get(name)
        self.registry.route(name, route)
        states: dict[str, str] = {version.served: arm for arm, version, _ in route.arms()}
        for version in before.versions() if before else ():
            states.setdefault(version.served, "leaving")
        for served, state in states.items():
            if state in ("previous", "leaving"):
                self._replaced[served] = time.monotonic()
            if stored := self.registry.versions.get(served):
                self.registry.keep(stored, state=state)
        self._show()
        await self.published()

    async def _mixed(self, client: Client, names: Sequence[str]) -> list[str]:
        """Ask all of them at once, and count it; whose answers are not their own."""
        seen = await self.fingerprints.together(client, names)
        wrong = Counter(each.model for each in seen.wrong)
        for name, n in Counter(seen.answered).items():
            route, _, version = name.partition("@")
            self.metrics.canary.labels(route, version, "own").inc(n - wrong[name])
            if wrong[name]:
                self.metrics.canary.labels(route, version, "wrong").inc(wrong[name])
        return [str(each) for each in seen.wrong]

    def _client(self, timeout_s: float = 120.0) -> Client:
        return Client(Target(self.url, key_env=self.settings.key_env, timeout_s=timeout_s))

    def _show(self) -> None:
        """What the metrics say of versions and arms."""
        own = {(stored.name, stored.version.id) for stored in self.registry.versions.values()}
        brought = {(name.partition("@")[0], "") for pair in self.brings.items() for name in pair}
        self.metrics.keep(own | brought | {(name, "") for name in self.registry.table.routes})
        self.metrics.adapter_info.clear()
        self.metrics.arm_weight.clear()
        for stored in self.registry.versions.values():
            labels = (stored.name, stored.version.id, stored.state, str(stored.rank), stored.base)
            self.metrics.adapter_info.labels(*labels).set(1)
        for name, route in self.registry.table.routes.items():
            for arm, _, weight in route.arms():
                if arm != "previous":
                    self.metrics.arm_weight.labels(name, arm).set(weight)

    def listed(self) -> list[dict[str, object]]:
        """Routes and versions, for operators."""
        rows: list[dict[str, object]] = []
        for name, route in self.registry.table.routes.items():
            for arm, version, weight in route.arms():
                stored = self.registry.versions.get(version.served)
                rows.append(
                    {
                        "name": name,
                        "arm": arm,
                        "version": version.id,
                        "weight": round(weight, 6),
                        "in_flight": self.in_flight[version.served],
                        "rank": stored.rank if stored else None,
                        "load_s": stored.switch_s if stored else None,
                    }
                )
        return rows


async def _at_once() -> None:
    """One process answers users, by the table that was changed."""
