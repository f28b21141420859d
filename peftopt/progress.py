"""How far long work has come: a plug-in says so here, its worker passes it on, the console shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from peftopt.records import Json

Hear = Callable[[dict[str, Json]], None]
"""Hears {"phase", "done", "total", "what"}: a phase is one bar, `done` of `total` steps of it are over."""

_hear: ContextVar[Hear] = ContextVar("hear", default=lambda _: None)


def report(phase: str, done: int, total: int, what: str = "") -> None:
    """Say how much of a phase is done. Costs next to nothing where nobody listens, so say it at every step."""
    _hear.get()({"phase": phase, "done": done, "total": total, "what": what})


@contextlib.contextmanager
def heard(hear: Hear) -> Iterator[None]:
    """Let `hear` have what is reported inside."""
    token = _hear.set(hear)
    try:
        yield
    finally:
        _hear.reset(token)
