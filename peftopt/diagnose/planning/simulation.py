"""Engines on one device, request by request: a discrete-event simulation of continuous batching. Pure.

Its assumptions, which docs/planning.md lists for users:

- An engine admits requests in the order in which they come, as long as it has a free row. It computes the prompts that
  it admits, then decode steps of all rows; a row joins or leaves between two steps.
- A step's time depends on how many rows and how many adapters are in it (see speeds.Costs), a prefill's on its tokens.
- Engines that compute at once slow each other alike: with k of them, each by 1 + (k - 1)(s - 1), where s is measured
  with two.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftopt.diagnose.planning.speeds import Costs
from peftopt.loadtest.summary import Request


@dataclass(frozen=True)
class Due:
    """A request: its time in seconds, its adapter (0 = the most popular), and its lengths."""

    at: float
    adapter: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Engine:
    """An engine's costs, and the number of requests that it runs at once."""

    costs: Costs
    rows: int


@dataclass(slots=True)
class _Row:
    number: int
    adapter: int
    left: int
    """Tokens that are still to come."""
    first: float = 0.0
    longest_s: float = 0.0
    last: float = 0.0


@dataclass(slots=True)
class _State:
    """An engine under way: it computes the prompts of `joining`, or `steps` of `step_s` each, or nothing."""

    engine: Engine
    queue: deque[int] = field(default_factory=deque)
    rows: list[_Row] = field(default_factory=list)
    joining: list[_Row] = field(default_factory=list)
    steps: int = 0
    step_s: float = 0.0


IDLE = math.inf


def simulate(
    due: Sequence[Due], routes: Sequence[int], engines: Sequence[Engine], sharing: float, others: int = 0
) -> list[Request]:
    """The simulated requests, in the order of `due`, which is by time; `routes[i]` is the engine of request i.

    `sharing` is the slowdown of an engine beside another one, `others` the number of processes that compute all the
    time besides. A simulated request is a loadtest.summary.Request, so that service levels judge both alike.
    """
    states = [_State(engine) for engine in engines]
    ends = [IDLE] * len(engines)
    """When each engine is done with what it does, on a clock that runs as fast as the engines compute."""
    finished: dict[int, Request] = {}
    now, clock, coming = 0.0, 0.0, 0
    while len(finished) < len(due):
        busy = len(ends) - ends.count(IDLE)
        slow = 1 + (max(busy, 1) + others - 1) * (sharing - 1)
        first_end = min(ends)
        done_at = now + (first_end - clock) * slow
        arrives = due[coming].at if coming < len(due) else math.inf
        if arrives <= done_at:
            clock += (arrives - now) / slow if busy else 0.0
            now = arrives
            place = routes[coming]
            states[place].queue.append(coming)
            coming += 1
            if ends[place] == IDLE:
                ends[place] = clock + _begin(states[place], due)
            else:
                ends[place] -= _stop_early(states[place], ends[place] - clock)
        else:
            now, clock = done_at, first_end
            place = ends.index(first_end)
            _complete(states[place], due, finished, now, slow)
            ends[place] = clock + _begin(states[place], due)
    return [finished[number] for number in range(len(due))]


def _stop_early(state: _State, left_s: float) -> float:
    """Let the steps under way end with the one that is being computed, where the new request finds a free row. Returns
    how many seconds less they take."""
    if state.steps <= 1 or len(state.rows) >= state.engine.rows:
        return 0.0
    not_begun = math.floor(left_s / state.step_s + 1e-9)
    dropped = min(not_begun, state.steps - 1)
    state.steps -= dropped
    return dropped * state.step_s


def _begin(state: _State, due: Sequence[Due]) -> float:
    """Begin what an engine does next: the prompts that it has room for, else as many steps as nobody leaves in. Returns
    how many seconds that takes an engine alone; IDLE where there is nothing to do."""
    costs = state.engine.costs
    admitted = min(len(state.queue), state.engine.rows - len(state.rows))
    state.steps = 0
    if admitted:
        numbers = [state.queue.popleft() for _ in range(admitted)]
        state.joining = [_Row(number, due[number].adapter, due[number].new_tokens) for number in numbers]
        tokens = sum(due[number].prompt_tokens for number in numbers)
        return costs.prefill(len({row.adapter for row in state.joining}), tokens)
    if not state.rows:
        return IDLE
    state.steps = min(row.left for row in state.rows)
    state.step_s = costs.step(len(state.rows), len({row.adapter for row in state.rows}))
    return state.steps * state.step_s


def _complete(state: _State, due: Sequence[Due], finished: dict[int, Request], now: float, slow: float) -> None:
    """Hand out the tokens of what is done at `now`, and let rows leave."""
    if state.joining:
        for row in state.joining:
            row.first = row.last = now
            row.left -= 1
        state.rows += state.joining
        state.joining = []
    else:
        for row in state.rows:
            # the first of the steps ends a gap in which others' prompts may have been computed
            gap = now - row.last - (state.steps - 1) * state.step_s * slow
            row.longest_s = max(row.longest_s, gap, state.step_s * slow)
            row.last = now
            row.left -= state.steps
    for row in state.rows:
        if not row.left:
            finished[row.number] = _request(row, due[row.number])
    state.rows = [row for row in state.rows if row.left]


def _request(row: _Row, due: Due) -> Request:
    return Request(
        id=str(row.number),
        model=str(due.adapter),
        scheduled=due.at,
        sent=due.at,
        done=row.last,
        first=row.first,
        last=row.last,
        gaps_ms=(row.longest_s * 1e3,) if due.new_tokens > 1 else (),
        prompt_tokens=due.prompt_tokens,
        new_tokens=due.new_tokens,
    )
