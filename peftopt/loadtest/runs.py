"""Load a server: what to send and when, alone, up to the highest rate that holds a level, or to an adapter too many.

    traffic -> sender -> requests -> summary (what came back)

What a load found is a record like any other: `append` and `keep` put it where `decide` reads it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftopt import corpus, store
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, INTERRUPTED, REJECTED, BadInput
from peftopt.loadtest import arrivals, summary
from peftopt.loadtest.arrivals import Traced
from peftopt.loadtest.client import Client
from peftopt.loadtest.importers import Found
from peftopt.loadtest.moments import utc
from peftopt.loadtest.protocols import Prompt, Target
from peftopt.loadtest.sender import Planned, Played, Show, play, settle, warm_up
from peftopt.loadtest.summary import LoadSummary, Request, Slo
from peftopt.measurements import NO_ACCOUNT, as_json
from peftopt.metrics import counted
from peftopt.records import Json, Measurement, Workload


@dataclass(frozen=True)
class Traffic:
    """What to send. `weights` of the served names, {} = the only one; `requests`, or as many as are due in
    `duration_s`; `concurrency` > 0 is a closed loop of so many users; a `trace` says itself what is due when. `fixed`:
    every answer gets `new_tokens` exactly, where the server can."""

    prompts: Mapping[str, Prompt]
    weights: Mapping[str, float]
    new_tokens: int
    fixed: bool = True
    arrivals: str = "poisson"
    burstiness: float = 1.0
    mix: str = "uniform"
    requests: int = 0
    duration_s: float = 60.0
    concurrency: int = 0
    seed: int = 0
    trace: tuple[Traced, ...] = ()

    def check(self, rate: float) -> None:
        """Raises BadInput for traffic that cannot be."""
        for name, value, known in (("arrivals", self.arrivals, arrivals.ARRIVALS), ("mix", self.mix, arrivals.MIXES)):
            if value not in known:
                raise BadInput(f"--{name} {value} is not known", f"known: {', '.join(known)}")
        numbers = {
            "rate": rate,
            "burstiness": self.burstiness,
            "duration": self.duration_s,
            "new-tokens": self.new_tokens,
        }
        for name, number in numbers.items():
            if not 0 < number < 1e6:
                raise BadInput(f"--{name} {number:g}: must be more than 0", "leave it out for its default")
        if any(not w > 0 for w in self.weights.values()):
            raise BadInput("a weight of --model must be more than 0", "write --model NAME=2")
        if lacking := [t.id for t in self.trace if t.id and t.id not in self.prompts]:
            raise BadInput(
                f"the trace names the prompt {lacking[0]!r}, which is not in the prompts",
                "give its file with --prompts",
            )
        if not self.prompts and not self.trace:
            raise BadInput("no prompts to send", "add --prompts FILE.jsonl, or a --trace with prompt_tokens")

    def expected(self, rate: float) -> int:
        """How many requests a run has."""
        return len(self.trace) or self.requests or max(2, round(rate * self.duration_s))

    def planned(self, rate: float, names: Sequence[str], again: int = 0) -> list[Planned]:
        """The requests at `rate`; `again` makes other ones of the same kind."""
        seed = self.seed + 1000 * again
        weights = {name: self.weights.get(name, 1.0) for name in names}
        if self.trace:
            mixed = arrivals.mix(weights, self.mix, len(self.trace), seed)
            return [self._traced(n, t, mixed[n]) for n, t in enumerate(self.trace)]
        n = self.expected(rate)
        times = [0.0] * n if self.concurrency else arrivals.arrivals(self.arrivals, rate, n, seed, self.burstiness)
        ids, mixed = arrivals.in_order(list(self.prompts), n, seed), arrivals.mix(weights, self.mix, n, seed)
        whole = zip(times, ids, mixed, strict=True)
        return [Planned(at, id_, model, self.prompts[id_], self.new_tokens) for at, id_, model in whole]

    def _traced(self, number: int, line: Traced, mixed: str) -> Planned:
        made_up = Prompt(text=arrivals.made_up(line.prompt_tokens, number))
        prompt = self.prompts[line.id] if line.id else made_up
        new_tokens = line.new_tokens or self.new_tokens
        return Planned(line.at, line.id or f"made up {number}", line.model or mixed, prompt, new_tokens)


@dataclass(frozen=True)
class Trial:
    """One rate that was tried, and whether it held."""

    rate: float
    held: bool
    played: Played


@dataclass
class Loaded:
    """A server under load: one run, or in a search all its trials and the `highest` rate that held (None: none did), or
    the runs with 1, 2, … adapters (`sets`). `notes` say what a reader must know."""

    played: Played
    warmed: list[Request]
    notes: list[str]
    trials: list[Trial] = field(default_factory=list)
    highest: float | None = None
    sets: list[Played] = field(default_factory=list)


def run(target: Target, traffic_: Traffic, rate: float, show: Show, patient: bool = False) -> Loaded:
    """One load at `rate` (requests a second; of no meaning to a trace or a closed loop).

    Raises MissingEnvironment when no server answers, BadInput for a name that is not served.
    """

    async def session() -> Loaded:
        async with Client(target) as client:
            names, warmed = await _ready(client, traffic_)
            played = await _play(client, traffic_, traffic_.planned(rate, names), show, patient)
            return Loaded(played, warmed, _notes(client, traffic_, played))

    return asyncio.run(session())


def find_rate(
    target: Target, traffic_: Traffic, start: float, slos: Sequence[Slo], show: Show, tell: Callable[[Trial], None]
) -> Loaded:
    """The highest rate at which the service levels hold, verified by repeats, each with other arrivals and prompts.
    `tell` hears of each trial. An interrupt ends the search without an answer. Raises as `run` does."""

    async def session() -> Loaded:
        async with Client(target) as client:
            names, warmed = await _ready(client, traffic_)
            trials: list[Trial] = []
            search = summary.highest_rate(start)
            rate = next(search)
            while True:
                planned = traffic_.planned(rate, names, again=len(trials))
                played = await _play(client, traffic_, planned, show, patient=False)
                share = summary.attained(played.requests, slos).estimate
                trials.append(Trial(rate, not played.stopped and share >= summary.ATTAINED, played))
                tell(trials[-1])
                notes = _notes(client, traffic_, played)
                if played.stopped == "interrupted":
                    return Loaded(played, warmed, notes, trials)
                if not share and summary.apart(played.requests):
                    notes = [*notes, "a request alone misses the service level: no rate can hold it"]
                    return Loaded(played, warmed, notes, trials)
                await settle(client)
                try:
                    rate = search.send(trials[-1].held)
                except StopIteration as highest:
                    best = [t for t in trials if t.rate == highest.value]
                    last = best[-1].played if best else played
                    return Loaded(last, warmed, notes, trials, highest.value)

    return asyncio.run(session())


def find_cliff(target: Target, traffic_: Traffic, rate: float, show: Show, tell: Callable[[Played], None]) -> Loaded:
    """The same load on the first served name alone, on two of them, and so on: where users begin to wait, the engine
    has fewer slots than adapters (see summary.cliff). `tell` hears of each run. Raises as `run` does."""

    async def session() -> Loaded:
        async with Client(target) as client:
            names, warmed = await _ready(client, traffic_)
            loaded = Loaded(Played(), warmed, [])
            for size in range(1, len(names) + 1):
                planned = traffic_.planned(rate, names[:size])
                loaded.played = await _play(client, traffic_, planned, show, patient=True)
                loaded.sets.append(loaded.played)
                tell(loaded.played)
                loaded.notes = _notes(client, traffic_, loaded.played)
                if loaded.played.stopped:
                    break
                await settle(client)
            return loaded

    return asyncio.run(session())


async def _ready(client: Client, traffic_: Traffic) -> tuple[list[str], list[Request]]:
    """The served names, each asked once."""
    named = [*traffic_.weights, *(t.model for t in traffic_.trace if t.model)]
    names = await client.served(list(dict.fromkeys(named)))
    first = next(iter(traffic_.prompts.items()), ("made up", Prompt(text=arrivals.made_up(16, 0))))
    ask = [Planned(0.0, first[0], name, first[1], traffic_.new_tokens) for name in names]
    return names, await warm_up(client, ask, traffic_.fixed)


async def _play(client: Client, traffic_: Traffic, planned: Sequence[Planned], show: Show, patient: bool) -> Played:
    burstiness = traffic_.burstiness if traffic_.arrivals == "gamma" else 1.0
    # a trace is replayed as it was recorded: its own bursts are not saturation
    patient = patient or bool(traffic_.trace)
    return await play(client, planned, traffic_.fixed, traffic_.concurrency, burstiness, show, patient)


def _notes(client: Client, traffic_: Traffic, played: Played) -> list[str]:
    """What a reader of the metrics must know, worst first."""
    notes = []
    if played.stopped:
        notes.append(f"stopped: {played.stopped}; {played.unsent} requests were not sent")
    if client.guessed:
        notes.append(
            f"the server sent no usage with {counted(client.guessed, 'answer')}: messages were counted instead "
            "of tokens. Where a message holds several tokens, tokens/s and TPOT are wrong by that factor"
        )
    notes += client.notes
    delay = summary.own_delay(played.requests, played.lag_ms)
    if delay.matters:
        notes.append(
            f"the load generator was late, enough to matter (P95 {delay.p95_ms:.1f} ms to send, "
            f"{delay.loop_p95_ms:.1f} ms to wake up): run it on a machine of its own, or at a lower rate"
        )
    answered = [r for r in played.requests if not r.error]
    wanted = traffic_.new_tokens
    short = sum(r.new_tokens < wanted for r in answered) if not traffic_.trace else 0
    if traffic_.fixed and short and not client.guessed:
        refused = f"the server refuses ignore_eos: {client.refused}"
        why = "the server does not know ignore_eos" if client.extensions else refused
        notes.append(f"{short} of {len(answered)} answers are shorter than {wanted} tokens ({why}): lengths differ")
    if not client.protocol.STREAMS:
        notes.append(f"{client.target.protocol} does not stream: TTFT and ITL are not known")
    return notes


def service_levels(texts: Sequence[str]) -> list[Slo]:
    """Service levels as one writes them, such as "ttft <= 500 ms". Raises BadInput for what is not one."""
    try:
        return [summary.slo(text) for text in texts]
    except ValueError as error:
        raise BadInput(f"--slo {error}", "write it like ttft <= 500 ms") from error


def of_workload(workload: Workload, seed: int) -> dict[str, Json]:
    """What a recipe's workload says of a Traffic, and its `rate` where requests come at one. Batches that are asked one
    after the other are a closed loop of as many users."""
    arriving = {"rate": workload.rate} if workload.rate else {"concurrency": workload.users or workload.batch}
    fixed = workload.lengths == "fixed"
    return {"new_tokens": workload.new_tokens, "fixed": fixed, "requests": workload.requests, "seed": seed, **arriving}


def read_trace(trace: Path | None) -> tuple[Traced, ...]:
    """The trace of a Traffic, from its file; () without one. Raises BadInput naming the line that is broken."""
    try:
        traced = arrivals.trace(corpus.text_of(trace.read_bytes()).split("\n")) if trace else []
    except OSError as error:
        raise BadInput(f"cannot read {trace}: {error.strerror}", "check the path") from error
    except ValueError as error:
        raise BadInput(f"{trace}: {error}", 'write lines such as {"offset_s": 1.25, "id": "row-7"}') from error
    if trace and not traced:
        raise BadInput(f"{trace} holds no requests", "add at least one JSON line")
    return tuple(traced)


def outcome(loaded: Loaded, slos: Sequence[Slo], searched: bool) -> int:
    """The exit code. Nothing answered is never accepted; service levels are met when the whole interval of their share
    is above the share that must meet them."""
    played = loaded.played
    if played.stopped == "interrupted":
        return INTERRUPTED
    if not any(not r.error for r in played.requests):
        return ENVIRONMENT
    if searched:
        return ACCEPTED if loaded.highest is not None else REJECTED
    if not slos:
        return ACCEPTED
    share = summary.attained(played.requests, slos)
    if played.stopped or share.high < summary.ATTAINED:
        return REJECTED
    return ACCEPTED if share.low >= summary.ATTAINED else INCONCLUSIVE


COMPUTED = ("figures", "by_model", "adapters", "queues_ms", "cliff")
"""What of a load is computed from its requests, and not kept."""


def append(path: Path, variant: str, loaded: LoadSummary, workload: str = "") -> None:
    """Add a run to a file of measurements, on disk before this returns: the raw requests, and no metrics, which are
    computed from them."""
    kept = {key: value for key, value in as_json(loaded).items() if key not in COMPUTED}
    kept["slo"] = loaded.figures.slo
    kept["trials"] = [{"rate": each.rate, "held": each.held, "stopped": each.stopped} for each in loaded.trials]
    record = Measurement("load", variant, workload, values={"source": "peftopt", **kept}, at=utc(time.time()))
    store.append(path, record, hint="choose another --out")


def keep(path: Path | None, result: Found, variant: str, workload: str = "") -> Measurement:
    """Another tool's run as a record, added to a file of measurements where one is given."""
    record = result.measurement(variant, utc(time.time()), workload)
    if path:
        store.append(path, record, hint="choose another --out")
    return record


def summarized(loaded: Loaded, slos: Sequence[Slo], slots: int = 0) -> LoadSummary:
    """A run's metrics and its raw requests; `slots` are the server's, 0 where they are not known."""
    played, whole = loaded.played, [*loaded.warmed, *loaded.played.requests]
    engine = played.engine
    if slots and engine != NO_ACCOUNT:
        engine = replace(engine, slots=slots)
    waits = tuple(summary.waited(one.requests) for one in loaded.sets)
    queues = tuple(one.engine.queue_ms for one in loaded.sets)
    return LoadSummary(
        started=played.started,
        figures=summary.figures(played.requests, slos),
        by_model=summary.by_model(whole, slos),
        own_delay=summary.own_delay(played.requests, played.lag_ms),
        engine=engine,
        stopped=played.stopped,
        unsent=played.unsent,
        notes=tuple(loaded.notes),
        trials=tuple(summary.tried(t.played.requests, slos, t.rate, t.held, t.played.stopped) for t in loaded.trials),
        highest_rate=loaded.highest,
        adapters=waits,
        queues_ms=queues,
        cliff=summary.cliff(waits, queues),
        requests=tuple(r.record() for r in whole),
    )
