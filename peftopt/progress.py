"""How far long work has come: a plug-in says so here, its worker passes it on, the console shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Reached:
    """`done` of `total` steps of a phase are over; each phase is one bar. `what` is going on, in a few words."""

    phase: str
    done: int
    total: int
    what: str = ""

    @property
    def share(self) -> float:
        """How much of the phase is over, 0..1."""
        return self.done / max(1, self.total)


Hear = Callable[[Reached], None]

_hear: ContextVar[Hear] = ContextVar("hear", default=lambda _: None)


def report(phase: str, done: int, total: int, what: str = "") -> None:
    """Say how much of a phase is done. Costs next to nothing where nobody listens, so say it at every step."""
    _hear.get()(Reached(phase, done, total, what))


@contextlib.contextmanager
def heard(hear: Hear) -> Iterator[None]:
    """Let `hear` have what is reported inside."""
    token = _hear.set(hear)
    try:
        yield
    finally:
        _hear.reset(token)
