"""Versions that do not answer: the reasons, and the times of the next attempts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

AGAIN_S, AGAIN_AT_MOST_S = 1.0, 600.0
"""A version is tried again after so long, each time after twice that."""


@dataclass(frozen=True)
class Failure:
    """`why` a version does not answer; the time of the next attempt, after a `pause`, in seconds."""

    why: str
    due: float
    pause: float


class Failures:
    """The versions that do not answer, by their served names."""

    def __init__(self) -> None:
        self._failures: dict[str, Failure] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._failures

    def why(self, name: str) -> str:
        """Why a version does not answer; "" for one that does."""
        return self._failures[name].why if name in self._failures else ""

    def all(self) -> Mapping[str, str]:
        """Why each of them does not answer."""
        return {name: failure.why for name, failure in self._failures.items()}

    def note(self, name: str, why: str, now: float) -> None:
        """A version does not answer, for the first time or again."""
        before = self._failures.get(name)
        pause = min(2 * before.pause, AGAIN_AT_MOST_S) if before else AGAIN_S
        self._failures[name] = Failure(why, now + pause, pause)

    def clear(self, name: str) -> None:
        """A version answers, or is not needed any more."""
        self._failures.pop(name, None)

    def due(self, now: float) -> list[str]:
        """The versions to try again now."""
        return [name for name, failure in self._failures.items() if failure.due <= now]
