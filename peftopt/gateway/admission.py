"""Who may go to the engine now, who waits, and who is refused at once. Pure: time is a number that is passed in.

Each adapter has a queue. The one that has been served the fewest tokens is next. One that comes back after a pause
starts level with the least served of those that wait, or where nobody waits, with the last that has gone on: so nobody
saves up (the virtual token counter of Sheng et al., Fairness in Serving Large Language Models, OSDI 2024). A request is
refused when too many wait, or when it would wait longer than it may: better an answer now that says so than a late one.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

from peftopt.gateway.limits import Limits

RATE_FROM = 8
"""Requests after which the engine's own pace is taken from what has left, where the limits do not tell a rate."""


@dataclass(eq=False)
class Ticket:
    """A request's place. `arrived` and `admitted` in seconds; `admitted` is nan until it may go on."""

    adapter: str
    key: str = ""
    arrived: float = 0.0
    admitted: float = math.nan


@dataclass(frozen=True)
class Refused:
    """Why a request is turned away: `reason` is one of "waiting", "wait", "adapter", "key"; `retry_s` when to come
    again; `said` is for the user."""

    reason: str
    retry_s: float
    said: str


@dataclass
class Admission:
    """The waiting room. `per_adapter` and `per_key`: requests that one may have here, running and waiting; 0 = any."""

    limits: Limits
    per_adapter: int = 0
    per_key: int = 0
    running: int = 0
    waiting: int = 0
    _queues: dict[str, deque[Ticket]] = field(default_factory=dict)
    _served: Counter[str] = field(default_factory=Counter)
    _last: str = ""
    """The adapter that has gone on last."""
    _here: Counter[tuple[str, str]] = field(default_factory=Counter)
    _left: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def arrive(self, ticket: Ticket, now: float) -> Refused | None:
        """Take a request in: it may go on, where `ticket.admitted` is a number then, or waits. Or refuse it."""
        if refused := self._over_its_cap(ticket) or self._too_late(now):
            return refused
        ticket.arrived = now
        self._here["adapter", ticket.adapter] += 1
        self._here["key", ticket.key] += 1
        queue = self._queues.setdefault(ticket.adapter, deque())
        if not queue:
            self._catch_up(ticket.adapter)
        queue.append(ticket)
        self.waiting += 1
        self.admit(now)
        return None

    def admit(self, now: float) -> list[Ticket]:
        """Let those go on that there is room for; who has done so now."""
        let_in = []
        while self.waiting and (not self.limits.running or self.running < self.limits.running):
            adapter = min((a for a, queue in self._queues.items() if queue), key=lambda a: (self._served[a], a))
            ticket = self._queues[adapter].popleft()
            ticket.admitted = now
            self._last = adapter
            self.waiting -= 1
            self.running += 1
            let_in.append(ticket)
        return let_in

    def leave(self, ticket: Ticket, tokens: int, now: float) -> list[Ticket]:
        """A request is over, wherever it stood, and took so many tokens; who may go on in its place."""
        if math.isnan(ticket.admitted):
            self._queues[ticket.adapter].remove(ticket)
            self.waiting -= 1
        else:
            self.running -= 1
            self._served[ticket.adapter] += tokens
            self._left.append(now)
        for cap in (("adapter", ticket.adapter), ("key", ticket.key)):
            self._here[cap] -= 1
        return self.admit(now)

    def predicted_wait_s(self, now: float) -> float:
        """Seconds that a request would wait which came now: those ahead of it, at the pace of the engine."""
        if not self.limits.running or self.running < self.limits.running:
            return 0.0
        pace = self.limits.rate or self._pace(now)
        return (self.waiting + 1) / pace if pace else 0.0

    def refusal(self, reason: str, now: float) -> Refused:
        """The words of a refusal, and when to come again."""
        wait = self.predicted_wait_s(now)
        source = f" (from {self.limits.source})" if self.limits.source else ""
        most = f"at most {self.limits.wait_ms:.0f} ms are allowed"
        said = {
            "waiting": f"{self.limits.waiting} requests wait already, as many as may{source}",
            "wait": f"the wait is about {wait * 1e3:.0f} ms, and {most}{source}",
        }
        return Refused(reason, max(1.0, math.ceil(wait)), said[reason])

    def _over_its_cap(self, ticket: Ticket) -> Refused | None:
        for kind, name, cap in (("adapter", ticket.adapter, self.per_adapter), ("key", ticket.key, self.per_key)):
            if cap and self._here[kind, name] >= cap:
                whose = f"the model {name!r}" if kind == "adapter" else "this API key"
                return Refused(kind, 1.0, f"{whose} has {cap} requests here, as many as it may")
        return None

    def _too_late(self, now: float) -> Refused | None:
        if not self.limits.running or self.running < self.limits.running:
            return None
        if self.waiting >= self.limits.waiting:
            return self.refusal("waiting", now)
        if self.limits.wait_ms and self.predicted_wait_s(now) * 1e3 > self.limits.wait_ms:
            return self.refusal("wait", now)
        return None

    def _catch_up(self, adapter: str) -> None:
        """One that has not waited starts level with the least served of those that do, or where none does, with the one
        that has gone on last."""
        waiting = [self._served[other] for other, queue in self._queues.items() if queue]
        level = min(waiting) if waiting else self._served[self._last]
        self._served[adapter] = max(self._served[adapter], level)

    def _pace(self, now: float) -> float:
        """Requests per second that have left of late; 0 where that is not known yet."""
        if len(self._left) < RATE_FROM or now <= self._left[0]:
            return 0.0
        return len(self._left) / (now - self._left[0])
