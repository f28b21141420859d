"""Progress of long work: a plug-in reports it here, its worker passes it on, the console shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Reached:
    """`done` of `total` steps of a phase are over. Each phase is one bar. `what`: the current work in a few words."""

    phase: str
    done: int
    total: int
    what: str = ""

    @property
    def share(self) -> float:
        """The share of the phase that is over, 0..1."""
        return self.done / max(1, self.total)


Hear = Callable[[Reached], None]

_hear: ContextVar[Hear] = ContextVar("hear", default=lambda _: None)


def report(phase: str, done: int, total: int, what: str = "") -> None:
    """Report how much of a phase is done. Call it at every step: without a listener it costs almost nothing."""
    _hear.get()(Reached(phase, done, total, what))


@contextlib.contextmanager
def heard(hear: Hear) -> Iterator[None]:
    """Pass everything that is reported inside to `hear`."""
    token = _hear.set(hear)
    try:
        yield
    finally:
        _hear.reset(token)
