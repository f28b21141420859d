"""The detectors of a promise, what each hears of a span, and what they say. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from peftopt import identity
from peftopt.errors import BROKEN, BadInput
from peftopt.metrics import counted
from peftopt.records import JsonValue
from peftopt.watch import hearing
from peftopt.watch.detectors import number, threshold
from peftopt.watch.hearing import Kind as Kind
from peftopt.watch.hearing import Memory, Topic
from peftopt.watch.listening import Listener, Listening, numbers, said, shown
from peftopt.watch.promise import Promise
from peftopt.watch.spans import Span

Outcome = Literal["nothing shown", "alarm", "out of range", "too little"]

FORMAT = 1
"""Of the state."""

WHOLE = ""
"""In place of an adapter's name: all adapters together, or what belongs to none."""


@dataclass(frozen=True)
class Alarm:
    """A detector's word: `at` (seconds since 1970) it was sure; the change began at `since`, as far as it can tell.
    `what` is a sentence with the figures: what was promised, what was seen, in how many requests. `adapter` is "" for
    all of several adapters."""

    kind: Kind
    name: str
    adapter: str
    at: float
    since: float
    what: str


@dataclass(frozen=True)
class Gauge:
    """How near a detector is to its alarm, 0 to 1, on the scale of the logarithm of its wealth."""

    kind: Kind
    name: str
    adapter: str
    nearness: float
    seen: str
    """Its number so far, for a person: "4.2 % of 1,204 requests took longer than 500 ms; 5 % at most was promised".
    "" where it has heard nothing yet."""


class Watching:
    """All detectors of all adapters. Together they alarm falsely once in `arl_s` seconds at most, on average.

    A detector listens to all adapters together, and where there are several another one to each of them. It bets on
    every span, and is judged whenever it has heard enough requests since it was last judged.
    """

    def __init__(self, promise: Promise, arl_s: float, window_s: float = 60.0) -> None:
        """Raises BadInput for times that make no budget."""
        if not 0 < window_s <= arl_s:
            message = f"no window of {window_s:g} s fits into {arl_s:g} s without a false alarm"
            raise BadInput(message, "give a longer time without a false alarm: --arl 30d")
        self._promise, self._arl_s, self._window_s = promise, arl_s, window_s
        self._counts = hearing.asked_of_traffic(promise)
        self._speed, self._rate = hearing.speed(promise), hearing.rate(promise)
        self._adapters: list[str] = []
        self._most = promise.adapters
        self._memory = Memory()
        self._judged = False
        self._kinds: set[Kind] = set()
        self._listeners: dict[str, Listener] = {}
        self._listener(WHOLE)

    def hear(self, span: Span) -> list[Alarm]:
        """The next span; the alarms that it gives. A detector that has alarmed begins anew."""
        speaking = [name for name, traffic in span.adapters.items() if name and traffic.asked]
        self._adapters += [name for name in speaking if name not in self._adapters]
        alarms = [*self._checked(span), *self._crowded(len(speaking), span)]
        alarms += [*self._counted(span), *self._timed(span), *self._rated(span), *self._remembered(span)]
        self._kinds |= {alarm.kind for alarm in alarms}
        return alarms

    @property
    def gauges(self) -> list[Gauge]:
        """Every detector, the nearest to its alarm first."""
        gauges = []
        for name, listener in self._listeners.items():
            for topic, each in listener.by_topic.items():
                nearness = min(1.0, each.detector.level / self._threshold(name, each))
                gauges.append(Gauge(topic.kind, topic.name, self._called(name), nearness, each.seen))
        return sorted(gauges, key=lambda gauge: -gauge.nearness)

    @property
    def outcome(self) -> Outcome:
        """Of all that was heard since it was made or restored; "too little" where nothing was ever judged, not even
        before that."""
        if self._kinds - {"range"}:
            return "alarm"
        if self._kinds:
            return "out of range"
        return "nothing shown" if self._judged else "too little"

    # ---- what is heard -------------------------------------------------------------------------

    def _names(self, span: Span) -> list[str]:
        """The adapters that have listeners of their own: a single one has no other than who hears all."""
        return [name for name in self._adapters if name in span.adapters] if len(self._adapters) > 1 else []

    def _counted(self, span: Span) -> Iterator[Alarm]:
        """Requests, checks: how many of them were amiss."""
        for topic, count in self._counts.items():
            counts = {name: count(traffic) for name, traffic in span.adapters.items()}
            whole = sum(amiss for amiss, _ in counts.values()), sum(n for _, n in counts.values())
            heard = {WHOLE: whole, **{name: counts[name] for name in self._names(span)}}
            for name, (amiss, n) in heard.items():
                if n:
                    yield from self._bet(name, topic, amiss / n, n, span)

    def _timed(self, span: Span) -> Iterator[Alarm]:
        """Tokens per second of the engine's time."""
        promised = self._promise.tokens_per_s
        if self._speed is None or promised is None or not hearing.comparable(self._promise, span):
            return
        heard = {WHOLE: [*span.adapters.values()], **{name: [span.adapters[name]] for name in self._names(span)}}
        for name, traffics in heard.items():
            speed = self._listener(name).pool.hear(traffics)
            if speed is not None:
                yield from self._bet(name, self._speed, speed < promised, 1, span, f"{speed:,.4g} in the last")

    def _rated(self, span: Span) -> Iterator[Alarm]:
        """Requests per second, of all adapters."""
        promised = self._promise.rate
        if self._rate is None or promised is None or span.seconds <= 0:
            return
        rate = sum(traffic.asked for traffic in span.adapters.values()) / span.seconds
        yield from self._bet(WHOLE, self._rate, rate > promised, 1, span, f"{rate:,.3g} in the last")

    def _remembered(self, span: Span) -> Iterator[Alarm]:
        """The engine's memory."""
        risen = self._memory.hear(span.engine, max(len(self._adapters), self._promise.adapters))
        if risen is not None:
            yield from self._bet(WHOLE, hearing.RISING, risen, 1, span, self._memory.figures())

    def _checked(self, span: Span) -> Iterator[Alarm]:
        """One answer of other weights is enough: its verdict excuses all that noise does."""
        for name, traffic in span.adapters.items():
            for verdict in ("stale", "wrong"):
                amiss = [check for check in traffic.checks if check.verdict == verdict]
                if amiss:
                    checked = counted(len(traffic.checks), "checked answer")
                    what = f"{len(amiss)} of {checked} came from {verdict} weights, not from {amiss[0].version or name}"
                    yield Alarm("adapter", verdict, name, span.began + span.seconds, span.began, what)

    def _crowded(self, live: int, span: Span) -> Iterator[Alarm]:
        """More live adapters than the run had, and than was said before."""
        if live > self._most:
            self._most = live
            had = counted(self._promise.adapters, "adapter")
            what = f"{counted(live, 'adapter')} had requests in one window, the run had {had}"
            yield Alarm("range", "adapters", WHOLE, span.began + span.seconds, span.began, what)

    # ---- bets, and their budget ----------------------------------------------------------------

    def _bet(self, name: str, topic: Topic, value: float, n: int, span: Span, figures: str = "") -> Iterator[Alarm]:
        """A detector hears a number, and alarms where it has heard enough and won enough."""
        listening = self._listener(name).by_topic[topic]
        if not listening.hear(float(value), n, span.began):
            return
        self._judged |= topic.kind not in ("range", "memory", "quality")
        if listening.detector.level < self._threshold(name, listening):
            return
        won = listening.begin_anew()
        what = f"{said(won.hits, won.n, topic)}; {shown(topic.mean)} at most was promised ({topic.name})"
        what = f"{what}; {figures}" if figures else what
        yield Alarm(topic.kind, topic.name, self._called(name), span.began + span.seconds, won.since, what)

    def _threshold(self, name: str, listening: Listening) -> float:
        """Half the budget has who hears all, half those who hear one of several adapters. No part of it ever grows."""
        part = 1.0
        if len(self._adapters) > 1:
            part = 0.5 if name == WHOLE else 0.5 / len(self._adapters)
        return threshold(self._arl_s / self._window_s, part * listening.weight)

    def _listener(self, name: str) -> Listener:
        """That of an adapter; a new one where it has none. The rate and the memory belong to no adapter."""
        if name not in self._listeners:
            topics = [*self._counts, *([self._speed] if self._speed else [])]
            if name == WHOLE:
                topics += [hearing.RISING, *([self._rate] if self._rate else [])]
            self._listeners[name] = Listener.of(topics)
        return self._listeners[name]

    def _called(self, name: str) -> str:
        """Who hears all of a single adapter hears that one."""
        return self._adapters[0] if name == WHOLE and len(self._adapters) == 1 else name

    # ---- its state -----------------------------------------------------------------------------

    def as_json(self) -> dict[str, JsonValue]:
        """Its state: small, and all that `restored` needs."""
        return {
            "format": FORMAT,
            "run": self._promise.run,
            "promise": _named(self._promise),
            "arl_s": self._arl_s,
            "window_s": self._window_s,
            "adapters": [*self._adapters],
            "most_adapters": self._most,
            "judged": self._judged,
            "memory": asdict(self._memory),
            "listeners": {name: listener.as_json() for name, listener in self._listeners.items()},
        }

    @classmethod
    def restored(cls, promise: Promise, state: Mapping[str, JsonValue]) -> Watching:
        """As it was. Raises BadInput for a state of another promise or form."""
        anew = "delete it to begin anew"
        if state.get("format") != FORMAT:
            raise BadInput(f"a state of watch has the format {FORMAT}, not {state.get('format')!r}", anew)
        if state.get("promise") != _named(promise):
            hint = f"watch that run, or {anew}"
            raise BadInput(f"the state of watch is of another promise, that of run {state.get('run')!r}", hint)
        try:
            watching = cls(promise, number(state["arl_s"]), number(state["window_s"]))
            watching._restore(state)
        except BROKEN as error:
            raise BadInput("the state of watch is damaged", anew) from error
        return watching

    def _restore(self, state: Mapping[str, JsonValue]) -> None:
        adapters, memory, listeners = state["adapters"], state["memory"], state["listeners"]
        if not isinstance(adapters, list) or not isinstance(listeners, dict):
            raise TypeError("a state has adapters and their listeners")
        self._adapters = [str(name) for name in adapters]
        self._most, self._judged = int(number(state["most_adapters"])), state["judged"] is True
        self._memory = Memory(**numbers(memory))
        for name, listener in listeners.items():
            self._listener(name).restore(listener)


def _named(promise: Promise) -> str:
    """The promise by its content."""
    return identity.of_value(asdict(promise))
