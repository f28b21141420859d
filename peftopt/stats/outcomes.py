"""What blocks say of one limit. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from peftopt.records import Interval, Outcome


@dataclass(frozen=True)
class Race:
    """What the blocks say of one limit.

    `look` is the number of blocks it was judged at (0: none yet); `interval` is theirs, on the log scale, and holds
    whether blocks or launches vary more. `blocks_needed` is the planner's total for an inconclusive race (where
    launches may differ, that of as many launches as it takes), None when decided or without data. `test` is what
    judged: a planned "look", or the "bets". `launches` is how many launches the blocks come from, `launches_needed` the
    planner's total where blocks alone would have decided.
    """

    outcome: Outcome
    interval: Interval
    look: int
    blocks_needed: int | None
    test: str = "look"
    launches: int = 0
    launches_needed: int | None = None


def judge(interval: Interval, limit: float, resolution: float = 0.0) -> Outcome:
    """Accepted when the whole interval lies below the limit, by more than the clock's `resolution`; rejected when it
    lies above, inconclusive otherwise."""
    if interval.high < limit - resolution:
        return "accepted"
    return "rejected" if interval.low > limit + resolution else "inconclusive"
