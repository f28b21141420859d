"""How long further blocks of a race take, by the wall clock between the lines that its blocks left. Pure.

A line is written when its work is over, so the time since the line before it is what the work took. That counts what
no worker can time itself: the start of processes, their imports, compilation before the first request, and their end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

from peftopt.measurements import EngineFacts, Launch, Measured, Memory, Turn

LATEST = 6
"""Turns and launches of a variant that count: the machine may have been busier before."""

STARTS = 3
"""Latest starts that count: later blocks start fewer processes, since fewer variants race."""


@dataclass(frozen=True)
class Pace:
    """Seconds of a block of the variants that raced last (`block`), and of their launches (`launches`), which come
    before the first block and then every `relaunch` blocks."""

    block: float
    launches: float
    relaunch: int

    def minutes(self, blocks: int) -> float:
        """Minutes that so many further blocks take, in processes that are started for them."""
        return (blocks * self.block + -(-blocks // self.relaunch) * self.launches) / 60


def pace(lines: Iterable[Measured], workload: str, relaunch: int, longest: float) -> Pace | None:
    """The pace of a workload's race; None where it is not known how long a turn takes.

    `lines` are all measurements of the run, in order. Where a line does not tell when it was written, where a clock
    was set back, and where more than `longest` seconds lie between two lines, so that no work can have been all there
    was, the durations that the workers tell are taken instead. A pause before a run is continued counts as nothing,
    since the first line after it begins anew.
    """
    log = _log(lines, workload, longest)
    turns = {arm: _turn(log.of[arm]) for arm in log.racing}
    block = _sum(list(turns.values())) if turns else None
    return None if block is None else Pace(block, _launches(log, turns), relaunch)


@dataclass
class _Arm:
    """What one variant's lines tell, in seconds."""

    turns: list[float] = field(default_factory=list)
    """Turns of a worker that had answered before."""
    first: list[float] = field(default_factory=list)
    """Turns that came first, with what was compiled before them."""
    told: list[float] = field(default_factory=list)
    """Turns, as the parent timed them: without what was compiled before."""
    loads: list[float] = field(default_factory=list)
    """Loading the model."""


@dataclass
class _Log:
    of: Mapping[str, _Arm]
    starts: Sequence[float]
    """For each block with launches, what it took to end old processes and to start new ones."""
    racing: frozenset[str]
    """The arms of the last block."""


def _log(lines: Iterable[Measured], workload: str, longest: float) -> _Log:
    of: dict[str, _Arm] = defaultdict(_Arm)
    starts: dict[int, list[float | None]] = defaultdict(list)
    arms: dict[int, set[str]] = defaultdict(set)
    launched: set[str] = set()
    waited: list[float | None] = []
    block = -1
    for line, gap in _gaps(lines, longest):
        if line.workload != workload:
            continue
        arm = of[line.variant]
        if isinstance(line.values, Launch):
            load = _seconds(line.values.model_loading_time, longest) or 0.0
            arm.loads.append(load if gap is None else min(gap, load))  # servers may load side by side
            waited.append(None if gap is None else max(gap - load, 0.0))
            launched.add(line.variant)
        elif isinstance(line.values, Turn):
            block = line.values.block
            arms[block].add(line.variant)
            starts[block] += waited
            waited = []
            told = _seconds(line.values.machine.seconds, longest)
            between = arm.first if line.variant in launched else arm.turns
            between += [gap] if gap is not None else []
            arm.told += [told] if told is not None else []
            launched.discard(line.variant)
    sums = (_sum(each) for each in starts.values() if each)
    return _Log(of, [each for each in sums if each is not None], frozenset(arms[block]))


def _sum(seconds: Sequence[float | None]) -> float | None:
    """Their sum, None where one is not known."""
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None


def _gaps(lines: Iterable[Measured], longest: float) -> Iterator[tuple[Measured, float | None]]:
    """Each line with the seconds since the one before it, None where they are not known. Lines that a worker leaves at
    its end are passed over, so that its end counts with the start of the next."""
    before: float | None = None
    for line in lines:
        if isinstance(line.values, Memory | EngineFacts):
            continue
        yield line, _seconds(None if line.at is None or before is None else line.at - before, longest)
        before = line.at


def _seconds(told: float | None, longest: float) -> float | None:
    """The same seconds, None for what no work can have taken."""
    return told if told is not None and 0 <= told <= longest else None


def _turn(arm: _Arm) -> float | None:
    """Seconds of a further turn."""
    seconds = arm.turns or arm.told or arm.first
    return median(seconds[-LATEST:]) if seconds else None


def _launches(log: _Log, turns: Mapping[str, float | None]) -> float:
    """Seconds of launching all that raced last."""
    every = [load for arm in log.of.values() for load in arm.loads]
    if not every:
        return 0.0
    seconds = 0.0
    for name, turn in turns.items():
        arm = log.of[name]
        seconds += median((arm.loads or every)[-LATEST:])
        seconds += max(median(arm.first[-LATEST:]) - (turn or 0.0), 0.0) if arm.first else 0.0
    # the first processes may have been started while others answered; a pause that no line tells must not count
    starts = log.starts[1:] or log.starts
    return seconds + (median_low(starts[-STARTS:]) if starts else 0.0)
