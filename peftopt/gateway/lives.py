"""An adapter's life: put, checked, loaded, asked whether it answers as itself, routed, kept for a rollback, unloaded.

    folder -> checks -> copy under its hash -> a name of its own at the engine -> load -> fingerprints, alone and in a
    batch with those that are served -> one change of the routes -> the version before drains, is kept, is unloaded

A merged model takes the same way, on its own engine. One thing is loaded at a time. A change of a route waits for
nothing: it is one step of the event loop. Users are answered meanwhile; a request ends on the version that it began
with.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftopt.corpus import Row
from peftopt.errors import ACCEPTED, INCONCLUSIVE, REJECTED, BadInput, WorkerFailed
from peftopt.gateway import checks, engines, merged, standing
from peftopt.gateway.asking import drawn
from peftopt.gateway.backends import BASE
from peftopt.gateway.engines import Engines
from peftopt.gateway.failures import Failures
from peftopt.gateway.fingerprints import Fingerprints, untold
from peftopt.gateway.lines import Line
from peftopt.gateway.loading import Loader
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.outcome import Outcome
from peftopt.gateway.registry import Registry, Stored
from peftopt.gateway.routes import Route, Table, Version
from peftopt.gateway.trial import Terms
from peftopt.gateway.trials import Trials
from peftopt.gateway.upkeep import Upkeep
from peftopt.records import Json

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
    """`drain_s`: the longest wait for a version's requests before it is unloaded; `keep_s`: how long the version before
    the live one stays loaded; `load_s`: the longest time of a load; `max_rank` of the engine, 0 = any; `prompts` to
    fingerprint with, `key_env` of an engine that needs a key."""

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
    """The adapters of one engine, and merged models on their own engines. `in_flight` counts requests by version;
    `ready`: whether users are answered, except those of versions that are in `failures`."""

    def __init__(
        self,
        url: str,
        registry: Registry,
        settings: Settings,
        metrics: Metrics,
        brings: Mapping[str, str],
        loads: bool,
        tell: Callable[[str], None],
        engines: Engines | None = None,
    ) -> None:
        self.registry, self.settings, self.metrics = registry, settings, metrics
        self.brings, self.loads, self.tell = dict(brings), loads, tell
        self.engines = engines or Engines()
        self.fingerprints = Fingerprints(settings.prompts)
        self.loader = Loader(url, registry, metrics, self.engines, self.fingerprints, settings.load_s, settings.key_env)
        self.failures = Failures()
        self.doubts: dict[str, str] = {}
        """Versions that answer users though they do not answer as themselves, and how that was seen."""
        self.in_flight: Counter[str] = Counter()
        self.ready = False
        self.switched = self.loader.switched
        self.published: Callable[[], Awaitable[None]] = _at_once
        """Waits until every process that answers users follows the routes."""
        self.trials = Trials(self)
        self._replaced: dict[str, float] = {}
        self.upkeep = Upkeep(self)
        self.one_at_a_time = asyncio.Lock()
        """Held while something is loaded, asked for the first time, or unloaded."""

    @property
    def table(self) -> Table:
        """The routes as they are now."""
        return self.registry.table

    def failed(self) -> Mapping[str, str]:
        """Why versions do not answer, by their served names."""
        return self.failures.all()

    def doubted(self) -> Mapping[str, str]:
        """Versions that answer users although they do not answer as themselves, with the evidence."""
        return dict(self.doubts)

    def loading_s(self, name: str) -> float | None:
        """Seconds that the start of a version's own engine took; None for one on the gateway's engine."""
        return self.engines.loading_s(name)

    def certified(self, name: str) -> bool:
        """Whether a version had to answer as itself before it was served, and did."""
        stored = self.registry.versions.get(name)
        return name in self.fingerprints and (stored is None or stored.certified)

    # ---- what operators ask for

    async def put(
        self,
        name: str,
        folder: Path,
        weight: float = 0.0,
        terms: Terms | None = None,
        rows: Sequence[Row] = (),
        engine: str = "",
        certify: bool = True,
    ) -> Outcome:
        """Take an adapter, or a merged model with its own `engine`, from its folder to users: to all, or to the share
        `weight` of them. With `terms` it is on trial, with labelled prompts in `rows`; without a weight it then answers
        no users. It is rejected if it does not load or, with `certify`, does not answer as itself; the served versions
        stay as they are."""
        whole = merged.is_model(folder)
        self._may_be_put(name, folder, weight, whole, engine)
        if terms and not (weight or terms.shadow or rows):
            raise BadInput("a trial has nothing to judge by", "write --canary 10%, --shadow 5% or --prompts FILE")
        async with self.one_at_a_time:
            engine = await asyncio.to_thread(self._checked, name, folder, engine) if whole else ""
            if not whole:
                await asyncio.to_thread(checks.adapter, folder, self.settings.base, self.settings.max_rank)
            stored = await asyncio.to_thread(self.registry.copy, name, folder, engine)
            route = self.registry.table.routes.get(name)
            if route and route.live.id == stored.version.id and self._stands(stored.version.served, certify):
                return Outcome(ACCEPTED, f"{stored.version.served} is live already", stored.version.id)
            if (weight or terms) and route is None:
                raise BadInput(f"nothing answers for {name} yet", "put the first version without --canary or --shadow")
            stored = replace(stored, certified=certify)
            fits = await self._fit(stored, route)
            if fits.exit_code != ACCEPTED:
                return fits
            if self.registry.table.routes.get(name) != route:
                return await self._too_late(stored)
            self.trials.end(name, f"{stored.version.served} was put in its place")
            if terms:
                await self.trials.begin(name, stored.version, terms, bool(weight), rows)
                if self.registry.table.routes.get(name) != route:
                    self.trials.end(name, "its route was changed")
                    return await self._too_late(stored)
            return await self._routed(stored, route, weight, bool(terms), fits.said)

    def _may_be_put(self, name: str, folder: Path, weight: float, whole: bool, engine: str) -> None:
        """Raises BadInput for what no version can be put as here."""
        if engine and not whole:
            raise BadInput(f"{folder} is no whole model, and an engine is for one", "leave out --engine")
        if name in self.brings and not whole:
            raise BadInput(
                f"{name} is the model that the gateway was started with, and {folder} is an adapter",
                "put the adapter under another name, or merge it (peftopt merge) and put the merged model",
            )
        if not (whole or self.loads):
            raise BadInput(
                "this engine takes no adapters while it runs", "serve a base with --adapter on vllm or eager"
            )
        if "@" in name or not name.strip() or "/" in name:
            raise BadInput(f"{name!r} cannot be an adapter's name", "choose one without @ and /")
        if not 0 <= weight < 1:
            raise BadInput(f"a canary's share of {weight:g} is not between 0 and 1", "write --canary 10%")

    def _stands(self, name: str, certify: bool) -> bool:
        """Whether a version that is put again answers users, and has had to prove as much as is asked for now."""
        doubtful = name in self.failures or name in self.doubts
        return not doubtful and self.registry.versions[name].certified >= certify

    def _checked(self, name: str, folder: Path, engine: str) -> str:
        """The engine that a whole model is served by. Raises BadInput for what is no safe model, MissingEnvironment
        where the engine is not installed or the memory does not hold another one."""
        engine = self.engines.named(engine, folder, name)
        checks.model(folder, engine)
        engines.check_room(folder)
        return engine

    async def _fit(self, stored: Stored, route: Route | None) -> Outcome:
        """Load a version and ask whether it answers as itself: accepted with what is to be said of it, or rejected."""
        version = stored.version
        # a version that is loaded already, as the one kept for a rollback, keeps its name and its fingerprints
        stored = self.registry.keep(stored, state="loading")
        known = version.served in self.fingerprints and version.served not in self.failures
        if not known and (error := await self.loader.load(stored)):
            return await self._reject(stored, f"it does not load: {error}")
        said, why = "", ""
        try:
            if not known:
                await self.loader.alone(version.served)
            names = [*self.registry.table.served(), version.served]
            wrong = await self.wrong(names, version.served)
            why = wrong[0] if wrong else ""
            if stored.engine and route and not why:
                said, why = await self._as_adapter(stored, route)
        except WorkerFailed as error:
            why = error.message
            if untold(error):
                self.loader.untold(version.served)
        if why and stored.certified:
            return await self._reject(stored, why)
        self.failures.clear(version.served)
        if not why:
            self.trust(version.served)
        told = [said, f"--certify none lets this pass: {why}" if why else ""]
        return Outcome(ACCEPTED, "; ".join(filter(None, told)), version.id)

    async def _as_adapter(self, stored: Stored, route: Route) -> tuple[str, str]:
        """What is to be said of a merged model beside the adapter that answers now, and why it is not that adapter."""
        live = self.registry.versions.get(route.live.served)
        if live is None or live.engine:
            return "", ""
        found = merged.origin(Path(stored.folder))
        compared = await asyncio.to_thread(merged.against, found, self.settings.base, Path(live.folder))
        return compared.judged(self.fingerprints.known, stored.version.served, live.version.served, BASE)

    async def _routed(self, stored: Stored, route: Route | None, weight: float, tried: bool, said: str) -> Outcome:
        """Let a version answer, or where it is on trial without a share of the users, stand beside the live one."""
        version = self.engines.where(stored.version.served) or stored.version
        if route and (weight or tried):
            now = Route(route.live, version, weight, route.previous)
        else:
            again = route and route.live == version  # it had failed, and the one before it is still there
            before = (route.previous if again else route.live) if route else None
            now = Route(version, previous=before)
        await self.change(stored.name, now)
        share = f" for {weight:.0%} of users" if weight else " nobody yet: it is on trial" if tried else ""
        doubt = self.fingerprints.doubt(version.served)
        return Outcome(ACCEPTED, f"{version.served} answers{share}{doubt}" + (f"; {said}" if said else ""), version.id)

    async def _too_late(self, stored: Stored) -> Outcome:
        """The route was changed while a version was loaded: that change stays."""
        name, version = stored.name, stored.version
        if arm := self._routed_as(version):
            self.registry.keep(self.registry.versions[version.served], state=arm)
        else:
            await self._unloaded(stored)
        live = self.registry.table.routes.get(name)
        now = f"{live.live.served} answers" if live else "it was removed"
        said = f"{name} was changed while {version.served} was loaded, and stays so: {now}; put it again"
        return Outcome(INCONCLUSIVE, said, version.id)

    async def promote(self, name: str) -> Outcome:
        """The canary becomes live. Raises BadInput without one."""
        return await self.turn(name, Route.promoted, "answers everybody")

    async def rollback(self, name: str) -> Outcome:
        """The canary is dropped, or without one the version before the live one answers again, at once: it is still
        loaded. Raises BadInput if there is neither."""
        return await self.turn(name, Route.rolled_back, "answers everybody again")

    async def remove(self, name: str) -> Outcome:
        """Stop answering under this name at once, then unload all its versions. A name that the gateway was started
        with answers as at the start. Raises BadInput for a name without a version that was put."""
        route = self.registry.table.routes.get(name)
        if route is None:
            raise BadInput(f"no adapter named {name!r}", f"known: {', '.join(self.registry.table.routes)}")
        left_over = Route(Version("", self.brings[name])) if name in self.brings else None
        if route == left_over:
            raise BadInput(f"{name} is what the gateway was started with", "start the gateway without it")
        self.registry.route(name, left_over)
        self.trials.end(name, f"{name} was removed")
        for version in route.versions():
            self._replaced.setdefault(version.served, 0.0)
        self.show()
        await self.published()
        left = await self.retire()
        said = f"{name} answers as at the start" if left_over else f"{name} is unloaded"
        return Outcome(REJECTED if left else ACCEPTED, "; ".join(left) or said)

    async def turn(
        self, name: str, turned: Callable[[Route], Route], said: str, judged: Version | None = None
    ) -> Outcome:
        """Change a route; with `judged` only while that is its canary, as a trial needs it."""
        route = self.registry.table.routes.get(name)
        if route is None:
            raise BadInput(f"no adapter named {name!r}", f"known: {', '.join(self.registry.table.routes)}")
        if judged and route.canary != judged:
            raise BadInput(f"{judged.served} is not the canary any more", "put it again to judge it")
        try:
            now = turned(route)
        except LookupError as error:
            raise BadInput(f"{name}: {error}", "list what there is: peftopt adapters list") from error
        await self.change(name, now)
        self.trials.end(name, f"an operator decided: {now.live.served} {said}")
        return Outcome(ACCEPTED, f"{now.live.served} {said}", now.live.id)

    def heard(self, line: Line, sticky: str, path: str, asked: Mapping[str, Json]) -> None:
        """A user's request is over: if its route is on trial it counts, and some are sent to both versions."""
        self.trials.heard(line, sticky)
        if drawn(line, self.trials.shares.get(line.adapter, 0.0)):
            self.trials.shadow(line, path, asked)

    def doubt(self, name: str, why: str) -> None:
        """A version that answers users does not answer as itself. This is reported; operators decide."""
        if self.doubts.get(name) == why:
            return
        self.doubts[name] = why
        self.registry.tell("does not answer as itself", served=name, why=why)
        what = "it still answers users: peftopt adapters list, rollback and remove are yours"
        self.tell(f"WARNING: {name} does not answer as itself, twice in a row; {what}. {why}")
        self.show()

    def trust(self, name: str) -> None:
        """A version answers as itself."""
        if self.doubts.pop(name, ""):
            self.registry.tell("answers as itself again", served=name)
            self.tell(f"{name} answers as itself again")
            self.show()

    def refuse(self, name: str, why: str) -> None:
        """Let a version answer no users until it answers as itself again. A model that the engine had from its start is
        only reported."""
        if name in self.registry.versions:
            self.fails(name, f"it does not answer as itself, twice in a row: {why}")
        else:
            self.doubt(name, why)

    # ---- in the background

    async def retire(self) -> list[str]:
        """Unload versions that no route needs and whose time is over; returns those that are still there.

        It first waits for their running requests, without delaying a rollback."""
        for name, route in self.registry.table.routes.items():
            old = route.previous
            if old and old.id and time.monotonic() - self._replaced.get(old.served, 0.0) > self.settings.keep_s:
                self.registry.route(name, Route(route.live, route.canary, route.weight))
        going = [stored.version.served for stored in self._not_needed()]
        await self.published()  # from now on their requests can only end
        until = time.monotonic() + self.settings.drain_s
        while any(self.in_flight[name] for name in going) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        async with self.one_at_a_time:
            gone = [stored for stored in self._not_needed() if stored.version.served in going]  # none was put again
            for stored in gone:
                self.fingerprints.retire(stored.version.served)
            left = [why for stored in gone if (why := await self._unloaded(stored))]
            self.show()
            return left

    def _not_needed(self) -> list[Stored]:
        needed = self.registry.table.served()
        return [stored for name, stored in self.registry.versions.items() if name not in needed]

    def fails(self, name: str, why: str) -> None:
        """A version answers no users until it is mended. Users get the first line of the reason: the engine's output is
        for operators."""
        self.failures.note(name, why.partition("\n")[0], time.monotonic())
        self.registry.tell("failed", served=name, why=why)
        self.tell(f"{name} has failed: {why}")
        self.show()

    # ---- the steps

    async def _unloaded(self, stored: Stored) -> str:
        """Unload it, see that it is gone, and forget it; what is wrong, "" for nothing."""
        name = stored.version.served
        wrong = await self.loader.unload(stored)
        self.failures.clear(name)
        self.doubts.pop(name, None)
        self._replaced.pop(name, None)
        self.registry.forget(name)
        return wrong

    async def wrong(self, names: Iterable[str], new: str = "") -> list[str]:
        """The versions, of some, that do not answer as themselves when all are asked at once. Of failed versions only
        the `new` one is asked. Raises WorkerFailed if they do not answer."""
        asked = [name for name in dict.fromkeys(names) if name == new or name not in self.failures]
        return await self.loader.mixed(asked)

    async def _reject(self, stored: Stored, why: str) -> Outcome:
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

    async def change(self, name: str, route: Route) -> None:
        """Change a name's route in one step, and note the state of each version."""
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
        self.show()
        await self.published()

    def show(self) -> None:
        """Update the metrics to the served versions."""
        standing.show(self)


async def _at_once() -> None:
    """One process answers users, by the table that was changed."""
