"""Load, use and unload adapters on a running server, over and over, and read its memory at rest after each cycle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from peftopt.diagnose.records import Row
from peftopt.loadtest.protocols import Prompt, Target


class Server(Protocol):
    """A running server: how it is asked, and which processes of this machine it is ((): not known)."""

    @property
    def target(self) -> Target:
        """Where it is asked."""

    def processes(self) -> Sequence[int]:
        """Their ids."""


def measure(
    server: Server,
    adapters: Sequence[Path],
    prompts: Sequence[Prompt],
    budget_s: float,
    show: Callable[[int, str], None],
) -> tuple[Row, ...]:
    """The rows of the bottleneck "unloading", within about `budget_s` seconds. `show` hears how many cycles are done,
    and how they go. Raises MissingEnvironment where no server answers."""
    raise NotImplementedError
