"""How long further blocks take, from the wall clock of the lines that the blocks so far left."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt import store
from peftopt.decision.pace import Pace, pace
from peftopt.measurements import (
    UNDISTURBED,
    Answer,
    Built,
    EngineFacts,
    Launch,
    Measured,
    Memory,
    More,
    Turn,
    Values,
    measured,
)
from peftopt.records import Measurement

QUICK = Path(__file__).parents[1] / "results" / "example" / "quick"
LONGEST = 1800.0

seconds = st.floats(0.01, 120)


@dataclass(frozen=True)
class Arm:
    """What a variant takes, in seconds: its model's loading, compilation, a turn, and the rest after a turn."""

    load: float
    warm: float
    turn: float
    rest: float = 0.07


ARMS = {"adapter": Arm(1.2, 0.0, 3.5), "compiled": Arm(3.1, 3.3, 1.1)}


@dataclass
class Machine:
    """Runs blocks at constant cost, and leaves lines as a run does. `start`: seconds in which all processes of a block
    end and start."""

    arms: dict[str, Arm] = field(default_factory=lambda: dict(ARMS))
    start: float = 14.0
    relaunch: int = 3
    now: float = 1e9
    lines: list[Measured] = field(default_factory=list)
    blocks: int = 0

    def log(self, values: Values, arm: str = "", workload: str = "chat") -> None:
        self.lines.append(Measured(values, arm, workload, 0, self.now))

    def race(self, blocks: int, ahead: float = 0.0) -> float:
        """So many blocks in fresh processes, `ahead` seconds of whose first start were over before. Returns the
        minutes."""
        began, told = self.now, Launch(model_loading_time=0.0)
        for n in range(blocks):
            launches = n % self.relaunch == 0
            self.now += self.start - (0 if n else ahead) if launches else 0
            for name, arm in self.arms.items():
                if launches:
                    self.now += arm.load
                    self.log(replace(told, model_loading_time=arm.load), name)
                    self.now += arm.warm
                self.now += arm.turn + arm.rest
                machine = replace(UNDISTURBED, seconds=arm.turn + arm.rest)
                self.log(Turn(block=self.blocks, requests=(), machine=machine), name)
            self.blocks += 1
            if (n + 1) % self.relaunch == 0 or n + 1 == blocks:
                for name in self.arms:
                    self.log(Memory(), name)
                self.log(EngineFacts(), "compiled", "")
        return (self.now - began) / 60

    @property
    def pace(self) -> Pace:
        known = pace(self.lines, "chat", self.relaunch, LONGEST)
        assert known
        return known


arms = st.dictionaries(st.sampled_from("abcde"), st.builds(Arm, seconds, seconds, seconds), min_size=1)
machines = st.builds(Machine, arms, seconds, st.integers(2, 4))


@given(machines, st.integers(1, 3), st.integers(1, 9))
def test_what_blocks_took_is_what_as_many_more_take(machine: Machine, launches: int, more: int) -> None:
    machine.log(Built(id="", size_bytes=1, tier0=()))
    machine.race(launches * machine.relaunch)
    said = machine.pace.minutes(more)
    assert said == pytest.approx(machine.race(more)), "the start of processes and compilation among them"


def test_one_block_is_enough() -> None:
    machine = Machine()
    machine.log(More(max_blocks=1))
    machine.race(1)
    said = [machine.pace.minutes(n) for n in (1, 2, 3, 4)]
    assert said == pytest.approx([Machine().race(n) for n in (1, 2, 3, 4)])


def test_every_block_may_be_of_new_processes() -> None:
    machine = Machine(relaunch=1)
    machine.log(More(max_blocks=5))
    machine.race(5)
    assert machine.pace.minutes(7) == pytest.approx(machine.race(7))


@given(machines, st.floats(100, 1e6))
def test_a_pause_before_a_run_goes_on_is_no_part_of_a_block(machine: Machine, pause: float) -> None:
    machine.log(Built(id="", size_bytes=1, tier0=()))
    machine.race(machine.relaunch)
    machine.now += pause
    machine.log(More(max_blocks=99))  # the first line of what goes on
    machine.race(machine.relaunch)
    assert machine.pace.minutes(5) == pytest.approx(machine.race(5))


def test_processes_that_were_started_ahead_do_not_make_later_starts_short() -> None:
    machine = Machine()
    machine.log(Built(id="", size_bytes=1, tier0=()))
    machine.race(3, ahead=13.0)
    machine.race(3)
    assert machine.pace.minutes(3) == pytest.approx(machine.race(3))


@given(st.integers(1, 60), st.floats(-1e7, 1e7))
def test_a_clock_that_jumps_once_changes_nothing(at: int, jump: float) -> None:
    """Whichever line it jumps before: a gap of minutes or days, or one back in time."""
    machine = Machine()
    machine.log(More(max_blocks=12))
    machine.race(12)
    right = machine.pace.minutes(5)
    moved = [replace(line, at=(line.at or 0) + jump * (n >= at)) for n, line in enumerate(machine.lines)]
    found = pace(moved, "chat", machine.relaunch, LONGEST)
    assert found and found.minutes(5) == pytest.approx(right)


def test_without_a_clock_the_workers_own_times_are_taken() -> None:
    """They know of no start and of no compilation, so less is said than it takes, and not nothing."""
    machine = Machine()
    machine.race(6)
    silent = [replace(line, at=None) for line in machine.lines]
    found = pace(silent, "chat", 3, LONGEST)
    arms = ARMS.values()
    assert found and found.block == pytest.approx(sum(arm.turn + arm.rest for arm in arms))
    assert found.launches == pytest.approx(sum(arm.load for arm in arms))


def test_only_the_variants_of_the_last_block_go_on() -> None:
    machine = Machine()
    machine.log(More(max_blocks=9))
    machine.race(3)
    del machine.arms["compiled"]
    machine.race(3)
    machine.race(3)
    assert machine.pace.minutes(6) == pytest.approx(machine.race(6))


def test_other_workloads_and_answers_are_not_the_race() -> None:
    machine = Machine()
    machine.log(More(max_blocks=9))
    machine.race(3)
    machine.now += 500
    machine.log(Answer.__new__(Answer), "adapter", "")
    machine.log(Turn(block=70, requests=(), machine=replace(UNDISTURBED, seconds=99.0)), "adapter", "bulk")
    assert machine.pace.minutes(6) == pytest.approx(Machine().race(6))
    assert pace(machine.lines, "no such", 3, LONGEST) is None


def test_what_no_line_tells_is_not_known() -> None:
    assert pace([], "chat", 3, LONGEST) is None
    turns = [Measured(Turn(block=0, requests=()), "adapter", "chat", 0, at) for at in (None, None)]
    assert pace(turns, "chat", 3, LONGEST) is None


numbers = st.one_of(st.none(), st.floats(), st.sampled_from([math.nan, math.inf, -1.0, 0.0]))


@st.composite
def logs(draw: st.DrawFn) -> Sequence[Measured]:
    """Lines of any times, in any order."""

    def line(at: float | None) -> Measured:
        told = draw(numbers)
        turn = Turn(block=draw(st.integers(0, 3)), requests=(), machine=replace(UNDISTURBED, seconds=told))
        choices: list[Values] = [turn, Launch(model_loading_time=told or 0.0), Memory(), More(max_blocks=1)]
        values = draw(st.sampled_from(choices))
        return Measured(values, draw(st.sampled_from("ab")), "chat", 0, at)

    return [line(at) for at in draw(st.lists(st.one_of(st.none(), st.floats(0, 1e10)), max_size=12))]


@given(logs(), st.integers(1, 50))
def test_whatever_lines_tell_more_blocks_take_more_time(lines: Sequence[Measured], blocks: int) -> None:
    found = pace(lines, "chat", 2, LONGEST)
    if found:
        assert 0 <= found.minutes(blocks) <= found.minutes(blocks + 1) < math.inf


def test_a_line_tells_when_it_was_written() -> None:
    def at(text: object) -> float | None:
        return measured(Measurement("retry", "merged", at=text)).at  # type: ignore[arg-type]

    assert at("2026-11-28T10:25:16.750+00:00") == at("2026-11-28T11:25:16.750+01:00") == at("2026-11-28T10:25:16.750")
    assert [at(text) for text in ("", "yesterday", 5, None)] == [None] * 4


def _cuts(lines: Sequence[Measured], every: int) -> Iterator[tuple[int, Measured]]:
    """The last line of each block that is followed by new processes."""
    turns = [(n, line) for n, line in enumerate(lines) if isinstance(line.values, Turn)]
    ends = {line.values.block: (n, line) for n, line in turns if isinstance(line.values, Turn)}
    return iter([ends[block] for block in sorted(ends)[every - 1 :: every]])


def test_a_real_run_took_what_its_first_blocks_said() -> None:
    """The stored example, whose processes take longer to start than its blocks take."""
    lines = store.read(QUICK / "measurements.jsonl")
    every = json.loads((QUICK / "plan.json").read_text())["recipe"]["measure"]["relaunch"]
    first, *later = _cuts(lines, every)
    for ends, cut in [first, *later[:-1]]:
        found = pace(lines[: ends + 1], "chat", every, LONGEST)
        after = next(line for n, line in later if n > ends)
        assert found and found.minutes(every) == pytest.approx(((after.at or 0) - (cut.at or 0)) / 60, rel=0.25)
