"""Which request goes to the engine now, which waits, and which is refused. Pure: time is passed in as a number.

Each adapter has a queue. The one with the fewest served tokens is next. An adapter that comes back after a pause starts
level with the least served of those that wait. If none waits, it starts level with the last one that was admitted. So
no adapter saves up credit (the virtual token counter of Sheng et al., Fairness in Serving Large Language Models, OSDI
2024). The tokens of a request are not known when it is admitted. So it is charged the tokens of its adapter's last
request, and at its end the difference.

A request is refused if too many wait, or if its predicted wait is too long: an early refusal is better than a late
answer. When all places are taken, the longest queue gives up its last place to a queue that is shorter by two or more:
an adapter that fills the places takes them from itself.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from peftopt.gateway.limits import Limits

RATE_FROM = 8
"""Requests that must have left a full engine until its own pace is taken from them."""

WAITING, WAIT, GONE = "waiting", "wait", "gone"
"""Why one is refused: too many wait; it would wait too long; it has waited too long (for users, the same as WAIT)."""


@dataclass(eq=False)
class Ticket:
    """A request's place. `arrived` at the gateway and `admitted`, in seconds; `admitted` is nan until it is admitted.
    `refused`: the refusal. `charged`: tokens that its adapter was charged for it."""

    adapter: str
    key: str = ""
    arrived: float = math.nan
    admitted: float = math.nan
    refused: Refused | None = None
    charged: int = 0

    @property
    def waits(self) -> bool:
        """Whether it is neither admitted nor refused."""
        return math.isnan(self.admitted) and self.refused is None


@dataclass(frozen=True)
class Refused:
    """Why a request is refused: `reason` is one of "waiting", "wait", "adapter", "key"; `retry_s`: seconds until a
    retry; `said`: the message for the user."""

    reason: str
    retry_s: float
    said: str


@dataclass
class Admission:
    """The queues. `per_adapter` and `per_key`: the most requests of each, running and waiting; 0 = any."""

    limits: Limits
    per_adapter: int = 0
    per_key: int = 0
    running: int = 0
    waiting: int = 0
    _queues: dict[str, deque[Ticket]] = field(default_factory=dict)
    _served: Counter[str] = field(default_factory=Counter)
    """The virtual counters: tokens by adapter."""
    _typical: defaultdict[str, int] = field(default_factory=lambda: defaultdict(lambda: 1))
    """Tokens that the last request of an adapter took."""
    _last: str = ""
    """The adapter that has gone on last."""
    _here: Counter[tuple[str, str]] = field(default_factory=Counter)
    _left: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """When requests left the engine since it has been full."""
    _known_pace: float = 0.0
    """Requests per second that left when it was full before."""

    def arrive(self, ticket: Ticket, now: float) -> list[Ticket]:
        """Admit a request, queue it, or refuse it. Returns the tickets that are decided now: `admitted` or `refused` is
        set. A refused request leaves no state."""
        if math.isnan(ticket.arrived):
            ticket.arrived = now
        refused = self._over_its_cap(ticket) or self._too_late(ticket, now)
        full = self.waiting >= self.limits.waiting and self._is_full()
        crowded_out = self._longer_than(ticket.adapter) if full else None
        if not refused and full and not crowded_out:
            refused = self.refusal(WAITING, ticket, now)
        if refused:
            ticket.refused = refused
            return [ticket]
        if crowded_out:
            self._drop(crowded_out)
            crowded_out.refused = self.refusal(WAITING, crowded_out, now)
        self._take_in(ticket)
        return [*self.admit(now), *([crowded_out] if crowded_out else [])]

    def admit(self, now: float) -> list[Ticket]:
        """Admit the requests that there is room for; returns them."""
        let_in = []
        while self.waiting and not self._is_full():
            adapter = min((a for a, queue in self._queues.items() if queue), key=lambda a: (self._served[a], a))
            ticket = self._queues[adapter].popleft()
            ticket.admitted = now
            ticket.charged = self._typical[adapter]
            self._served[adapter] += ticket.charged
            self._last = adapter
            self.waiting -= 1
            self.running += 1
            let_in.append(ticket)
        return let_in

    def leave(self, ticket: Ticket, tokens: int, now: float) -> list[Ticket]:
        """A request is over, in whatever state, and took so many tokens (0 = not known); returns those that are
        admitted in its place."""
        if ticket.refused:
            return []
        if ticket.waits:
            self._drop(ticket)
            return self.admit(now)
        if self._is_full():
            self._left.append(now)
        self.running -= 1
        self._release(ticket)
        if tokens:
            self._served[ticket.adapter] += tokens - ticket.charged
            self._typical[ticket.adapter] = tokens
        let_in = self.admit(now)
        if not self._is_full():
            self._known_pace = self._pace(now) or self._known_pace
            self._left.clear()
        return let_in

    def give_up(self, ticket: Ticket, now: float) -> list[Ticket]:
        """Refuse a request that has waited too long; returns those that are admitted in its place."""
        let_in = self.leave(ticket, 0, now)
        ticket.refused = ticket.refused or self.refusal(GONE, ticket, now)
        return let_in

    def may_wait_s(self, ticket: Ticket, now: float) -> float:
        """Seconds that it may still wait; inf without a limit."""
        if not self.limits.wait_ms:
            return math.inf
        return max(0.0, self.limits.wait_ms / 1e3 - (now - ticket.arrived))

    def predicted_wait_s(self, adapter: str, now: float) -> float:
        """Seconds that a request of this adapter would wait if it came now: the requests before it and its own turn, at
        the known rate, or at the engine's own pace if that is slower. 0 if neither is known."""
        if not self._is_full():
            return 0.0
        known, own = self.limits.rate, self._pace(now)
        pace = min(known, own) if known and own else known or own or self._known_pace
        return (self._ahead(adapter) + 1) / pace if pace else 0.0

    def refusal(self, reason: str, ticket: Ticket, now: float) -> Refused:
        """The message of a refusal, and the time of a retry."""
        predicted = self.predicted_wait_s(ticket.adapter, now)
        most = f"{self.limits.wait_ms:.0f} ms are allowed"
        said = {
            WAITING: f"{self.limits.waiting} requests wait already, as many as may",
            WAIT: f"it would wait {1e3 * predicted:.0f} ms, and {most}",
            GONE: f"it has waited {1e3 * (now - ticket.arrived):.0f} ms, and {most}",
        }
        source = f" (limit from {self.limits.source})" if self.limits.source else ""
        again_s = max(1.0, math.ceil(predicted))
        return Refused(WAIT if reason == GONE else reason, again_s, said[reason] + source)

    # ---- who may come in

    def _over_its_cap(self, ticket: Ticket) -> Refused | None:
        for kind, name, cap in (("adapter", ticket.adapter, self.per_adapter), ("key", ticket.key, self.per_key)):
            if cap and self._here[kind, name] >= cap:
                whose = f"the model {name!r}" if kind == "adapter" else "this API key"
                return Refused(kind, 1.0, f"{whose} has {cap} requests here, as many as it may")
        return None

    def _too_late(self, ticket: Ticket, now: float) -> Refused | None:
        if self.predicted_wait_s(ticket.adapter, now) > self.may_wait_s(ticket, now):
            return self.refusal(WAIT, ticket, now)
        return None

    def _is_full(self) -> bool:
        return bool(self.limits.running) and self.running >= self.limits.running

    def _longer_than(self, adapter: str) -> Ticket | None:
        """The last of the longest queue, where that is longer than this adapter's would be."""
        longest = max(self._queues.values(), key=len, default=deque())
        return longest[-1] if len(longest) > len(self._queues.get(adapter, ())) + 1 else None

    def _take_in(self, ticket: Ticket) -> None:
        self._served[ticket.adapter] = self._level(ticket.adapter)
        self._queues.setdefault(ticket.adapter, deque()).append(ticket)
        self.waiting += 1
        for cap in _caps(ticket):
            self._here[cap] += 1

    def _drop(self, ticket: Ticket) -> None:
        self._queues[ticket.adapter].remove(ticket)
        self.waiting -= 1
        self._release(ticket)

    def _release(self, ticket: Ticket) -> None:
        for cap in _caps(ticket):
            self._here[cap] -= 1

    # ---- whose turn it is, and how long that takes

    def _level(self, adapter: str) -> int:
        """An adapter's counter when a request of its comes. One that has not waited starts level with the least served
        of those that do, or where none does, with the one that has gone on last."""
        if self._queues.get(adapter):
            return self._served[adapter]
        waiting = [self._served[other] for other, queue in self._queues.items() if queue]
        level = min(waiting) if waiting else self._served[self._last]
        return max(self._served[adapter], level)

    def _ahead(self, adapter: str) -> int:
        """Requests that would go on before a new one of this adapter, if no more came: those of its own queue, and of
        each other queue those whose counter stands lower when their turn comes."""
        own = len(self._queues.get(adapter, ()))
        mine = self._level(adapter) + own * self._typical[adapter]
        return own + sum(
            min(len(queue), max(0, self._turns(other, mine, other < adapter)))
            for other, queue in self._queues.items()
            if other != adapter
        )

    def _turns(self, adapter: str, below: int, level_too: bool) -> int:
        """How often an adapter goes on until its counter stands at `below`, or above it where `level_too`."""
        gap, step = below - self._served[adapter], self._typical[adapter]
        return gap // step + 1 if level_too else -(-gap // step)

    def _pace(self, now: float) -> float:
        """Requests per second that leave the engine while it is full; 0 where that is not known yet. How fast requests
        leave an engine with room tells how fast they come."""
        gone = len(self._left) - 1
        if gone < RATE_FROM or now <= self._left[0]:
            return 0.0
        return gone / (now - self._left[0])


def _caps(ticket: Ticket) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("adapter", ticket.adapter), ("key", ticket.key)
