"""An interval against its limit, and what is said to be missing: as much as is named, and no less, decides."""

from __future__ import annotations

import itertools
import math

import pytest
from helpers.ruled import NEVER

from peftopt import stats
from peftopt.decision.evidence import Disagreement
from peftopt.decision.rules import limits, parity
from peftopt.records import Interval, Verdict


@pytest.mark.parametrize(
    ("op", "outcomes"),
    [
        ("<=", ["accepted", "accepted", "inconclusive", "inconclusive", "rejected"]),
        ("<", ["accepted", "inconclusive", "inconclusive", "rejected", "rejected"]),
        (">=", ["rejected", "inconclusive", "inconclusive", "accepted", "accepted"]),
        (">", ["rejected", "rejected", "inconclusive", "inconclusive", "accepted"]),
    ],
)
def test_a_requirement_asks_the_whole_interval(op: str, outcomes: list[str]) -> None:
    """Intervals of width 2 that end at 4, at the limit of 5, hold it, begin at it and begin at 6."""
    found = [limits.against_limit(Interval(x, x - 1, x + 1, 9), op, 5) for x in (3, 4, 5, 6, 7)]
    assert found == outcomes


@pytest.mark.parametrize(
    ("value", "limit", "blocks"),
    [
        (Interval(10, 8, 12, 9), 11, 40),
        (Interval(10, 9.5, 12, 9), 9.5, 10),
        (Interval(10, 9, 12, 9), 9.5, 40),
        (Interval(10, 8, 12, 9), 10, 20),
        (Interval(10, 0, math.inf, 9), 11, 20),
        (Interval(10, 0, 1e9, 9), 10.001, stats.MOST_BLOCKS),
        (Interval(10, 8, 11, 9), 10.7, 21),
    ],
)
def test_blocks_that_would_clear_a_limit_grow_with_the_square_of_what_is_missing(
    value: Interval, limit: float, blocks: int
) -> None:
    assert limits.blocks_for(value, limit, 10) == blocks


@pytest.mark.parametrize(
    ("turned_down", "prompts"),
    [([True], 60), ([False, True], 90), ([False] * 8 + [True], 300), ([False, True, False, True], 90)],
)
def test_prompts_are_a_multiple_of_those_that_were_asked(turned_down: list[bool], prompts: int) -> None:
    """The first answer is of twice as many."""
    assert f": {prompts} that differ" in limits.prompts_needed(turned_down, 30)


def test_where_no_multiple_turns_it_down_none_is_named() -> None:
    for nothing in ([], [False] * 9):
        said = limits.prompts_needed(nothing, 30)
        assert f"not even {limits.MOST_TIMES} times" in said and "too few" not in said


def test_of_multiples_no_more_are_tried_than_are_needed() -> None:
    tried = itertools.count(2)
    limits.prompts_needed((next(tried) == 4 for _ in range(99)), 30)
    assert next(tried) == 5


def times(said: Verdict, asked: int) -> int | None:
    """How many times the prompts that were asked are said to turn the model down; None: not even MOST_TIMES."""
    assert said.outcome == "inconclusive"
    if f"not even {limits.MOST_TIMES} times" in said.reason:
        return None
    prompts = int(said.reason.split("turn it down: ")[1].split()[0])
    assert prompts % asked == 0
    return prompts // asked


@pytest.mark.parametrize("limit", [0.02, 0.025, 0.03, 0.035, 0.039])
@pytest.mark.parametrize("slices", [1, 5])
def test_predictions_of_as_many_prompts_as_are_named_turn_a_model_down(limit: float, slices: int) -> None:
    """4 % of tokens differ, in three of four prompts."""
    scored = [(0, 50), (1, 50), (2, 50), (5, 50)] * 3

    def of(k: int) -> Verdict:
        found = parity._predictions(Disagreement(tuple(scored * k), (), 0), limit, 1, slices)
        assert found
        return found

    needed = times(of(1), len(scored))
    assert needed is None or of(needed).outcome == "rejected"
    assert all(of(k).outcome == "inconclusive" for k in range(2, needed or limits.MOST_TIMES + 1))


@pytest.mark.parametrize(
    ("n", "early", "again"), [(40, 4, 0), (40, 5, 2), (40, 7, 0), (40, 9, 0), (40, 9, 2), (24, 3, 0), (50, 6, 1)]
)
def test_answers_to_as_many_prompts_as_are_named_turn_a_model_down(n: int, early: int, again: int) -> None:
    """So many of n part at the first token, where a limit of 1 % allows one in a hundred: it takes 3 to 10 times n."""
    parted = [(1.0, NEVER)] * early + [(NEVER, 1.0)] * again + [(NEVER, NEVER)] * (n - early - again)

    def of(k: int) -> Verdict:
        return parity._answers(Disagreement((), tuple(parted * k), 32), 0.01, 1, sound=False)

    needed = times(of(1), len(parted))
    assert needed is None or of(needed).outcome == "rejected"
    assert all(of(k).outcome == "inconclusive" for k in range(2, needed or limits.MOST_TIMES + 1))


def test_more_prompts_are_named_only_where_the_estimate_is_beyond_the_limit() -> None:
    below = parity._predictions(Disagreement(((1, 50), (0, 50)), (), 0), 0.02, 1)
    assert below and below.outcome == "inconclusive" and "turn it down" not in below.reason
    few = parity._answers(Disagreement((), ((NEVER, NEVER),) * 9, 32), 0.01, 1, sound=False)
    assert few.outcome == "inconclusive" and "turn it down" not in few.reason
