"""A watch that goes on: spans from a source, heard by the detectors, kept for a person, and the state between two."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from peftopt import store
from peftopt.errors import BROKEN, BadInput, MissingEnvironment, unwritable
from peftopt.records import Json, JsonValue
from peftopt.watch import history as histories
from peftopt.watch.history import History
from peftopt.watch.promise import Promise
from peftopt.watch.spans import Span
from peftopt.watch.watching import Alarm, Watching

KIND, FORMAT = "peftopt.watch", 1
ALARMS_KEPT = 20


class Source(Protocol):
    """Spans in the order of time. `notices`: sentences of what is odd, or what it cannot tell."""

    notices: list[str]

    @property
    def lines(self) -> int:
        """How much was read: lines, or looks at metrics."""

    def read(self, now: float | None = None) -> Iterator[Span]:
        """The spans that are complete since the last call, at `now` (seconds since 1970). Raises MissingEnvironment or
        BadInput where there is nothing to read."""

    @property
    def position(self) -> JsonValue:
        """How far it has read: all that another needs to go on from there."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """What could not be read: how much, by reason."""


@dataclass(frozen=True)
class Heard:
    """A span, and the alarms that it gave."""

    span: Span
    alarms: Sequence[Alarm]


@dataclass
class Watch:
    """All that is known of production so far. `alarms`: the last ones, also of watches before this one."""

    promise: Promise
    watching: Watching
    history: History
    alarms: deque[Alarm] = field(default_factory=lambda: deque(maxlen=ALARMS_KEPT))
    heard: int = 0

    def hear(self, spans: Iterator[Span]) -> Iterator[Heard]:
        """Take spans into the account, one by one."""
        for span in spans:
            alarms = self.watching.hear(span)
            self.history.add(span)
            self.alarms.extend(alarms)
            self.heard += 1
            yield Heard(span, alarms)

    def as_json(self) -> dict[str, JsonValue]:
        """All that a later watch needs."""
        return {
            "watching": self.watching.as_json(),
            "history": self.history.as_json(),
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }


def begun(promise: Promise, arl_s: float, window_s: float) -> Watch:
    """A watch that has heard nothing."""
    return Watch(promise, Watching(promise, arl_s, window_s), History(promise))


@dataclass(frozen=True)
class Saved:
    """What a file says of a watch. `source`: what it read, such as "--logs requests.jsonl"; `every_s` and `arl_s` are
    those that it was begun with."""

    source: str
    position: Json
    every_s: float
    arl_s: float
    values: Json

    def watch(self, promise: Promise, path: Path) -> Watch:
        """Go on from there. Raises BadInput for the state of another promise or form."""
        try:
            watching = Watching.restored(promise, self.values["watching"])
            history = histories.of_json(promise, self.values["history"])
            alarms = deque((Alarm(**alarm) for alarm in self.values["alarms"]), maxlen=ALARMS_KEPT)
        except BROKEN as error:
            raise _broken(path) from error
        return Watch(promise, watching, history, alarms)


def read(path: Path) -> Saved | None:
    """A state; None where there is none yet. Raises BadInput for another file, MissingEnvironment for one that cannot
    be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (values["kind"], values["format"]) != (KIND, FORMAT):
            raise ValueError
        return Saved(values["source"], values["position"], values["every_s"], values["arl_s"], values)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MissingEnvironment(f"cannot read the state {path}: {error.strerror}", "name another: --state") from error
    except BROKEN as error:
        raise _broken(path) from error


@dataclass(frozen=True)
class Kept:
    """Where a watch is kept between two calls, and what it was begun with: see `Saved`."""

    path: Path
    source: str
    every_s: float
    arl_s: float

    def write(self, watch: Watch, reading: Source) -> None:
        """Keep the state, whole or not at all. Raises MissingEnvironment where the file cannot be written."""
        values = {
            "kind": KIND,
            "format": FORMAT,
            "source": self.source,
            "position": reading.position,
            "every_s": self.every_s,
            "arl_s": self.arl_s,
            **watch.as_json(),
        }
        store.write(self.path, json.dumps(values, separators=(",", ":")), hint="name another: --state FILE")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other watch goes on with this state meanwhile; the kernel frees the lock of a process that died. Raises
    BadInput where one does, MissingEnvironment where nothing can be written there."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        handle = lock.open("w")
    except OSError as error:
        raise unwritable(path, error, "name another place: --state FILE") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = f"another watch goes on with the state {path}"
            raise BadInput(what, "let it end, or name another: --state FILE") from error
        yield


def _broken(path: Path) -> BadInput:
    hint = "remove it to begin anew, or name another: --state FILE"
    return BadInput(f"{path} is not the state of a watch of this peftopt", hint)
