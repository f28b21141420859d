"""Answers of a variant beside those of two runs of the adapter: where they part, what counts as an error, what is
lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from helpers.records import builds, evidence_of, plan_of, quality

from peftopt.decision.evidence import ANSWERED_WRONG, CriticalError, Disagreement, Evidence, Parted
from peftopt.measurements import Answer
from peftopt.records import Json, Measurement

NEVER = math.inf
NAMES = ("merged", "int8", "compiled", "int8_compiled")
Rows = Mapping[str, Mapping[str, Json]]


def seen(first: Rows, second: Rows, **variants: Rows) -> Evidence:
    """Only the rows that are given, right and alike but for what is said of them."""
    runs = [("adapter", 1, first), ("adapter", 2, second), *((name, 1, rows) for name, rows in variants.items())]
    found: list[Measurement] = []
    for name, launch, rows in runs:
        found += [m for m in quality(name, 60, launch, **rows) if m.values["row"] in rows]
    return evidence_of(plan_of(*NAMES), found)


def rows(*names: str, **values: Json) -> dict[str, dict[str, Json]]:
    return {name: dict(values) for name in names}


def answers(*names: str, **values: Json) -> Mapping[str, Answer]:
    return seen(rows(*names, **values), {}).rows("adapter")


# ---- where answers part --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "parted"),
    [
        ([1, 2, 3], [1, 2, 3], NEVER),
        ([1, 2, 3], [1, 2, 4], 3),
        ([9, 2, 3], [1, 2, 3], 1),
        ([1, 2], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2], 3),
        ([], [], NEVER),
        ([], [1], 1),
    ],
)
def test_answers_part_at_their_first_token_that_differs(ours: list[int], theirs: list[int], parted: float) -> None:
    evidence = seen({}, {})
    for end in (True, False):
        one, two = answers("p1", tokens=ours, stopped=end), answers("p1", tokens=theirs, stopped=end)
        assert evidence.partings(one, two) == {"p1": parted}
    if parted == NEVER:
        cut_off = answers("p1", tokens=ours, stopped=False)
        assert evidence.partings(answers("p1", tokens=ours, stopped=True), cut_off) == {"p1": len(ours) + 1}


def test_only_what_both_were_asked_is_compared() -> None:
    both = answers("p1", "p2", tokens=[1]), answers("p2", "p3", tokens=[1])
    assert seen({}, {}).partings(*both) == {"p2": NEVER}


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [
        (0, 1, Parted(0, 0, 0, 7)),
        (0, 2, Parted(1, 1, 1, 7)),
        (0, 4, Parted(1, 1, 1, 7)),
        (0, 5, Parted(2, 2, 3, 7)),
        (1, 5, Parted(2, 2, 3, 7)),
        (2, 5, Parted(1, 1, 2, 5)),
        (4, 9, Parted(1, 1, 2, 5)),
        (5, 99, Parted(1, 0, 0, 2)),
    ],
)
def test_what_parts_within_a_span_is_told_of_answers_that_are_left(start: int, end: int, found: Parted) -> None:
    parted = [(2, NEVER), (NEVER, 2), (5, NEVER), (NEVER, 5), (5, 5), (NEVER, NEVER), (20, NEVER)]
    assert Disagreement((), parted, 30).within(start, end) == found


def test_scores_are_those_beyond_what_the_second_run_and_the_reference_change() -> None:
    first = rows("p1", "p2", scored_tokens=100, agree=100) | rows("p3", scored_tokens=50, agree=50)
    second = rows("p1", agree=97) | rows("p2", "p3", agree=50)
    evidence = seen(first, second, merged=rows("p1", "p2", "p3", agree=40), compiled=rows("p1", "p2", "p3", agree=38))
    assert evidence.disagreement("merged", "adapter").scored == ((57, 100), (10, 100), (10, 50))
    assert evidence.disagreement("compiled", "merged").scored == ((2, 100), (2, 100), (2, 50))
    assert evidence.disagreement("merged", "adapter", ["p3", "p9"]).scored == ((10, 50),)
    assert len(evidence.disagreement("merged", "adapter", ["p3", "p9"]).partings) == 1


def test_a_prompt_that_one_of_them_has_no_score_for_is_compared_by_its_answer() -> None:
    evidence = seen(rows("p1", "p2", "p3"), rows("p1", "p2"), merged=rows("p1", "p2", "p3"), compiled=rows("p1", "p2"))
    for name, launch in (("adapter", 2), ("merged", 1), ("compiled", 1)):
        kept = evidence.answers[name, launch]["p1"]
        evidence.answers[name, launch]["p1"] = replace(kept, agree=None)
        found = evidence.disagreement("compiled", "merged")
        assert (found.scored, found.partings) == (((0, 31),), ((NEVER, NEVER), (NEVER, NEVER)))
        evidence.answers[name, launch]["p1"] = kept


def test_partings_of_the_variant_and_of_the_second_run_go_together() -> None:
    first = rows("p1", "p2", "p3", tokens=[1, 2, 3, 4])
    second = rows("p1", tokens=[1, 2, 3, 9]) | rows("p2", tokens=[1, 2, 3, 4])
    merged = rows("p1", tokens=[1, 9]) | rows("p2", "p3", tokens=[1, 2, 3, 4, 5, 6])
    found = seen(first, second, merged=merged).disagreement("merged", "adapter")
    assert found.partings == ((2, 4), (5, NEVER)), "the second run was not asked p3"
    assert found.longest == 7
    assert seen(first, second).disagreement("merged", "adapter") == Disagreement((), (), 0)


# ---- errors --------------------------------------------------------------------------------------


def errors(evidence: Evidence, name: str, parent: str = "") -> tuple[list[tuple[str, str]], int]:
    found, asked = evidence.critical_errors(name, parent)
    return [(each.row, each.flag) for each in found], asked


FLAGS = rows("p1", flags=["loop", "empty"], critical=False)


@pytest.mark.parametrize("excused", [(), ("loop",), ("empty",), ("loop", "empty"), ("other",)])
@pytest.mark.parametrize("where", ["first", "second", "parent"])
def test_a_flag_that_the_adapter_or_the_variant_without_the_step_has_is_excused(
    excused: Sequence[str], where: str
) -> None:
    """One error is told of a prompt, the first that nobody else makes."""
    excuse, none = rows("p1", flags=list(excused), critical=False), rows("p1", flags=[], critical=False)
    first, second, parent = (excuse if where == who else none for who in ("first", "second", "parent"))
    evidence = seen(first, second, merged=parent, int8=FLAGS)
    left = [("p1", flag) for flag in ("loop", "empty") if flag not in excused][:1]
    assert errors(evidence, "int8", "merged") == (left, 1)
    whole = [("p1", "loop")] if where == "parent" else left
    assert errors(evidence, "int8") == errors(evidence, "int8", "adapter") == (whole, 1)


@pytest.mark.parametrize(
    ("first", "second", "parent", "blamed"),
    [
        (True, True, True, True),
        (False, True, True, False),
        (True, False, True, False),
        (True, True, False, False),
        (False, False, False, False),
    ],
)
def test_a_critical_prompt_is_an_error_where_all_others_are_right(
    first: bool, second: bool, parent: bool, blamed: bool
) -> None:
    runs = [rows("p1", correct=each, critical=True) for each in (first, second, parent)]
    evidence = seen(runs[0], runs[1], merged=runs[2], int8=rows("p1", correct=False, critical=True))
    assert bool(errors(evidence, "int8", "merged")[0]) == blamed
    plain = seen(runs[0], runs[1], merged=runs[2], int8=rows("p1", correct=False, critical=False))
    assert errors(plain, "int8", "merged")[0] == []
    right = seen(runs[0], runs[1], merged=runs[2], int8=rows("p1", correct=True, critical=True))
    assert errors(right, "int8", "merged")[0] == []


def test_prompts_count_that_the_adapter_was_asked_and_once_each() -> None:
    first = rows("p1", "p2", "p3")
    ours = rows("p1", "p2", prompt="the same", flags=["loop"]) | rows("p3", prompt="another") | rows("p4", "p5")
    found, asked = seen(first, rows("p1"), int8=ours).critical_errors("int8")
    assert asked == 2 and [(e.row, e.asked_once, e.near_tie) for e in found] == [
        ("p1", False, False),
        ("p2", True, False),
    ]
    assert [e.counts for e in found] == [True, False]
    assert not CriticalError("p1", "", near_tie=True, asked_once=False).counts


TENTH = [0.0] * 18 + [0.3] * 2


@pytest.mark.parametrize(
    ("parting", "noise", "tie"),
    [
        ((3, 0.3), TENTH, True),
        ((3, 0.31), TENTH, False),
        ((3, 0.1), [0.0] * 19 + [0.3], False),
        ((19, 0.3), [0.0] * 19 + [0.3], True),
        ((19, 0.1), TENTH, True),
        ((20, 0.1), TENTH, False),
        ((0, 0.2), [0.2], True),
        ((0, 0.0), [0.0], True),
        (None, TENTH, False),
        ((3, 0.0), [], False),
    ],
)
def test_a_near_tie_is_within_what_changes_there_or_in_a_tenth_of_the_answers_tokens(
    parting: tuple[int, float] | None, noise: list[float], tie: bool
) -> None:
    told = {} if parting is None else {"parting": parting}
    evidence = seen(
        rows("p1", critical=True),
        rows("p1", critical=True, noise=noise),
        int8=rows("p1", critical=True, correct=False, **told),
    )
    ((error,), _) = evidence.critical_errors("int8")
    assert error.near_tie is tie
    unknown = seen(rows("p1"), {}, int8=rows("p1", critical=True, correct=False, parting=(3, 0.0)))
    assert [(e.near_tie, e.asked_once) for e in unknown.critical_errors("int8")[0]] == [(False, True)]


# ---- what is lost and won --------------------------------------------------------------------------


def test_lost_answers_are_of_prompts_that_the_first_run_gets_right_and_all_were_asked() -> None:
    first = rows("p1", "p2", "p3", "p4", "p5", "p8", correct=True) | rows("p6", "p7", correct=False)
    second = rows("p1", "p4", "p8", correct=True) | rows("p2", "p3", "p6", correct=False) | rows("p7", correct=True)
    merged = rows("p1", "p3", "p6", "p5", correct=False) | rows("p2", "p4", "p7", "p8", correct=True)
    # p1 is lost, p2 the second run loses alone, p3 both lose, p4 and p8 nobody; p5 was not asked twice, p6 and p7 wrong
    assert seen(first, second, merged=merged).lost("merged") == (1, 1, 5)
    assert seen(first, second, merged={}).lost("merged") == (0, 0, 0)


def test_flips_and_slices() -> None:
    first = rows("p1", "p2", "p3", correct=True, slices=[]) | rows("p4", "p5", correct=False)
    ours = rows("p1", "p2", correct=False, slices=["b", "a"]) | rows("p3", correct=True, slices=["b"])
    ours |= rows("p4", "p6", correct=True, slices=["b"]) | rows("p5", correct=False, slices=["c"])
    evidence = seen(first, {}, merged=ours)
    assert evidence.flips("merged") == (2, 1)
    assert evidence.flips("merged", ["p1", "p4", "p6", "p9"]) == (1, 1)
    assert evidence.flips("merged", []) == (0, 0)
    assert list(evidence.slices("merged").items()) == [
        ("a", ["p1", "p2"]),
        ("b", ["p1", "p2", "p3", "p4", "p6"]),
        ("c", ["p5"]),
    ]
    assert evidence.worst_slice("merged") == ("a", 2, 0, 2)


def test_a_slice_that_lost_no_more_than_it_won_is_not_the_worst() -> None:
    first = rows("p1", correct=True) | rows("p2", correct=False)
    ours = rows("p1", correct=False, slices=["a"]) | rows("p2", correct=True, slices=["a"])
    assert seen(first, {}, merged=ours).worst_slice("merged") is None
    assert seen(first, {}, merged=rows("p1", slices=[])).worst_slice("merged") is None


def test_what_is_left_of_the_adapters_shift_by_hand() -> None:
    """8 and 6 of 10 and 10 are left, beside 5 and 5 in another variant; what is not finite or unknown says nothing."""
    ours = rows("p1", kept=8.0, shift=10.0) | rows("p2", kept=6.0, shift=10.0) | rows("p3", kept=math.nan, shift=10.0)
    ours |= rows("p4", shift=10.0) | rows("p5", kept=9.0, shift=10.0)
    theirs = rows("p1", "p2", kept=5.0, shift=10.0) | rows("p5", kept=math.inf, shift=10.0)
    evidence = seen({}, {}, merged=ours, int8=theirs, compiled=rows("p1", kept=0.0, shift=0.0))
    alone, more = evidence.survival("merged"), evidence.survival("merged", "int8")
    assert alone and (alone.estimate, alone.n) == (pytest.approx(23 / 30), 3)
    assert more and (more.estimate, more.n) == (pytest.approx(4 / 20), 2)
    assert evidence.survival("compiled") is evidence.survival("int8_compiled") is None
    assert evidence.survival("merged", "int8_compiled") is None


def test_cut_off_are_answers_that_the_adapter_ended_by_itself() -> None:
    first = rows("p1", "p2", "p3", stopped=True) | rows("p4", stopped=False)
    ours = rows("p3", "p1", "p4", "p5", stopped=False) | rows("p2", stopped=True, uncut_tokens=9)
    evidence = seen(first, {}, merged=ours)
    assert evidence.cut("merged") == (["p1", "p3"], 4)
    assert evidence.touched("merged") == ["p2"] and evidence.touched("adapter") == []


def test_lengths_are_the_adapters_own() -> None:
    found = seen(rows("p1", new_tokens=9) | rows("p2", new_tokens=3), {}, merged=rows("p1", new_tokens=1))
    assert found.lengths() == [3, 9]


def test_rows_of_tasks_are_compared_with_the_adapters() -> None:
    def scored(name: str, **scores: float) -> Measurement:
        samples = [{"id": row, "value": value} for row, value in scores.items()]
        return Measurement("task", name, values={"task": "t", "samples": samples})

    found = [
        scored("adapter", a=1, b=0, c=0.5, d=1, f=0.5),
        scored("merged", a=0.5, b=0.2, c=0.5, d=0.9, f=0.5),
        scored("merged", e=1),
    ]
    evidence = evidence_of(plan_of("merged", "int8"), [*found, scored("int8", z=1)])
    assert evidence.task_flips("merged") == {"task.t": (2, 1, 5)}
    assert evidence.task_flips("int8") == {"task.t": (0, 0, 0)} and evidence.task_flips("compiled") == {}


def test_the_size_is_that_of_what_a_variant_loads() -> None:
    plan = plan_of("merged")
    evidence = evidence_of(plan, builds(plan))
    assert (evidence.size("adapter"), evidence.size("merged")) == (270, 160)
    assert evidence_of(plan, []).size("merged") is None


def test_the_worst_slice_is_the_one_that_lost_most_of_its_answers_beyond_what_it_won() -> None:
    first = rows("p1", "p3", "p4", "p5", "p6", correct=True) | rows("p2", correct=False)
    even = rows("p1", correct=False, slices=["even"]) | rows("p2", correct=True, slices=["even"])
    large = rows("p3", correct=False, slices=["large"]) | rows("p4", "p5", correct=True, slices=["large"])
    worst = rows("p6", correct=False, slices=["small"])
    assert seen(first, {}, merged={**even, **large, **worst}).worst_slice("merged") == ("small", 1, 0, 1)
    assert seen(first, {}, merged={**even, **large}).worst_slice("merged") == ("large", 1, 0, 3)


def test_further_errors_of_an_answer_are_kept_beside_the_first() -> None:
    ours = rows("p1", flags=["loop", "empty", "special token"], critical=True, correct=False)
    excused = rows("p1", flags=["empty"], critical=True)
    ((error,), _) = seen(excused, rows("p1", critical=True), int8=ours).critical_errors("int8")
    assert error.flag == "loop" and error.others == ("special token", ANSWERED_WRONG)
