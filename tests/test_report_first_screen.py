"""What a lead reads first: the decision in plain words, the scorecard, and what is a warning and what a note."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt.errors import BadInput
from peftopt.records import Decision, Interval, Outcome, VariantDecision, Verdict
from peftopt.report import table
from peftopt.report.headline import headline
from peftopt.report.scorecard import Price, Score, price, scorecard


def exact(value: float, n: int = 200) -> Interval:
    return Interval(value, value, value, n)


def variant(name: str, outcome: Outcome = "accepted", decided_by: str = "", **figures: Interval) -> VariantDecision:
    named = {key.replace("_at_", "@"): value for key, value in figures.items()}
    return VariantDecision(name, (), outcome, decided_by, (), named)


def decision(*variants: VariantDecision, chosen: str | None = None, outcome: Outcome = "accepted") -> Decision:
    baseline = VariantDecision(
        "adapter",
        (),
        "not judged",
        "",
        (),
        {
            "latency.p50@chat": Interval(400.0, 390.0, 410.0, 72),
            "throughput@chat": Interval(100.0, 95.0, 105.0, 24),
            "size": exact(500e6, 1),
            "memory": Interval(1e9, 0.9e9, 1.1e9, 5),
            "accuracy": Interval(0.93, 0.9, 0.96, 200),
        },
    )
    return Decision("r", "adapter", "latency.p50@chat", "wall", chosen, outcome, "", (baseline, *variants))


def shipped(ratio: Interval, **figures: Interval) -> Decision:
    figures = {"latency.ratio@chat": ratio, **figures}
    return decision(variant("fast", "accepted", "merge.gain", **figures), chosen="fast")


def ratio(estimate: float, spread: float = 0.05) -> Interval:
    return Interval(estimate, estimate * (1 - spread), estimate * (1 + spread), 24)


# ---- the plain sentence ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speed", "says"),
    [
        (0.25, "four times as fast"),
        (0.26, "3.8 times as fast"),
        (0.5, "twice as fast"),
        (0.04, "25 times as fast"),
        (0.68, "32 % less time"),
        (1.2, "20 % more time"),
    ],
)
def test_a_gain_is_told_in_times_or_per_cent(speed: float, says: str) -> None:
    assert says in headline(shipped(ratio(speed)))


def test_a_difference_that_is_not_shown_is_not_claimed() -> None:
    told = headline(shipped(Interval(0.8, 0.6, 1.1, 10)))
    assert "no difference" in told and "20 %" not in told


@given(st.floats(1e-6, 1e6))
def test_the_sentence_never_claims_more_than_the_ratio(speed: float) -> None:
    told = headline(shipped(exact(speed)))
    times = re.search(r"([\d.,]+) times as fast", told)
    if times:
        factor = float(times[1].replace(",", ""))
        assert factor == pytest.approx(1 / speed, rel=0.06)
    assert ("as fast" in told or "less time" in told) == (speed < 1)


def test_equal_answers_are_rounded_down_and_only_all_of_them_are_called_all() -> None:
    assert "on 99 % of prompts" in headline(shipped(ratio(0.5), greedy_match=exact(0.9999)))
    assert "on all 200 prompts" in headline(shipped(ratio(0.5), greedy_match=exact(1.0)))


def test_where_many_answers_differ_the_sentence_says_how_many_are_worse() -> None:
    flips = {"flips_worse": exact(4.0), "flips_better": exact(1.0)}
    assert "4 of 200 got worse, 1 better" in headline(shipped(ratio(0.5), greedy_match=exact(0.6), **flips))
    assert "worse" not in headline(shipped(ratio(0.5), greedy_match=exact(0.98), **flips))


def test_what_the_recipe_minimizes_is_what_the_sentence_tells() -> None:
    small = dataclasses.replace(shipped(ratio(0.5), size=exact(100e6)), minimize="size")
    assert "80 % less size on disk" in headline(small) and "as fast" not in headline(small)
    busy = dataclasses.replace(shipped(ratio(0.5), **{"throughput@chat": exact(300.0)}), minimize="throughput@chat")
    assert "three times the throughput" in headline(busy)


def open_rule(minutes: float | None, hopeless: bool = False) -> Verdict:
    return Verdict("merge.gain", "inconclusive", "", minutes_needed=minutes, hopeless=hopeless)


def test_an_open_decision_keeps_the_baseline_and_says_what_measuring_on_would_settle() -> None:
    slow = dataclasses.replace(variant("slow", "inconclusive"), verdicts=(open_rule(40.0),))
    near = dataclasses.replace(variant("near", "inconclusive"), verdicts=(open_rule(12.0),))
    told = headline(decision(slow, near, outcome="inconclusive"))
    assert told.startswith("Keep today's adapter") and "slow or near" in told
    assert "12 minutes" in told and "settle near" in told


@pytest.mark.parametrize("verdict", [open_rule(None), open_rule(5.0, hopeless=True)])
def test_time_is_not_promised_where_time_does_not_decide(verdict: Verdict) -> None:
    stuck = dataclasses.replace(variant("stuck", "inconclusive"), verdicts=(open_rule(5.0), verdict))
    assert "minute" not in headline(decision(stuck, outcome="inconclusive"))


def test_what_was_turned_down_is_told_by_the_harm_it_would_do() -> None:
    told = headline(
        decision(
            variant("merged", "rejected", "merge.lost"),
            variant("int8", "rejected", "require: size <= 0.7x"),
            outcome="rejected",
        )
    )
    assert told.startswith("Keep today's adapter")
    assert "merged would risk a quiet loss of right answers" in told
    assert "int8 would miss size <= 0.7x" in told


def test_many_variants_are_counted_and_not_named() -> None:
    many = [variant(f"v{n}", "inconclusive") for n in range(9)]
    assert "9 variants" in headline(decision(*many, outcome="inconclusive"))


def test_nothing_judged_keeps_the_baseline() -> None:
    assert "Keep today's adapter" in headline(decision(variant("x", "not judged"), outcome="not judged"))


# ---- the scorecard -----------------------------------------------------------------------------


def scores(found: Decision, machine: Price | None = None) -> dict[str, Score]:
    card = scorecard(found, machine)
    assert card is not None
    return {score.title: score for score in card.scores}


def test_the_scorecard_says_better_only_where_that_is_shown() -> None:
    found = scores(
        shipped(
            ratio(0.5),
            **{
                "latency.p50@chat": Interval(200.0, 190.0, 210.0, 72),
                "memory": Interval(0.95e9, 0.9e9, 1.0e9, 5),
                "size": exact(600e6, 1),
            },
        )
    )
    assert (found["latency P50@chat"].change, found["latency P50@chat"].before) == ("better", "400 ms")
    assert found["peak memory"].change == "same", "the intervals overlap"
    assert found["size on disk"].change == "worse" and "20 % more" in found["size on disk"].difference


def test_latency_is_compared_by_the_paired_ratio_and_not_by_two_medians() -> None:
    medians = {"latency.p50@chat": Interval(200.0, 190.0, 210.0, 72)}
    assert scores(shipped(Interval(0.9, 0.7, 1.2, 6), **medians))["latency P50@chat"].change == "same"


def test_a_throughput_without_an_interval_follows_the_pairs_and_only_where_it_moves_with_them() -> None:
    def change(throughput: float) -> str:
        value = Interval(throughput, 0.0, math.inf, 3)
        return scores(shipped(ratio(0.5), **{"throughput@chat": value}))["throughput@chat"].change

    assert change(200.0) == "better"
    assert change(100.0) == "same", "requests that come at a rate are answered at that rate"


def test_what_tokens_cost_follows_from_the_price_of_the_machine() -> None:
    found = shipped(ratio(0.5), **{"throughput@chat": Interval(200.0, 190.0, 210.0, 24)})
    assert "cost of a million output tokens" not in scores(found)
    cost = scores(found, Price(3.6, "EUR"))["cost of a million output tokens"]
    assert (cost.before, cost.after, cost.change) == ("10.00 EUR", "5.00 EUR", "better")


def test_the_only_candidate_has_a_scorecard_and_several_without_a_choice_have_none() -> None:
    one = variant("a", "rejected", size=exact(1e6, 1))
    card = scorecard(decision(one, outcome="rejected"))
    assert card is not None and card.variant == "a"
    assert scorecard(decision(one, variant("b", "rejected"), outcome="rejected")) is None
    assert scorecard(decision(outcome="not judged")) is None


def test_critical_errors_are_never_good_news() -> None:
    assert (
        scores(shipped(ratio(0.5), critical_errors=Interval(0.01, 0.0, 0.03, 200)))["critical errors"].change == "worse"
    )
    none = scores(shipped(ratio(0.5), critical_errors=Interval(0.0, 0.0, 0.018, 200)))["critical errors"]
    assert none.change == "same" and "1.8 %" in none.difference


@pytest.mark.parametrize(
    ("text", "read"), [("2.10", Price(2.1, "USD")), ("2.10 EUR", Price(2.1, "EUR")), ("3usd", Price(3.0, "USD"))]
)
def test_a_price_is_a_number_and_a_currency(text: str, read: Price) -> None:
    assert price(text) == read


@pytest.mark.parametrize("text", ["", "0", "-1", "two", "2.10 dollars", "1e3", "nan", "inf", "1" * 400])
def test_other_prices_are_refused(text: str) -> None:
    with pytest.raises(BadInput) as refused:
        price(text)
    assert refused.value.hint


# ---- warnings and notes ------------------------------------------------------------------------


def test_only_warnings_of_the_decision_warn_and_all_else_is_a_note() -> None:
    noted = dataclasses.replace(variant("fast", figures_=exact(1.0)), notes=("still warming up",))
    found = dataclasses.replace(decision(noted, chosen="fast"), warnings=("A/A failed",), notes=("one block",))
    assert table.warnings(found) == ["A/A failed"]
    assert table.notes(found) == ["one block", "fast: still warming up"]
