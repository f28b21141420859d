"""The measurements of a run, by probe, variant and workload: what was measured, what failed, what is left out. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from peftopt.measurements import (
    SERVED,
    SKIPPED,
    Account,
    Answer,
    Built,
    Disturbance,
    EngineFacts,
    Failure,
    Forecast,
    Launch,
    Load,
    Measured,
    Memory,
    More,
    Request,
    Retry,
    Sent,
    Survey,
    Task,
    Turn,
)
from peftopt.metrics import TASK
from peftopt.records import Interval, Plan

Field = Literal["request_duration_ms", "ttft_ms", "tpot_ms", "cpu_ms", "turn_ms", "new_tokens"]
"""What may be compared of two requests."""

VALUE: Mapping[Field, Callable[[Request], float | None]] = {
    "request_duration_ms": lambda request: request.request_duration_ms,
    "ttft_ms": lambda request: request.ttft_ms,
    "tpot_ms": lambda request: request.tpot_ms,
    "cpu_ms": lambda request: request.cpu_ms,
    "turn_ms": lambda request: request.turn_ms,
    "new_tokens": lambda request: request.new_tokens,
}

INTERRUPTED = "interrupted"
"""Why a load stopped that its user ended: it says nothing of the variant."""


class Index:
    """The measurements where each is found; nothing is computed of them, nothing is kept that was not measured."""

    def __init__(self, plan: Plan, measurements: Iterable[Measured]) -> None:
        self.plan = plan
        self.lines: Sequence[Measured] = tuple(measurements)
        """All measurements, in the order of time."""
        self.baseline = plan.recipe.baseline
        self.turns: dict[tuple[str, str], dict[int, Sequence[Request]]] = defaultdict(dict)
        self.answers: dict[tuple[str, int], dict[str, Answer]] = defaultdict(dict)
        self.builds: dict[str, Built] = {}
        self.failures: dict[str, Failure] = {}
        self.launches: dict[str, list[Launch]] = defaultdict(list)
        self.memory: dict[str, list[Memory]] = defaultdict(list)
        self.engines: dict[str, list[EngineFacts]] = defaultdict(list)
        self.tasks: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        """Variant -> metric ("task.NAME") -> row -> score."""
        self.surveyed: Survey | None = None
        """How fast the machine reads memory; None where it was not asked."""
        self.accounts: dict[tuple[str, str], list[Account]] = defaultdict(list)
        """(variant, workload) -> what the server said of each load on it."""
        self.machine: dict[tuple[str, int], list[Disturbance]] = defaultdict(list)
        self.budget = plan.recipe.measure.max_blocks
        """Blocks that a race may have: the recipe's, or what was granted since."""
        self.race = plan.recipe.measure.race
        """What is raced, "all" or the "winner": the recipe's, or "all" once blocks were granted for that."""
        self.left_out: dict[str, str] = {}
        """Variant@workload -> why a turn of it is as good as not measured."""
        self.failed: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
        """(variant, workload) -> block -> what failed in its turn; a result against the variant."""
        self.apart: dict[str, tuple[str, ...]] = {}
        """Variant@workload -> what its loads lack, where they were run apart from the race."""
        self.production: dict[str, list[Load]] = defaultdict(list)
        """Variant -> what users were answered by it, of no workload: no rule reads it."""
        self.loads_apart: dict[str, list[Load]] = defaultdict(list)
        """Variant -> loads of other rates than a workload's, as `peftopt load --rate` sends them: no rule reads it."""
        self.forecasts: list[tuple[str, str, Forecast]] = []
        """What was expected before the run: variant, workload, and what of it."""
        self.figures: dict[tuple[str, float], Mapping[str, Interval]] = {}
        """(variant, level) -> the values of all its metrics, kept by figures.figures."""
        self._launch_of: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
        self._partial: dict[tuple[str, str], dict[int, Sequence[Request]]] = defaultdict(dict)
        self._orders: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
        self._launched: dict[tuple[str, str], list[list[Request]]] = defaultdict(list)
        loads: dict[str, list[tuple[str, Load]]] = defaultdict(list)
        for m in self.lines:
            match m.values:
                case Turn() as turn:
                    self._add_turn(m.variant, m.workload, turn)
                case Load() as load if m.workload in plan.recipe.workloads:
                    loads[m.workload].append((m.variant, load))
                case Load(source=source) as load if source == SERVED and not m.workload:
                    self.production[m.variant].append(load)
                case Load() as load if not m.workload:
                    self.loads_apart[m.variant].append(load)
                case Answer() as answer:
                    self.answers[m.variant, m.launch][answer.row] = answer
                case Task(task=name, samples=samples) if name and samples is not None:  # imported ones may lack them
                    scores = self.tasks[m.variant].setdefault(TASK + name, {})
                    scores |= {row.id: row.value for row in samples}  # a group's come file by file
                case Survey() as survey:
                    self.surveyed = survey
                case Built() as built:
                    self.builds[built.id] = built
                case Failure() as failure:
                    self.failures[m.variant] = failure
                case Retry():
                    self.failures.pop(m.variant, None)
                case Launch() as launch:
                    self.launches[m.variant].append(launch)
                    self._launched[m.variant, m.workload].append([])
                case More(max_blocks=granted, race="all"):
                    self.budget = granted
                    self.race = "all"
                case More(max_blocks=granted):
                    self.budget = max(self.budget, granted)
                case Forecast() as forecast:
                    self.forecasts.append((m.variant, m.workload, forecast))
                case Memory() as memory:
                    self.memory[m.variant].append(memory)
                case EngineFacts() as facts:
                    self.engines[m.variant].append(facts)

        for workload, sent in loads.items():
            self._take_loads(workload, sent)

    @property
    def skipped(self) -> frozenset[str]:
        """The variants that were not tried: the machine lacked what they need."""
        return frozenset(name for name, failure in self.failures.items() if failure.reason == SKIPPED)

    def _add_turn(self, variant: str, workload: str, turn: Turn) -> None:
        launches = self._launched[variant, workload]
        if launches:
            self._launch_of[variant, workload][turn.block] = len(launches)
        timed = [request for request in turn.requests if not request.warmup]
        if not self._take_turn(variant, workload, turn.block, timed):
            return
        self.machine[workload, turn.block].append(turn.machine)
        self.accounts[variant, workload].append(turn.engine)
        if turn.order is not None:
            self._orders[workload, turn.block][variant] = turn.order
        if launches:
            launches[-1] += turn.requests

    def _take_turn(
        self, variant: str, workload: str, block: int, timed: Sequence[Request], new_tokens: int = 0
    ) -> bool:
        """Whether the turn was measured. One in which requests failed is kept as a failure, any other is left out."""
        failed = [request for request in timed if request.error]
        if failed:
            reason = f"{len(failed)} of {len(timed)} requests failed: {failed[0].error}"
            self.failed[variant, workload][block] = reason
            self._partial[variant, workload][block] = timed
            return False
        useless = _useless(timed, new_tokens)
        if useless:
            self.left_out[f"{variant}@{workload}"] = useless
            return False
        self.turns[variant, workload][block] = timed
        return True

    def _take_loads(self, name: str, loads: Sequence[tuple[str, Load]]) -> None:
        """Loads that were run apart, by `peftopt load` or another tool. In the order of time, every variant's first
        load since its last one opens a new block: so loads are pairs where they alternate, and only there. One that
        is left out has its place too, or later ones would be compared with others than they ran beside."""
        if all(load.started for _, load in loads):
            loads = sorted(loads, key=lambda each: each[1].started)
        raced = {*self._blocks(self.turns, name), *self._blocks(self.failed, name)}
        block = max(raced, default=-1)
        in_block: set[str] | None = None
        workload = self.plan.recipe.workloads[name]
        fixed = workload.new_tokens if workload.lengths == "fixed" else 0
        for variant, load in loads:
            if in_block is None or variant in in_block:
                block += 1
                in_block = set()
            in_block.add(variant)
            self.apart[f"{variant}@{name}"] = load.lacks
            timed = [request for request in load.requests if not request.warmup]
            if load.stopped == INTERRUPTED:
                self.left_out[f"{variant}@{name}"] = load.stopped
            elif load.stopped:
                self.failed[variant, name][block] = load.stopped
            elif self._take_turn(variant, name, block, timed, fixed):
                turn_ms = _span_ms(timed)
                self.turns[variant, name][block] = [replace(request, turn_ms=turn_ms) for request in timed]
                self.accounts[variant, name].append(load.engine)

    @staticmethod
    def _blocks(turns: Mapping[tuple[str, str], Mapping[int, object]], workload: str) -> set[int]:
        """The blocks of a workload in which any variant has a turn."""
        return {block for (_, on), by_block in turns.items() if on == workload for block in by_block}


def is_time(value: float) -> bool:
    """Whether a number can be the time of something: finite, and more than 0."""
    return math.isfinite(value) and value > 0


def times(requests: Iterable[Request], field: Field) -> list[float]:
    """A field of all requests in which it is a time."""
    values = map(VALUE[field], requests)
    return [value for value in values if value is not None and is_time(value)]


def _span_ms(requests: Sequence[Sent]) -> float:
    """From when the first request was due to when the last was done."""
    return 1e3 * float(max(r.done for r in requests) - min(r.scheduled for r in requests))


def _useless(timed: Sequence[Request], new_tokens: int = 0) -> str:
    """Why these requests say nothing of a variant's speed, "" where they do; of a load that ran apart they must have
    `new_tokens` each where that is fixed."""
    if not timed:
        return "no raw requests, and figures without them have no intervals"
    if len(times(timed, "request_duration_ms")) < len(timed):
        return "a time that is none"
    others = [request.new_tokens for request in timed if request.new_tokens != new_tokens]
    if new_tokens and others:
        return f"answers of {others[0]} tokens, where the workload has {new_tokens}"
    return ""
