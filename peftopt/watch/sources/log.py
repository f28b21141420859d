"""The log of `peftopt serve`, in windows: what users saw in each.

A request is in the window in which it ended. Windows follow each other as the lines do: the first line that ended
after a window completes it, and a line that comes late counts into the window that is open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from peftopt import measurements
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.loadtest.moments import utc
from peftopt.records import JsonValue
from peftopt.watch.promise import Promise
from peftopt.watch.sources.following import Files, Mark
from peftopt.watch.sources.sums import Alike, Loads, Window
from peftopt.watch.spans import Span

if TYPE_CHECKING:
    from peftopt.watch.sources.lines import Row

JUMP_MS = 3.6e6
"""A clock has jumped back, or nothing was written for long, where lines are so far apart."""

LATE_MS = 1e3
"""So long after its end a window is complete by the clock, without a line that says so."""

AT_ONCE = 4096
"""Lines that are taken together: few enough to stay small."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where to go on: at the first line of the window that is open, else after all that was read. `after_ms`: the end
    of the window before, in milliseconds since 1970."""

    mark: Mark
    after_ms: float | None = None
    switches: int | None = None
    loading_s: float | None = None


@dataclass
class LeftOut:
    """Lines that were left out, by reason, and where the first of each is. Those of the window that is open are
    counted with it, so that none is counted twice by who goes on later."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    open: Counter[str] = field(default_factory=Counter)


class Log:
    """Reads a log's spans, as often as one likes: each time those that are complete by now.

    `left_out` counts by reason the lines that could not be read, `first_left_out` says where the first of each is;
    `notices` are sentences of what is odd: a clock that jumped, a file that is gone; `lines` counts what was read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        promise: Promise,
        window_s: float = 60.0,
        position: Mapping[str, JsonValue] | None = None,
    ) -> None:
        """`paths`: the log, or several files that follow each other, the oldest first; files that were set aside of
        them are found. `position`: what another one left, to go on there. Raises BadInput for one that is none, and
        MissingEnvironment without msgspec."""
        try:
            from peftopt.watch.sources import lines
        except ImportError as error:
            raise MissingEnvironment("reading a log needs msgspec", "pip install 'peftopt[serve]'") from error
        self._lines = lines
        self._window_s, self._window_ms = window_s, 1e3 * window_s
        self._alike = Alike.of(promise)
        self._position = _position(position) if position else None
        at = self._position
        self._files = Files(paths, at.mark if at else None)
        self._after_ms = at.after_ms if at else None
        self._loads = Loads(at.switches, at.loading_s) if at else Loads()
        self._goes_on = at is not None
        self._left_out = LeftOut()
        self._window: Window | None = None
        self._began_ms = self._end_ms = 0.0
        self._low_ms = float("inf")
        self._rows: list[Row] = []
        self._taken = 0
        self.notices = self._files.notices

    # ---- what was read

    @property
    def lines(self) -> int:
        """Lines that were read, without those that were left out."""
        return self._taken + len(self._rows)

    @property
    def left_out(self) -> Counter[str]:
        """Lines that were left out, by reason, up to the window that is open."""
        return self._left_out.counts

    @property
    def first_left_out(self) -> Mapping[str, str]:
        """Where the first line is that was left out for each reason: "requests.jsonl:17"."""
        return self._left_out.first

    @property
    def position(self) -> dict[str, JsonValue]:
        """Where another one goes on, without losing or counting a line twice; {} before anything was read."""
        return cast(dict[str, JsonValue], measurements.as_json(self._position)) if self._position else {}

    # ---- reading

    def read(self, now: float | None = None) -> Iterator[Span]:
        """The windows that are complete by now: those that a later line ended, and by the clock, where `now` (seconds
        since 1970) is given, one that is over. Raises MissingEnvironment for a log that is not there, or whose lines
        are all others'."""
        yield from self._spans(over=False)
        if not (self.lines or self._goes_on) and self._left_out.first:
            reasons = "; ".join(f"{where}: {reason}" for reason, where in self._left_out.first.items())
            raise MissingEnvironment(f"nothing to read: {reasons}", "give the file that peftopt serve --log writes")
        if now is not None and self._window and 1e3 * now >= self._end_ms + LATE_MS:
            yield self._closed()
            self._move(self._files.end)

    def flush(self) -> list[Span]:
        """Of a log that is over: the last window, as far as it goes, and what was not read before."""
        spans = list(self._spans(over=True))
        if self._window:
            spans.append(self._closed())
            self._move(self._files.end)
        return spans

    def _spans(self, over: bool) -> Iterator[Span]:
        rows, decode, unreadable = self._rows, self._lines.decode, self._lines.UNREADABLE
        for line in self._files.lines(over):
            try:
                row = decode(line)
            except unreadable:
                self._leave_out(line)
                continue
            at_ms = row.timestamp + row.request_duration_ms
            span = None
            if not self._low_ms <= at_ms < self._end_ms:
                span = self._closed() if self._window else None
                self._open(at_ms)
            rows.append(row)
            if len(rows) == AT_ONCE:
                self._take()
            if span:
                yield span
        if not self._window:
            self._move(self._files.end)

    def _leave_out(self, line: bytes) -> None:
        if not line.strip():
            return
        reason = self._lines.why(line)
        self._left_out.open[reason] += 1
        self._left_out.first.setdefault(reason, self._files.where)

    def _take(self) -> None:
        assert self._window is not None
        self._window.add(self._rows)
        self._taken += len(self._rows)
        self._rows.clear()

    # ---- windows

    def _open(self, at_ms: float) -> None:
        """The window of a line that ended at this time. It is the first line of the window, so the position moves."""
        began_ms = at_ms // self._window_ms * self._window_ms
        after_ms = self._after_ms
        if after_ms is not None:
            if abs(at_ms - after_ms) > JUMP_MS:
                self.notices.append(_jumped(self._files.where, after_ms, at_ms))
            elif began_ms < after_ms:
                began_ms = after_ms
        self._window = Window(self._alike, self._loads)
        self._began_ms, self._end_ms = began_ms, began_ms + self._window_ms
        self._low_ms = began_ms - JUMP_MS
        self._move(self._files.start)

    def _closed(self) -> Span:
        """The window that is open, which then is no more."""
        assert self._window is not None
        if self._rows:
            self._take()
        window, self._window = self._window, None
        self._after_ms, self._low_ms = self._end_ms, float("inf")
        return Span(self._began_ms / 1e3, self._window_s, window.adapters(), window.engine())

    def _move(self, mark: Mark | None) -> None:
        """Go on from here later: everything before is in a window that was given."""
        self._left_out.counts += self._left_out.open
        self._left_out.open.clear()
        loads = self._loads
        if mark:
            self._position = Position(
                mark=mark, after_ms=self._after_ms, switches=loads.switches, loading_s=loads.loading_s
            )


def _jumped(where: str, before_ms: float, after_ms: float) -> str:
    hours = abs(after_ms - before_ms) / 3.6e6
    if after_ms < before_ms:
        return f"{where}: the clock jumped back by {hours:.1f} h, to {utc(after_ms / 1e3)}"
    return f"{where}: nothing ended for {hours:.1f} h until {utc(after_ms / 1e3)}, or the clock jumped"


def _position(values: Mapping[str, JsonValue]) -> Position:
    try:
        return measurements.structured(Position, values, "position")
    except BadInput as error:
        raise BadInput(f"the position in the log cannot be read: {error.message}", "remove the state file") from error
