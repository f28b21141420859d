"""The gateway's limits: requests at once, requests that wait, and their longest wait. Pure.

For a load under which the service level held, Little's law gives the number of requests at once: the rate times the
mean time of one. The longest wait is the limit less the engine's own time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from peftopt.errors import BadInput

OFF, DECISION = "off", "decision"
HINT = "write running=32,waiting=64,wait=400ms, or off"
_FIELD = re.compile(r"(running|waiting|wait|rate)=([0-9.]+)(ms|s|/s)?")


@dataclass(frozen=True)
class Limits:
    """`running` requests at the engine at once, `waiting` requests that may wait for it; 0 = without limit for the
    first, none for the second if `running` is set. `wait_ms`: the longest wait, 0 = without limit. `rate`: requests per
    second that the engine can serve, 0 = not known. `queued_tokens`: tokens of prompts that the engine can read within
    the limit, 0 = not known. `source`: the run or file that the numbers come from."""

    running: int = 0
    waiting: int = 0
    wait_ms: float = 0.0
    rate: float = 0.0
    source: str = ""
    queued_tokens: int = 0

    def __str__(self) -> str:
        """In words, with where they are from."""
        wait = f", of at most {self.wait_ms:.0f} ms" if self.wait_ms else ""
        return f"{self.running} requests run, {self.waiting} wait{wait}; from {self.source}"


@dataclass(frozen=True)
class Held:
    """A load under which the service level held: `rate` requests a second, with `worked_s` seconds of the engine's work
    on each on average. `level` is the limit as it was written, `limit_s` in seconds. `needs_s` of it pass in the engine
    without a queue, in 95 % of requests or the share of the limit. `prefill`: tokens of prompts per second, 0 = not
    known."""

    rate: float
    worked_s: float
    level: str
    limit_s: float
    needs_s: float
    source: str
    prefill: float = 0.0

    def limits(self) -> Limits:
        """The limits with which the level holds at any load."""
        spare_s = max(0.0, self.limit_s - self.needs_s)
        return Limits(
            running=max(1, math.ceil(round(self.rate * self.worked_s, 6))),
            waiting=math.floor(self.rate * spare_s),
            wait_ms=1e3 * spare_s,
            rate=self.rate,
            source=f"{self.source}: {self.level} held at {self.rate:.3g} requests/s",
            queued_tokens=math.floor(self.prefill * self.limit_s),
        )


def parse(text: str) -> Limits:
    """The limits in "running=32,waiting=64,wait=400ms". Raises BadInput that says how to write them."""
    if text in ("", OFF):
        return Limits()
    found: dict[str, float] = {}
    for part in text.split(","):
        match = _FIELD.fullmatch(part.strip())
        if not match or match[1] in found:
            raise BadInput(f"--limits: {part!r} is not a limit", HINT)
        unit = match[3] or ""
        if unit not in {"wait": ("ms", "s"), "rate": ("/s",)}.get(match[1], ("",)):
            raise BadInput(f"--limits: {part!r} has not the unit it needs", "write wait=400ms, rate=2.5/s, running=32")
        try:
            value = float(match[2])
        except ValueError:
            raise BadInput(
                f"--limits: {match[2]!r} is not a number", "write running=32,waiting=64,wait=400ms"
            ) from None
        if match[1] in ("running", "waiting") and value != int(value):
            raise BadInput(f"--limits: {part!r} is not a whole number of requests", HINT)
        found[match[1]] = 1e3 * value if unit == "s" else value
    if not found.get("running"):
        raise BadInput("--limits: running is missing", "requests wait only where so many may run: running=32,…")
    return Limits(
        int(found["running"]), int(found.get("waiting", 0)), found.get("wait", 0.0), found.get("rate", 0.0), "--limits"
    )
