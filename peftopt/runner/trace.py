"""Record where a run's time goes: what each worker did when, and how busy the processors were.

    with trace.recording() as recorder:
        ...                                  # whatever asks workers
    recorder.write(folder / trace.FILE)

The file has Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftopt import store
from peftopt.records import Json

FILE = "trace.json"

SAMPLE_S = 0.5
"""Seconds between two samples of how busy the processors are; a sample takes about 0.1 ms."""

PARENT = "peftopt"
"""The lane of the parent's own steps."""

WORDS = {
    "prepare": "start and import",
    "open": "load models",
    "transform": "build",
    "alive": "check what was built",
    "quality": "answer",
    "task": "answer",
    "warm": "compile and warm up",
    "speed": "time requests",
    "layers": "forecast",
    "bandwidth": "measure the memory",
    "served": "time a load",
    "judge": "judge",
    "rest": "wait until a server rests",
}
"""The name of each job or step in the table; all others are "other"."""


@dataclass(frozen=True)
class Span:
    """`what` was done on a lane, a worker's or the parent's, from `start` to `end` in seconds of the recording."""

    lane: str
    what: str
    start: float
    end: float


@dataclass(frozen=True)
class Busy:
    """How many processors were busy, on average since the previous sample; `at` in seconds."""

    at: float
    cores: float


@dataclass(frozen=True)
class Spent:
    """A line of the table: seconds in which at least one worker did this, and the sum over all workers."""

    what: str
    wall_s: float
    total_s: float


@dataclass
class Recorder:
    """The recording so far. Any thread may add to it."""

    began: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list)
    busy: list[Busy] = field(default_factory=list)

    def now(self) -> float:
        """Seconds since the recording began."""
        return time.perf_counter() - self.began

    def write(self, path: Path) -> None:
        """Write the trace. Raises MissingEnvironment where it cannot be written."""
        store.write(path, json.dumps(events(self.spans, self.busy)))


_recorder: Recorder | None = None


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Record what happens inside, in all threads; one recording at a time."""
    global _recorder
    recorder = Recorder()
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(recorder, over), daemon=True)
    _recorder = recorder
    watcher.start()
    try:
        yield recorder
    finally:
        _recorder = None
        over.set()
        watcher.join()


@contextlib.contextmanager
def span(lane: str, what: str) -> Iterator[None]:
    """Record how long the block inside takes. Without a recording, this costs a microsecond."""
    recorder = _recorder
    if recorder is None:
        yield
        return
    start = recorder.now()
    try:
        yield
    finally:
        recorder.spans.append(Span(lane, what, start, recorder.now()))


def _watch(recorder: Recorder, over: threading.Event) -> None:
    import psutil

    psutil.cpu_percent()
    while not over.wait(SAMPLE_S):
        recorder.busy.append(Busy(recorder.now(), psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)))


# ---- pure ----------------------------------------------------------------------------------------


def events(spans: Sequence[Span], busy: Sequence[Busy]) -> dict[str, list[dict[str, Json]]]:
    """Chrome's trace events: a thread for each lane, in the order in which they began; times in microseconds."""
    lanes = list(dict.fromkeys(each.lane for each in sorted(spans, key=lambda each: each.start)))
    number = {lane: place for place, lane in enumerate(lanes, 1)}
    named: list[dict[str, Json]] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": lane}} for lane, tid in number.items()
    ]
    done: list[dict[str, Json]] = [
        {
            "ph": "X",
            "name": each.what,
            "cat": WORDS.get(each.what, "other"),
            "pid": 1,
            "tid": number[each.lane],
            "ts": round(each.start * 1e6),
            "dur": round((each.end - each.start) * 1e6),
        }
        for each in sorted(spans, key=lambda each: each.start)
    ]
    looks: list[dict[str, Json]] = [
        {"ph": "C", "name": "busy processors", "pid": 1, "ts": round(look.at * 1e6), "args": {"cores": look.cores}}
        for look in busy
    ]
    return {"traceEvents": [*named, *done, *looks]}


def spent(spans: Sequence[Span]) -> list[Spent]:
    """Where the time went, most wall-clock time first. Spans of one kind that overlap count once in its wall-clock
    time; spans of two kinds count in both lines. So the lines need not add up to the whole."""
    kinds = defaultdict(list)
    for each in spans:
        kinds[WORDS.get(each.what, "other")].append((each.start, each.end))
    lines = [Spent(what, _covered(times), sum(end - start for start, end in times)) for what, times in kinds.items()]
    return sorted(lines, key=lambda line: -line.wall_s)


def idle(busy: Sequence[Busy], cores: int) -> float:
    """The unused share of the processors' time, 0..1; 0 without samples."""
    if not busy:
        return 0.0
    return max(0.0, 1 - sum(look.cores for look in busy) / len(busy) / cores)


def _covered(times: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(times):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def words(recorder: Recorder, cores: int) -> list[str]:
    """The table as lines of text."""
    whole = recorder.now()
    lines = [f"where {whole:.0f} s went: wall-clock time, its share, and the sum over all workers"]
    lines += [
        f"  {line.what:26}{line.wall_s:7.0f} s{line.wall_s / max(whole, 1e-9):7.0%}{line.total_s:9.0f} s"
        for line in spent(recorder.spans)
        if line.wall_s >= 0.5
    ]
    return [*lines, f"  {'idle processors':26}{'':9}{idle(recorder.busy, cores):7.0%}"]
