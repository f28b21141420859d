"""When something was, as ISO 8601 in UTC to the millisecond: one form, so that texts are in the order of time."""

from __future__ import annotations

from datetime import UTC, datetime


def utc(seconds: float) -> str:
    """A moment in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def since_1970(text: str) -> float:
    """A moment as `utc` writes it, in seconds since 1970. Raises ValueError for what is not one."""
    return datetime.fromisoformat(text).timestamp()


def local(moment: datetime) -> str:
    """A moment by a clock on some wall whose zone nobody tells: taken to be this machine's."""
    return utc(moment.timestamp())
