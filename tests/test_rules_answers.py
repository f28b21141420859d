"""Rules that count answers, at their limits: critical errors, answers that are lost or cut off."""

from __future__ import annotations

import math

import pytest
from helpers.records import MERGE, decide, outcome, plan_of, verdict
from helpers.ruled import CAP, TRUNCATE, asked, case, policed, rows, ruled

from peftopt import stats
from peftopt.decision.rules import answers, limits
from peftopt.records import Interval, Rule


@pytest.mark.parametrize("family", [1, 3])
@pytest.mark.parametrize("short", [0, 1])
def test_no_error_in_so_many_prompts_is_a_claim(family: int, short: int) -> None:
    n = stats.needed_n(0.05, family) - short
    said = answers.critical_errors(case(asked(n=n, merged={}, int8={}), 0.05, family=family))
    assert said.outcome == ("inconclusive" if short else "accepted")
    assert said.value == Interval(0, 0.0, stats.upper_bound(0, n, 1 - 0.05 / family), n)
    assert (said.against, said.unit, said.limit) == ("merged", "share", 0.05)


def test_errors_that_count_reject_and_others_are_named() -> None:
    bad = rows(1, 2, flags=["loop"])
    said = answers.critical_errors(case(asked(merged={}, int8=bad), 0.05))
    assert said.outcome == "rejected" and said.value and said.value.estimate == 2 / 60
    assert said.value.high == stats.upper_bound(2, 60) and "2 critical errors in 60 prompts" in said.reason
    assert "p1: loop" in said.reason and "adapter or merged" in said.reason
    alone = answers.critical_errors(case(asked(merged=bad), 0.05, "merged"))
    assert (alone.outcome, alone.against) == ("rejected", "adapter") and " or " not in alone.reason
    none = answers.critical_errors(case([], 0.05))
    assert (none.outcome, none.against, none.value) == ("inconclusive", "merged", None)


def test_the_prompt_that_leaves_errors_open_is_named() -> None:
    found = asked({}, rows(*range(60)), merged={}, int8=rows(5, flags=["loop"]))
    found = [m for m in found if (m.variant, m.launch, m.values["row"]) != ("adapter", 2, "p5")]
    assert "p5: loop" in answers.critical_errors(case(found, 0.05)).reason


@pytest.mark.parametrize(("tie", "once", "expected"), [(1, 0, "accepted"), (0, 1, "inconclusive"), (1, 1, "accepted")])
def test_an_error_at_a_near_tie_is_named_and_one_in_a_prompt_asked_once_leaves_it_open(
    tie: int, once: int, expected: str
) -> None:
    """In a prompt that was asked once nothing is known of the noise, so no tie is seen there."""
    second = rows(0, noise=[0.5] * 31)
    wrong = rows(0, correct=False, critical=True, **({"parting": (3, 0.1)} if tie else {}))
    found = asked({}, second, n=60, merged={}, int8=wrong if tie else rows(5, correct=False))
    gone = "p5" if once else "none"
    found = [m for m in found if (m.variant, m.launch, m.values["row"]) != ("adapter", 2, gone)]
    said = answers.critical_errors(case(found, 0.05))
    assert said.outcome == expected
    assert ("near tie" in said.reason) == bool(tie) and ("only once" in said.reason) == (once > tie)


def test_a_merge_is_judged_on_the_variant_that_is_the_merge_alone() -> None:
    found = asked(merged=rows(1, flags=["loop"]), int8={})
    said = answers.critical_errors(case(found, 0.05, step=MERGE))
    assert said.outcome == "rejected" and said.reason.startswith("merged: ")
    plan = ruled(plan_of("int8"), *(Rule("merge", name, 0.05) for name in ("critical_errors", "parity", "lost")))
    decision = decide(plan, asked(int8={}), {})
    assert {outcome(decision, "int8", f"merge.{r}") for r in ("critical_errors", "parity", "lost")} == {"not judged"}


@pytest.mark.parametrize("family", [1, 4])
def test_lost_answers_are_those_beyond_the_second_runs(family: int) -> None:
    second, merged = rows(1, 2, correct=False), rows(2, 3, 4, 5, correct=False)
    said = answers.lost(case(asked({}, second, merged=merged, int8={}), 0.3, "merged", family))
    assert said.value == stats.excess(3, 1, 60, 1 - 0.1 / family) and said.outcome == "accepted"
    assert (said.against, said.unit, said.limit) == ("adapter", "share", 0.3)
    assert "3 of 60" in said.reason and not said.reason.startswith("merged: ")
    other = answers.lost(case(asked({}, second, merged=merged, int8={}), 0.3, family=family, step=MERGE))
    assert other.value == said.value and other.reason.startswith("merged: ")
    assert answers.lost(case(asked(), 0.3, "merged")).outcome == "inconclusive"
    wrong = rows(*range(60), correct=False)
    assert answers.lost(case(asked(wrong, merged=wrong), 0.3, "merged")).outcome == "not judged"


@pytest.mark.parametrize(("lost", "again", "limit"), [(1, 0, 0.05), (2, 1, 0.08), (0, 0, 0.03)])
def test_too_few_right_answers_say_how_many_would_tell(lost: int, again: int, limit: float) -> None:
    second, merged = rows(*range(again), correct=False), rows(*range(again, again + lost), correct=False)
    said = answers.lost(case(asked({}, second, merged=merged, int8={}), limit, "merged", 2))
    assert said.outcome == "inconclusive"
    n = next(int(word) for word in said.reason.split("at this rate ")[1].split() if word.isdigit())

    def upper(of: int) -> float:
        return stats.excess(math.ceil(lost * of / 60), again * of // 60, of, 1 - 0.1 / 2).high

    assert upper(n) <= limit and all(upper(fewer) > limit for fewer in range(61, n))


def test_more_lost_than_the_limit_asks_for_no_more_answers() -> None:
    said = answers.lost(case(asked({}, {}, merged=rows(0, 1, 2, 3, correct=False), int8={}), 0.05, "merged"))
    assert said.outcome == "inconclusive" and "at this rate" not in said.reason


def test_answers_lost_at_the_limit_are_not_told_apart_by_any_number() -> None:
    said = answers.lost(case(asked({}, {}, merged=rows(0, 1, 2, correct=False), int8={}), 0.05, "merged"))
    assert said.outcome == "inconclusive" and f"{limits.MOST_TIMES} times" in said.reason


def test_lost_answers_of_a_truncation_are_of_prompts_that_it_cut_and_that_were_right() -> None:
    plan = policed(TRUNCATE, Rule("truncate", "lost", 0.2))
    first = rows(0, 1, correct=False)
    cut = rows(*range(50), uncut_tokens=3000, correct=True) | rows(2, 3, 4, uncut_tokens=3000, correct=False)
    cut |= rows(55, correct=False) | rows(0, uncut_tokens=3000, correct=False)
    said = verdict(decide(plan, asked(first, cut=cut), {}), "cut", "truncate.lost")
    assert said.value == stats.proportion(3, 48, 1 - 0.1 / 2) and said.unit == "share"
    assert said.outcome == "accepted" and said.against == "adapter"
    none = verdict(decide(plan, asked(cut={}), {}), "cut", "truncate.lost")
    assert none.outcome == "inconclusive" and none.value is None


def test_cut_off_answers_are_bounded_over_the_family() -> None:
    plan = policed(CAP, Rule("shorten", "cut", 0.15))
    said = verdict(decide(plan, asked(cut=rows(1, 2, stopped=False)), {}), "cut", "shorten.cut")
    assert said.value == stats.proportion(2, 60, 1 - 0.1 / 2) and said.outcome == "accepted"
