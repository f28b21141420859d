"""Versions on trial: collects their requests, sends more beside the users, and acts on the verdicts.

A trial is in the registry, so it goes on after a restart. The time without a gateway does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING

from peftopt.corpus import Row
from peftopt.errors import ACCEPTED, INCONCLUSIVE, REJECTED, MissingEnvironment, PeftoptError, WorkerFailed
from peftopt.gateway.asking import Asker, Full
from peftopt.gateway.labelled import LIVE, NEW, RUNS, Labelled, Run
from peftopt.gateway.lines import Line
from peftopt.gateway.outcome import Outcome
from peftopt.gateway.prompts import Prompts
from peftopt.gateway.registry import shown
from peftopt.gateway.routes import Route, Version
from peftopt.gateway.said import Said
from peftopt.gateway.trial import Judged, Terms, Trial
from peftopt.records import Json

if TYPE_CHECKING:
    from peftopt.gateway.lives import Lives

AT_ONCE = 2
"""So many users' prompts are asked again at once, at most; what comes meanwhile is dropped."""
ITSELF_EVERY_S, ITSELF_SHARE = 120.0, 0.05
"""A version on trial and the live one are asked so often whether they answer as themselves, and on a slow engine less
often: this share of the time may go to it."""
NOT_COUNTED = ("cancelled", "request", "refused")
"""Kinds of errors that are not the version's."""
LENGTHS = 4
"""A user's prompt without a limit on its answer is asked again for this many times the tokens that the user got."""
LEAST_TOKENS = 64


class Trials:
    """The trials of one gateway. `asker` asks beside the users; without it nothing is asked."""

    def __init__(self, lives: Lives) -> None:
        self.lives, self.registry = lives, lives.registry
        self.asker: Asker | None = None
        self._prompts: dict[str, Prompts] = {}
        self._began: dict[str, float] = {}
        """When each began, less what had passed before this gateway started (monotonic)."""
        self._itself: dict[str, float] = {}
        """When each is asked next whether it answers as itself (monotonic)."""
        self._news: set[str] = set()
        """Trials of which something has been seen since they were judged."""
        self._judged: dict[str, tuple[int, int]] = {}
        """How many windows and pairs of requests each was last judged by."""
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}
        self._shadows = 0
        self._concluding: dict[str, Outcome] = {}
        """What came of trials whose routes are being changed for it."""

    def __contains__(self, name: str) -> bool:
        """Whether it is on trial, or what came of its trial is being done."""
        return name in self.registry.trials or name in self._concluding

    # ---- begin and end

    async def begin(self, name: str, version: Version, terms: Terms, users: bool, rows: Sequence[Row]) -> None:
        """Put a version on trial; its route is changed, and both saved, by the caller."""
        trial = Trial.begin(version.served, terms, users, len(rows))
        await asyncio.to_thread(trial.judge)  # imports what judges
        if rows:
            Prompts.write(self.registry.root, version.served, rows)
        self.registry.ended.pop(name, None)
        self.registry.trials[name] = trial
        self._start(name, trial)

    def resume(self) -> None:
        """Continue the recorded trials, and ask the remaining prompts."""
        for name, trial in list(self.registry.trials.items()):
            route = self.registry.table.routes.get(name)
            if route is None or route.canary is None or route.canary.served != trial.version:
                self.end(name, "it has no canary any more")
            elif name not in self._began:
                try:
                    self._start(name, trial)
                except PeftoptError as error:  # as where somebody took its prompts away
                    self.end(name, error.message)
            elif trial.prompts and not self._tasks[name]:
                self._run(name, self._ask_prompts(name, trial))

    def _start(self, name: str, trial: Trial) -> None:
        self._stop(name)
        self._began[name] = time.monotonic() - trial.passed_s
        self._itself[name] = time.monotonic() + ITSELF_EVERY_S
        self._news.add(name)
        if trial.prompts:
            self._prompts[name] = Prompts.read(self.registry.root, trial.version)
            self._run(name, self._ask_prompts(name, trial))

    def _stop(self, name: str) -> None:
        """Ask nothing more for a trial."""
        for task in self._tasks.pop(name, set()):
            task.cancel()
        for kept in (self._prompts, self._began, self._itself, self._judged):
            kept.pop(name, None)
        self._news.discard(name)
        self._tasks[name] = set()

    def close(self) -> None:
        """Ask nothing more, as at the gateway's end: the trials go on when it starts again."""
        for name in list(self._began):
            self.registry.trials[name].passed_s = self._passed(name)
            self._stop(name)
        self._save()

    def _run(self, name: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[name].add(task)
        task.add_done_callback(self._done_with(name))

    def _done_with(self, name: str) -> Callable[[asyncio.Task[None]], None]:
        tasks = self._tasks[name]

        def over(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                self.lives.tell(f"{name}: what is asked of its trial has stopped: {type(error).__name__}: {error}")

        return over

    def end(self, name: str, why: str) -> None:
        """End a trial before its verdict; whoever waits for it gets the reason."""
        if trial := self.registry.trials.pop(name, None):
            self._stop(name)
            version = trial.version.rpartition("@")[2]
            self.registry.ended[name] = Outcome(INCONCLUSIVE, f"the trial of {name} has ended: {why}", version)
            self.registry.tell("trial", name=name, outcome="inconclusive", rule="", why=why)
            self._save()

    def _save(self) -> None:
        with contextlib.suppress(MissingEnvironment):  # a full disk: it is written with the next that is seen
            self.registry.save()

    # ---- what is seen

    @property
    def shares(self) -> dict[str, float]:
        """The routes on trial, and the share of users' requests that both versions get again."""
        return {name: trial.terms.shadow for name, trial in self.registry.trials.items()}

    def heard(self, line: Line, sticky: str) -> None:
        """A user's request is over: it counts if its route is on trial."""
        trial = self.registry.trials.get(line.adapter)
        if trial is None or line.adapter not in self._began or not line.arm or line.kind in NOT_COUNTED:
            return
        if trial.users:
            at = self._passed(line.adapter)
            trial.windows.hear(at, line.arm, sticky, line.request_duration_ms, bool(line.kind))

    def _passed(self, name: str) -> float:
        return time.monotonic() - self._began[name]

    def shadow(self, line: Line, path: str, asked: Mapping[str, Json]) -> None:
        """Send a user's request to both versions, if there is room."""
        trial = self.registry.trials.get(line.adapter)
        if trial is None or line.adapter not in self._began:
            return
        if self.asker is None or self._shadows >= AT_ONCE or not self.asker.free:
            self._counted(line.adapter, "dropped")
            return
        self._shadows += 1
        body = dict(asked)
        if not {"max_tokens", "max_completion_tokens"} & {name for name, value in asked.items() if value is not None}:
            body["max_tokens"] = max(LEAST_TOKENS, LENGTHS * line.new_tokens)
        self._run(line.adapter, self._ask_both(line.adapter, trial, path, body))

    def _counted(self, name: str, what: str) -> None:
        self.lives.metrics.shadow.labels(name, what).inc()

    async def _ask_both(self, name: str, trial: Trial, path: str, body: Mapping[str, Json]) -> None:
        """Ask the live version twice and the new one once, in a drawn order. What is not whole is dropped."""
        assert self.asker
        try:
            said: dict[Run, Said] = {}
            for run in random.sample(RUNS, len(RUNS)):
                said[run] = await self.asker.ask(path, body, self._served(name, trial, run))
            live, again, new = (said[run] for run in RUNS)
            greedy = body.get("temperature") == 0
            trial.shadow.add(new, live, again, greedy, trial.terms, self.asker.vocabulary)
            if not trial.users:
                trial.windows.failed.add(bool(new.error), bool(live.error))
                if not (new.error or live.error or again.error):
                    trial.windows.pair(self._passed(name), new.ms, live.ms, again.ms)
            self._news.add(name)
            self._counted(name, "asked")
        except (Full, KeyError):  # users came, or the route was removed
            self._counted(name, "dropped")
        finally:
            self._shadows -= 1

    def _served(self, name: str, trial: Trial, run: Run) -> str:
        """The name at the engine of whose run it is."""
        return trial.version if run[0] == NEW else self.registry.table.routes[name].live.served

    async def _ask_prompts(self, name: str, trial: Trial) -> None:
        """Ask the operator's prompts that are left."""
        if self.asker is None:
            return
        asker, prompts, terms = self.asker, self._prompts[name], trial.terms
        served = {whose: self._served(name, trial, (whose, 1)) for whose in (LIVE, NEW)}
        left = iter(prompts.left())

        async def some() -> None:
            for row in left:
                await prompts.ask(asker, row, served, terms.schema, terms.new_tokens)
                self._news.add(name)

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))

    async def _ask_itself(self, name: str, trial: Trial) -> None:
        """Ask both, now and then, whether they still answer as themselves."""
        began = time.monotonic()
        if began < self._itself[name]:
            return
        names = [self._served(name, trial, run) for run in RUNS[1:]]
        with contextlib.suppress(WorkerFailed):  # an engine that does not answer is seen by others
            wrong = await self.lives.wrong(names)
            trial.wrong = wrong[0] if wrong else trial.wrong
            trial.itself += 1
            self._news.add(name)
        took = time.monotonic() - began
        self._itself[name] = began + max(ITSELF_EVERY_S, took / ITSELF_SHARE)

    # ---- what comes of it

    async def judge(self) -> None:
        """Promote, roll back or hold trials that are decided, or whose time is up."""
        for name, trial in list(self.registry.trials.items()):
            route = self.registry.table.routes.get(name)
            if route is None or route.canary is None or route.canary.served != trial.version:
                self.end(name, "it has no canary any more")
                continue
            trial.passed_s = self._passed(name)
            trial.windows.close(trial.passed_s)
            await self._ask_itself(name, trial)
            windows = len(trial.windows.ratios), trial.windows.failed.n
            fresh = name in self._news or windows != self._judged.get(name)
            if self.registry.trials.get(name) is not trial or not (fresh or trial.over):
                continue
            self._news.discard(name)
            self._judged[name] = windows
            self._save()
            labelled = self._labelled(name)
            if trial.over or trial.judge(labelled, brief=True).outcome != "inconclusive":
                await self._conclude(name, route.canary, trial.judge(labelled), trial)

    def _labelled(self, name: str) -> Labelled:
        return self._prompts[name].labelled if name in self._prompts else Labelled()

    def report(self, name: str) -> Outcome | None:
        """The result or the state of a route's last trial; None if there was none."""
        trial = self.registry.trials.get(name)
        if trial is None:
            return self._concluding.get(name) or self.registry.ended.get(name)
        judged = trial.judge(self._labelled(name))
        said = f"{trial.version} has been on trial for {trial.passed_s:.0f} s: {judged.rule}: {judged.said}"
        return Outcome(INCONCLUSIVE, said, trial.version.rpartition("@")[2], judged.verdicts)

    def replaced(self, name: str, version: str) -> Outcome | None:
        """The message for whoever waits for a version's verdict when another has been put on trial since."""
        latest = self.report(name)
        if latest is None or latest.version == version:
            return None
        return Outcome(INCONCLUSIVE, f"the trial of {name}@{version} has ended: {latest.version} was put in its place")

    async def _conclude(self, name: str, version: Version, judged: Judged, trial: Trial) -> None:
        del self.registry.trials[name]
        self._stop(name)
        said = f"{version.served} is judged, {judged.outcome} by {judged.rule}, and its route is being changed"
        self._concluding[name] = Outcome(INCONCLUSIVE, said, version.id, judged.verdicts)
        try:
            outcome = await self._done(name, version, judged, trial.terms)
        except PeftoptError as error:  # as a disk that is full: nothing was changed
            outcome = Outcome(INCONCLUSIVE, f"{judged.said}, but {error.message}", version.id, judged.verdicts)
        finally:
            del self._concluding[name]
        self.registry.ended[name] = outcome
        self._save()
        self.lives.tell(f"{name}: {outcome.said}")
        told = {
            "outcome": judged.outcome,
            "rule": judged.rule,
            "why": judged.said,
            "apart_nats": trial.shadow.distances,
        }
        self.registry.tell("trial", name=name, version=version.id, **told, rules=shown(judged.verdicts))

    async def _done(self, name: str, version: Version, judged: Judged, terms: Terms) -> Outcome:
        id_, rules = version.id, judged.verdicts
        if judged.outcome == "rejected":
            await self.lives.turn(name, Route.rolled_back, "answers everybody again", version)
            return Outcome(REJECTED, f"{name}@{id_} is rolled back by {judged.rule}: {judged.said}", id_, rules)
        if judged.outcome == "accepted" and terms.then == "promote":
            await self.lives.turn(name, Route.promoted, "answers everybody", version)
            return Outcome(ACCEPTED, f"{name}@{id_} is promoted: {judged.said}", id_, rules)
        if judged.outcome == "accepted":
            return Outcome(ACCEPTED, f"{name}@{id_} is accepted and stays as it is: {judged.said}", id_, rules)
        return Outcome(INCONCLUSIVE, f"{name}@{id_} is held: {judged.rule}: {judged.said}", id_, rules)
