"""How long a gateway may take to start and to end, so that whoever stops it waits long enough. Pure, in seconds.

SIGTERM -> no new requests -> drain -> the engine ends -> connections and the log -> the end
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peftopt.engines._server import STOP_S
from peftopt.gateway.backends import Start
from peftopt.gateway.listening import CLOSE_S
from peftopt.gateway.run import LINES_S
from peftopt.gateway.workers.supervisor import END_S

PRE_STOP_S = 5.0
"""A router goes on to send requests for some seconds after it was told that a gateway ends: that long it still takes
them."""
MARGIN_S = 5.0
"""For all that nobody has measured."""
ADAPTERS_S = 120.0
"""For loading the adapters at the start and asking them, beyond the engine's own start."""


@dataclass(frozen=True)
class Part:
    """A part of a time: `seconds` and what they are for."""

    seconds: float
    what: str


@dataclass(frozen=True)
class Sum:
    """A time and the parts that it is made of, in whole seconds, rounded up."""

    parts: tuple[Part, ...]

    @property
    def seconds(self) -> int:
        """The whole."""
        return sum(math.ceil(part.seconds) for part in self.parts)

    def __str__(self) -> str:
        """The addition, to be shown in a comment."""
        shown = " + ".join(f"{math.ceil(part.seconds)} s {part.what}" for part in self.parts)
        return f"{self.seconds} s = {shown}"


@dataclass(frozen=True)
class Times:
    """Of a gateway that drains for `drain_s` and allows answers of `whole_s` (0 = any), with an engine of its own or
    not, and so many workers."""

    drain_s: float
    whole_s: float
    own_engine: bool
    workers: int = 1

    @property
    def stop(self) -> Sum:
        """From SIGTERM to the end."""
        closing = 2 * CLOSE_S + LINES_S if self.workers == 1 else CLOSE_S + END_S
        parts = [Part(self.drain_s, "drain")]
        parts += [Part(STOP_S, "the engine ends")] if self.own_engine else []
        return Sum((*parts, Part(closing, "connections and log"), Part(MARGIN_S, "margin")))

    @property
    def grace(self) -> Sum:
        """The same with a pause before SIGTERM, in which the gateway still takes requests."""
        return Sum((Part(PRE_STOP_S, "preStop"), *self.stop.parts))

    @property
    def worker_stop(self) -> Sum:
        """From SIGTERM to the end of a worker that somebody else has started."""
        return Sum((Part(self.drain_s, "drain"), Part(CLOSE_S + LINES_S, "connections and log")))

    @property
    def start(self) -> Sum:
        """From the start until it must be ready."""
        engine = (Part(Start.ready_s, "the engine starts"),) if self.own_engine else ()
        return Sum((*engine, Part(ADAPTERS_S, "adapters are loaded and asked")))

    @property
    def cut(self) -> str:
        """Which answers a stop cuts off; "" where the drain is as long as an answer may take."""
        if self.whole_s and self.drain_s >= self.whole_s:
            return ""
        most = f"may take {self.whole_s:g} s (--whole)" if self.whole_s else "may take any time (--whole 0)"
        return f"an answer {most}, and a stop cuts off one that needs more than {self.drain_s:g} s (--drain)"
