"""Parity at its limits: what of predictions and of answers may differ, and what shows that it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from helpers.records import MERGE
from helpers.ruled import NEVER, asked, case, rows

from peftopt import stats
from peftopt.decision import stopping
from peftopt.decision.evidence import Disagreement
from peftopt.decision.rules import parity
from peftopt.records import Interval, Rule, Verdict


def predicted(scored: Sequence[tuple[int, int]], limit: float, family: int = 1, slices: int = 1) -> Verdict:
    found = parity._predictions(Disagreement(tuple(scored), (), 0), limit, family, slices)
    assert found is not None
    return found


def test_predictions_that_all_agree_are_bounded_by_their_count() -> None:
    """No prompt of 100 differs, so up to 3 % may, each in one of its 50 tokens."""
    for family in (1, 4):
        found = predicted([(0, 50)] * 100, 0.01, family)
        assert found.value and found.value.estimate == 0
        assert found.value.high == pytest.approx(stats.upper_bound(0, 100, 1 - 0.05 / family) / 50)
        assert (found.outcome, found.unit) == ("accepted", "share")
    assert parity._predictions(Disagreement((), (), 0), 0.01, 1) is None


def test_few_predictions_that_differ_are_bounded_by_their_count_and_size() -> None:
    scored = [(5, 50)] * 2 + [(0, 50)] * 98
    found = predicted(scored, 0.01)
    by_count = stats.upper_bound(2, 100, 0.95) * 100 * 5 / 5000
    by_spread = stats.ratio_of_means(*zip(*scored, strict=True), 0.9).high
    assert by_count > by_spread and found.value and found.value.high == pytest.approx(by_count)
    alone = predicted([(5, 50)] + [(0, 50)] * 99, 0.01)
    assert alone.value and alone.value.high == pytest.approx(stats.upper_bound(1, 100, 0.95) * 100 * 5 / 5000)
    one = predicted([(1, 50)] * 2 + [(0, 50)] * 98, 0.01)
    assert one.value and one.value.high == pytest.approx(stats.upper_bound(2, 100, 0.95) / 50)
    assert predicted([(0, 0)] * 9, 0.01).outcome == "inconclusive", "nothing was scored"
    fewer = predicted([(-5, 50)] * 2 + [(0, 50)] * 98, 0.01)
    assert fewer.value and fewer.value.high == pytest.approx(stats.upper_bound(0, 100, 0.95) / 50)
    assert "0.00 % of tokens" in fewer.reason, "less than nothing is nothing"


@pytest.mark.parametrize("family", [1, 20, 21, 200, 2000])
def test_what_turns_a_model_down_is_the_same_in_a_family_of_any_size(family: int) -> None:
    """By predictions as by answers; and the lower bound that is told is the one that judges."""
    scored = [(n % 5, 50) for n in range(100)]
    sure = stats.ratio_of_means(*zip(*scored, strict=True), 1 - 2 * 0.0025).low
    for limit, outcome in ((sure - 1e-6, "rejected"), (sure + 1e-6, "inconclusive")):
        found = predicted(scored, limit, family)
        assert found.outcome == outcome and found.value and (found.value.low > limit) is (outcome == "rejected")
    bad = next(k for k in range(64) if answered(parting(64, k)).outcome == "rejected")
    alone, among = (answered(parting(64, bad), family=n) for n in (1, family))
    assert among.outcome == "rejected" and alone.value and among.value
    assert among.value.low == pytest.approx(alone.value.low)


def test_predictions_are_rejected_only_where_it_is_sure_and_over_all_slices() -> None:
    rng_like = [(n % 5, 50) for n in range(100)]  # 4 % on average
    mean = stats.ratio_of_means(*zip(*rng_like, strict=True), 1 - 2 * 0.0025)
    assert predicted(rng_like, mean.low - 1e-6).outcome == "rejected"
    assert predicted(rng_like, mean.low + 1e-6).outcome == "inconclusive"
    whole_ = parity._predictions(Disagreement(tuple(rng_like), (), 0), mean.low - 1e-6, 1)
    assert whole_ and whole_.outcome == "rejected", "all prompts together are one slice"
    many = stats.ratio_of_means(*zip(*rng_like, strict=True), 1 - 2 * 0.0025 / 4)
    assert predicted(rng_like, mean.low - 1e-6, slices=4).outcome == "inconclusive"
    assert predicted(rng_like, many.low - 1e-6, slices=4).outcome == "rejected"
    high = stats.ratio_of_means(*zip(*rng_like, strict=True), 0.9).high
    assert predicted(rng_like, high + 1e-6).outcome == "accepted"
    assert predicted(rng_like, high - 1e-6).outcome == "inconclusive"
    assert predicted(rng_like, high + 1e-6, family=2).outcome == "inconclusive"


def answered(
    partings: Sequence[tuple[float, float]], limit: float = 0.01, family: int = 1, sound: bool = False, slices: int = 1
) -> Verdict:
    return parity._answers(Disagreement((), tuple(partings), 32), limit, family, sound, slices)


def parting(n: int, early: int, at: float = 1, again: int = 0) -> list[tuple[float, float]]:
    """`early` of n answers part at a token, `again` others in the second run only."""
    return [(at, NEVER)] * early + [(NEVER, at)] * again + [(NEVER, NEVER)] * (n - early - again)


@pytest.mark.parametrize(
    ("n", "early", "sound", "expected"),
    [
        (20, 0, False, "inconclusive"),
        (20, 0, True, "inconclusive"),  # nothing is seen in so few
        (64, 0, False, "accepted"),
        (100, 4, False, "accepted"),
        (100, 5, False, "inconclusive"),
        (100, 10, True, "accepted"),
        (100, 11, True, "inconclusive"),
        (100, 30, True, "rejected"),
    ],
)
def test_answers_may_part_early_in_a_tenth_at_most(n: int, early: int, sound: bool, expected: str) -> None:
    assert answered(parting(n, early), sound=sound).outcome == expected


def test_answers_that_part_late_may_do_so_as_often_as_the_limit_on_tokens_allows() -> None:
    """1 % a token is 15 % of answers within 16: 28 of 200 late are fine, and at the first token they are not."""
    assert answered(parting(200, 28, 31), sound=True).outcome == "accepted"
    assert answered(parting(200, 36, 31), sound=True).outcome == "inconclusive"
    assert answered(parting(200, 28, 1), sound=True).outcome == "rejected"
    assert answered(parting(200, 60, 31), limit=0.001, sound=True).outcome == "rejected"
    assert answered(parting(200, 200, 1), limit=1.0, sound=True).outcome == "accepted", "anything goes"


def test_answers_are_judged_up_to_their_end() -> None:
    """Three in five part just before the end, which one in a hundred tokens does not explain."""
    late = tuple(parting(100, 60, 60))
    assert parity._answers(Disagreement((), late, 63), 0.01, 1, sound=True).outcome == "rejected"


def test_what_the_second_run_parts_alone_speaks_for_the_variant() -> None:
    assert answered(parting(100, 14, again=0), sound=True).outcome != "accepted"
    assert answered(parting(100, 14, again=6), sound=True).outcome == "accepted"
    told = answered(parting(100, 14, again=6), sound=True)
    assert "14 of 100" in told.reason and "6 in its own" in told.reason
    assert told.value and told.value.estimate == pytest.approx(0.08 / 0.94), "of those that it leaves alone, of a token"


def test_where_the_second_run_parts_too_the_limit_holds_for_the_rest() -> None:
    """1 % a token is 15 % of answers within 16; of the half that the second run leaves alone it is 7 %."""
    alone = [(31.0, NEVER)] * 28 + [(NEVER, NEVER)] * 172
    beside = [(31.0, NEVER)] * 28 + [(31.0, 31.0)] * 100 + [(NEVER, NEVER)] * 72
    assert answered(alone, sound=True).outcome == "accepted"
    assert answered(beside, sound=True).outcome == "inconclusive"


def test_few_answers_that_are_left_decide_nothing_late() -> None:
    """Two thirds part at the second token in both runs; of the rest half part late: too few to accept or to reject."""
    found = [(2.0, 2.0)] * 66 + [(20.0, NEVER)] * 4 + [(NEVER, NEVER)] * 30
    assert answered(found, sound=True).outcome == "accepted"
    assert answered([(20.0, NEVER)] * 40 + [(NEVER, NEVER)] * 60, limit=0.001, sound=True).outcome == "rejected"


def test_answers_are_judged_where_they_part_and_half_of_them_are_enough() -> None:
    """A tenth parts after 9 tokens and another after 20: 20 % within 20 tokens, where 1 % a token allows 18 %."""
    found = [(9.0, NEVER)] * 20 + [(20.0, NEVER)] * 20 + [(NEVER, NEVER)] * 160
    assert answered(found, sound=True).outcome == "inconclusive"
    later = [(9.0, NEVER)] * 20 + [(24.0, NEVER)] * 20 + [(NEVER, NEVER)] * 160
    assert answered(later, sound=True).outcome == "accepted"
    early = [(1.0, NEVER)] * 20 + found[20:]
    assert answered(early, sound=True).outcome == "inconclusive", "also those that part at once"
    for left, expected in ((50, "inconclusive"), (49, "accepted")):
        half = [(2.0, 2.0)] * (100 - left) + [(20.0, NEVER)] * 6 + [(NEVER, NEVER)] * (left - 6)
        assert answered(half, limit=0.005, sound=True).outcome == expected


def test_answers_are_also_judged_half_way_between_doubled_lengths() -> None:
    """5 in 400 part at each of the first 24 tokens and none later, where 1 % may: 26 % by then, and 21 % were allowed.

    Within 16 tokens they are too few to be sure of, and within 32 few enough.
    """
    found = list[tuple[float, float]]()
    for token in range(1, 25):
        found += [(token, NEVER)] * round((2200 - len(found)) / 80)
    said = answered([*found, *[(NEVER, NEVER)] * (2200 - len(found))])
    assert said.outcome == "rejected" and "the first 24 tokens" in said.reason and said.unit == "share"


def test_parity_over_a_family_and_over_slices_takes_more() -> None:
    near = parting(64, 0)
    assert answered(near).outcome == "accepted" and answered(near, family=200).outcome == "inconclusive"
    assert answered(near, family=200, sound=True).outcome == "inconclusive", "64 prompts show nothing to so many"
    bad = next(k for k in range(64) if answered(parting(64, k)).outcome == "rejected")
    assert answered(parting(64, bad), slices=50).outcome == "inconclusive"
    usual = parity._answers(Disagreement((), tuple(parting(64, bad)), 32), 0.01, 1, sound=False)
    assert usual == answered(parting(64, bad), slices=1), "all prompts together are one slice"
    assert answered(parting(64, bad), family=50).outcome == "rejected", "only who is sure rejects, whatever the family"


def test_parity_says_what_it_compared_and_needs_a_second_run() -> None:
    found = parity.parity(case(asked(merged={}, compiled={}), 0.01, "compiled"))
    assert (found.outcome, found.against, found.limit) == ("accepted", "merged", 0.01) and "60 prompts" in found.reason
    once = [m for m in asked(merged={}, compiled={}) if (m.variant, m.launch) != ("adapter", 2)]
    said = parity.parity(case(once, 0.01, "compiled"))
    assert (said.outcome, said.against) == ("inconclusive", "merged") and said.value is None
    assert parity.parity(case(asked(merged={}, int8={}), 0.01, step=MERGE)).reason.startswith("merged: ")


def test_small_slices_that_are_sound_leave_no_doubt_on_the_whole() -> None:
    """A slice of six prompts shows nothing; it rejects where it surely breaks, and is silent otherwise."""
    tagged = {f"p{n}": {"slices": [f"s{n % 20}"]} for n in range(120)}
    said = parity.parity(case(asked(n=120, merged=tagged, compiled=tagged), 0.01, "compiled"))
    assert said.outcome == "accepted" and "slice" not in said.reason


@pytest.mark.parametrize(("scored", "expected"), [(True, "accepted"), (False, "inconclusive")])
def test_answers_that_seem_alike_are_enough_where_predictions_are_sound(scored: bool, expected: str) -> None:
    """Eight of a hundred part at once. Scores say that it is noise; without them it may as well be 15."""
    parted = rows(*range(8), tokens=[99, *range(1, 30)])
    found = asked(n=100, merged={}, compiled=parted)
    if not scored:
        found = [replace(m, values={k: v for k, v in m.values.items() if k != "agree"}) for m in found]
    assert parity.parity(case(found, 0.01, "compiled")).outcome == expected


@pytest.mark.parametrize("family", [1, 5])
def test_the_prompts_that_parity_is_said_to_take_are_those_it_takes(family: int) -> None:
    """What `peftopt check` says before a run is what the rule asks after it."""
    rule = Rule("merge", "parity", 0.01)
    needed = next(n for n in range(1, 999) if not stopping._unclaimable(rule, 0.01, n, family))
    assert answered(parting(needed, 0), family=family).outcome == "accepted"
    for found, expected in ((parting(needed, 2), "accepted"), (parting(needed - 1, 2), "inconclusive")):
        assert answered(found, family=family, sound=True).outcome == expected


@pytest.mark.parametrize("left", [1.0, 0.6])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_share_of_answers_is_told_as_the_share_of_tokens_that_makes_it(left: float, tokens: int) -> None:
    """Of the answers that the second run leaves alone, those have parted that did so at one of the tokens."""
    parted = Interval(0.2, -0.05, 0.5, 99)
    found = parity._of_tokens(parted, tokens, left)
    for share, each in ((0.2, found.estimate), (-0.05, found.low), (0.5, found.high)):
        assert left * (1 - (1 - each) ** tokens) == pytest.approx(share)
    assert (found.n, found.level) == (parted.n, parted.level)
    every = parity._of_tokens(Interval(left, 0.0, 1.0, 99), tokens, left)
    assert (every.estimate, every.low, every.high) == (1, 0, 1), "none is left that has not parted"
    none = parity._of_tokens(parted, tokens, 0.0)
    assert (none.estimate, none.low, none.high) == (1, 1, 1)


@pytest.mark.parametrize(("early", "agree", "named"), [(3, 30, "answers part"), (0, 26, "tokens differ")])
def test_of_parts_that_are_open_the_worse_one_is_named(early: int, agree: int, named: str) -> None:
    """24 prompts leave both open. Of answers 12 % part at once, or none; of tokens 1 % differ, or 5 %."""
    parted = rows(*range(early), tokens=[99, *range(1, 30)]) | rows(*range(3, 10), agree=agree)
    said = parity.parity(case(asked(n=24, merged={}, compiled=parted), 0.01, "compiled"))
    assert said.outcome == "inconclusive" and named in said.reason
