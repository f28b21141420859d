"""When something was, as ISO 8601 to the millisecond: one form, so that the order of the texts is that in time."""

from __future__ import annotations

from datetime import UTC, datetime


def utc(seconds: float) -> str:
    """A moment in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def local(moment: datetime) -> str:
    """A moment by a clock on some wall, whose zone nobody tells: so without one."""
    return moment.replace(tzinfo=None).isoformat(timespec="milliseconds")
