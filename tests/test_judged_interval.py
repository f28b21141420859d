"""One interval of a speed everywhere: the one that is judged, with its level said once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.records import decide, of, plan_of, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.metrics import percent
from peftopt.records import Decision, Interval, Rule
from peftopt.report import as_json, headline, scorecard, table
from peftopt.report.words import figure


def raced(*names: str, ratio: float = 0.7, blocks: int = 20, noise: float = 0.05) -> Decision:
    plan = plan_of("merged", *names)
    return decide(plan, whole(plan, dict.fromkeys(("merged", *names), ratio), blocks=blocks, noise=noise), {})


def gain(decision: Decision, name: str, rule: str = "merge.gain") -> Interval:
    (value,) = (v.value for v in of(decision, name).verdicts if v.rule == rule)
    assert value is not None
    return value


@pytest.mark.parametrize("ratio", [0.6, 0.78, 0.8, 0.84, 1.1])
@pytest.mark.parametrize("blocks", [7, 12, 20, 40])
def test_the_table_shows_the_interval_that_the_rule_judged_by(ratio: float, blocks: int) -> None:
    decision = raced(ratio=ratio, blocks=blocks)
    judged = gain(decision, "merged")
    assert table.speed_of(decision, of(decision, "merged"), "chat") == judged
    shown = figure("latency.ratio", judged)
    for compact in (False, True):
        header, rows = table.rows(decision, compact)
        column = next(n for n, title in enumerate(header) if title.startswith("speed@chat"))
        cell = next(row[column] for row in rows if row[0].startswith("merged"))
        assert cell.replace(" SLOWER", "").startswith(shown.removesuffix(")"))
    (rule,) = (row for row in table.rule_rows(of(decision, "merged"))[1] if row[0] == "merge.gain")
    assert shown in rule


def test_its_level_is_said_once() -> None:
    decision = raced()
    level = percent(gain(decision, "merged").level, 1)
    header, _ = table.rows(decision)
    assert [level in title for title in header].count(True) == 1
    assert f"at {level}" in decision.sentence
    assert level != "95.0 %", "looks share the error"


@settings(deadline=None, max_examples=30)
@given(st.floats(0.3, 1.5), st.integers(1, 30), st.floats(0.001, 0.3))
def test_no_difference_is_claimed_beside_a_rule_that_saw_none(ratio: float, blocks: int, noise: float) -> None:
    """ "0.62x (0.42–0.78)" beside an inconclusive "faster" cannot be."""
    plan = plan_of("merged")
    rules = (Rule("merge", "gain", 0.0),)
    plan = replace(plan, recipe=replace(plan.recipe, rules=rules))
    decision = decide(plan, whole(plan, {"merged": ratio}, blocks=blocks, noise=noise), {})
    shown = table.speed_of(decision, of(decision, "merged"), "chat")
    assert shown is not None and shown == gain(decision, "merged")
    (verdict,) = (v for v in of(decision, "merged").verdicts if v.rule == "merge.gain")
    card = scorecard.scorecard(decision)
    assert card is not None
    latency = next(score for score in card.scores if score.title.startswith("latency P50"))
    if verdict.outcome == "inconclusive":
        assert not shown.high < 1 and latency.change != "better"
    if verdict.outcome == "accepted":
        assert latency.change == "better"


def test_a_variant_that_no_rule_compares_with_the_baseline_has_the_level_of_the_others() -> None:
    decision = raced("int8")
    merged, int8 = (table.speed_of(decision, of(decision, name), "chat") for name in ("merged", "int8"))
    assert merged is not None and int8 is not None and int8.level == merged.level


def test_the_baselines_row_is_what_the_a_a_arm_is_judged_by() -> None:
    decision = raced()
    own = of(decision, "adapter").speed
    assert own is not None and own.level > 0.95 and own.low <= 1 <= own.high


def test_the_headline_claims_what_the_interval_shows() -> None:
    wide = replace(of(raced(), "merged"), speed=Interval(0.8, 0.6, 1.1, 10, 0.99))
    decision = raced()
    told = replace(decision, variants=(of(decision, "adapter"), wide), chosen="merged", outcome="accepted")
    assert "no difference in speed" in headline.headline(told)


def test_a_decision_of_an_older_peftopt_shows_what_it_has() -> None:
    decision = raced()
    unjudged = tuple(replace(v, speed=None) for v in decision.variants)
    old = as_json.decision_from_json(as_json.render(replace(decision, variants=unjudged)))
    assert table.speed_of(old, of(old, "merged"), "chat") == of(old, "merged").figures["latency.ratio@chat"]
    header, _ = table.rows(old)
    assert "speed@chat vs adapter" in header, "no level, which is 95 % then"
