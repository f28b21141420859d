"""What is still to be measured, and what a recipe can never decide, is told exactly: no block or prompt too many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from helpers.records import CHAINS, builds, evidence_of, plan_of, quality, speed, whole

from peftopt import stats
from peftopt.decision import stopping
from peftopt.decision.rules.table import ANY_CRITICAL
from peftopt.metrics import percent
from peftopt.recipe import plan as planning
from peftopt.recipe.thresholds import parse
from peftopt.records import Measurement, Plan, Quality, Recipe, Rule

DIED = {"stage": "speed (chat)", "reason": "killed", "detail": "", "hint": ""}


def failed(name: str) -> Measurement:
    return Measurement("failure", name, values=DIED)


def ruled(plan: Plan, *rules: Rule) -> Plan:
    return replace(plan, recipe=replace(plan.recipe, rules=rules))


def said(recipe: Recipe, prompts: int = 10_000) -> dict[str, str]:
    """What cannot be decided, by the rules that each line names."""
    lines = [line.split(": ", 1) for line in stopping.undecidable(recipe, prompts)]
    assert len({names for names, _ in lines}) == len(lines)
    return {names: why for names, why in lines}


# ---- blocks ------------------------------------------------------------------------------------


def test_nothing_is_raced_without_a_baseline() -> None:
    assert stopping.blocks(evidence_of(plan_of("merged"), [failed("adapter")]), "chat") == frozenset()


def test_what_failed_is_not_asked_again_and_neither_is_what_only_it_was_compared_with() -> None:
    plan = plan_of("merged", "int8")
    measured = whole(plan, {"merged": 0.5, "int8": 0.4}, blocks=16)
    assert stopping.blocks(evidence_of(plan, [*measured, failed("int8")]), "chat") == frozenset()
    racing = [m for m in measured if m.probe != "speed" or m.values["block"] < 6]
    assert stopping.blocks(evidence_of(plan, [*racing, failed("merged")]), "chat") == {"adapter", "int8"}
    assert stopping.blocks(evidence_of(plan, [*racing, failed("int8")]), "chat") == {"adapter", "merged"}


def test_a_race_that_nothing_can_win_any_more_is_not_open() -> None:
    plan = plan_of("merged")
    near = builds(plan) + speed(plan, {"merged": 0.85}, 16) + quality("adapter") + quality("adapter", launch=2)
    assert [v.rule for v in stopping.open_races(evidence_of(plan, near + quality("merged")))] == ["merge.gain"]
    few = evidence_of(plan, near + quality("merged", 20))  # parity is open too, but takes prompts, not blocks
    assert [v.rule for v in stopping.open_races(few)] == ["merge.gain"]
    broken = quality("merged", p3={"correct": False})
    assert stopping.open_races(evidence_of(plan, near + broken)) == []


@pytest.mark.parametrize(("blocks", "more"), [(12, True), (23, True), (24, False)])
def test_a_decided_race_goes_on_to_the_fewest_blocks_that_are_asked_for(blocks: int, more: bool) -> None:
    plan = ruled(plan_of("merged", min_blocks=24), Rule("merge", "gain", 0.1))
    clear = builds(plan) + speed(plan, {"merged": 0.5}, blocks) + whole(plan, {"merged": 0.5}, blocks=0)
    assert bool(stopping.blocks(evidence_of(plan, clear), "chat")) == more
    assert stopping.blocks(evidence_of(plan, clear), "bulk"), "of the minimized workload alone"
    slow = builds(plan) + speed(plan, {"merged": 1.5}, blocks) + whole(plan, {"merged": 1.5}, blocks=0)
    assert not stopping.blocks(evidence_of(plan, slow), "chat"), "what is rejected costs no more time"


# ---- answers -----------------------------------------------------------------------------------


def compiled(variants: int, *rules: Rule) -> Recipe:
    recipe = ruled(plan_of("compiled"), *rules).recipe
    names = [f"v{n}" for n in range(variants)]
    chains = {name: replace(CHAINS["compiled"], name=name) for name in names}
    return replace(recipe, variants={"adapter": CHAINS["adapter"], **chains})


@pytest.mark.parametrize(
    ("rules", "needed"),
    [
        ((), stats.needed_n(0.05, 50)),  # what every table asks
        ((Rule("merge", "gain", 0.1),), stats.needed_n(0.05, 50)),
        ((Rule("variant", "critical_errors", 0.01),), stats.needed_n(0.01, 50)),
        ((Rule("merge", "gain", 0.1), Rule("variant", "critical_errors", None)), stopping.FEWEST_ANSWERS),
        (
            (ANY_CRITICAL, Rule("compile", "critical_errors", 0.02)),
            stats.needed_n(0.02, 50),
        ),
        ((ANY_CRITICAL, Rule("int8", "critical_errors", 0.01)), stats.needed_n(0.05, 50)),
        ((ANY_CRITICAL, Rule("compile", "parity", 0.01)), stats.needed_n(0.05, 50)),
    ],
)
def test_a_slow_engine_answers_what_its_strictest_claim_takes(rules: Iterable[Rule], needed: int) -> None:
    recipe = compiled(50, *rules)
    assert stopping.answers(recipe, recipe.variants["v0"]) == needed
    assert stopping.answers(recipe, recipe.variants["adapter"]) is None


def test_no_fewer_than_128_answers_are_compared() -> None:
    recipe = compiled(1)
    assert stopping.answers(recipe, recipe.variants["v0"]) == 128 > stats.needed_n(0.05)


# ---- what cannot be decided --------------------------------------------------------------------


def test_only_rules_of_the_recipes_own_techniques_that_are_on_are_said() -> None:
    merge, both = plan_of("merged", max_blocks=5), plan_of("merged", "compiled", max_blocks=5)
    assert said(merge.recipe).keys() == {"merge.gain"}
    assert said(both.recipe).keys() == {"merge.gain, compile.gain"}
    assert said(ruled(merge, Rule("merge", "gain", None), Rule("merge", "parity", 0.01)).recipe) == {}


@pytest.mark.parametrize(("blocks", "variants", "granted"), [(9, 1, 10), (10, 1, 0), (11, 4, 16), (12, 4, 0)])
def test_a_race_that_ends_before_its_first_look_is_said(blocks: int, variants: int, granted: int) -> None:
    names = ("merged", "int8", "compiled", "int8_compiled")[:variants]
    plan = ruled(plan_of(*names, max_blocks=blocks, relaunch=1), Rule("merge", "gain", 0.1))
    found = said(plan.recipe)
    assert (f"measure.max_blocks is {blocks}: give {granted}" in found.get("merge.gain", "")) == bool(granted)
    assert bool(found) == bool(granted)


@pytest.mark.parametrize(
    ("blocks", "relaunch", "launches", "give"),
    [(60, 20, 3, 0), (60, 21, 3, 0), (60, 29, 3, 0), (60, 30, 2, 20), (11, 11, 1, 3), (11, 6, 2, 3), (12, 4, 3, 0)],
)
def test_launches_that_cannot_be_told_apart_are_said(blocks: int, relaunch: int, launches: int, give: int) -> None:
    plan = ruled(plan_of("merged", max_blocks=blocks, relaunch=relaunch), Rule("merge", "gain", 0.1))
    found = said(plan.recipe)
    assert bool(found) == bool(give)
    if give:
        assert found["merge.gain"].endswith(f"measure.relaunch: {give}")
        assert f"come from {launches} launch{'es' * (launches > 1)}," in found["merge.gain"]


def test_no_fewer_than_one_block_a_launch_is_proposed() -> None:
    plan = ruled(plan_of("merged", max_blocks=2, relaunch=2), Rule("merge", "gain", 0.1))
    assert any(line.endswith("give measure.relaunch: 1") for line in stopping.undecidable(plan.recipe, 0))


@pytest.mark.parametrize(("requests", "enough"), [(37, False), (38, True)])
def test_requests_that_a_tail_lacks_are_said(requests: int, enough: bool) -> None:
    """At 95 % with 85 % of the error at its last look, the P95 has two bounds from 76 requests on."""
    text = "latency.p95@chat <= 400 ms"
    plan = ruled(plan_of("merged", require=[text, "latency.p95@chat <= 0.9x"], max_blocks=2, requests=requests))
    assert said(plan.recipe) == (
        {} if enough else {"require": f"{text}: takes 76 requests, and 2 blocks have {2 * requests}"}
    )


def test_claims_of_answers_say_what_they_take_and_what_there_is() -> None:
    names = ("merged", "int8")
    rules = (Rule("merge", "lost", 0.02), Rule("merge", "parity", 0.01), Rule("int8", "critical_errors", 0.01))
    recipe = ruled(plan_of(*names), *rules, Rule("variant", "critical_errors", 0.03)).recipe
    level = 1 - 0.1 / 2  # 5 % on the side that is judged, over two variants
    takes = {
        "merge.lost": next(n for n in range(1, 999) if stats.excess(0, 0, n, level).high <= 0.02),
        "merge.parity": next(n for n in range(1, 999) if stats.excess(0, 0, n, level).high <= 0.1),
        "int8.critical_errors": stats.needed_n(0.01, 2),
        "variant.critical_errors": stats.needed_n(0.03, 2),
    }
    assert [rule.technique for rule in recipe.rules if rule.name != "gain"] == ["merge", "merge", "int8", "variant"]
    for rule, needed in takes.items():
        assert rule not in said(recipe, needed)
        assert f"takes {needed} prompts" in said(recipe, needed - 1)[rule]
        assert f"there are {needed - 1}, which" in said(recipe, needed - 1)[rule]
    ten = said(recipe, 10)
    assert f"can claim {percent(stats.excess(0, 0, 10, level).high, 2)}" in ten["merge.lost"]
    assert "its limit of 2.00 % for 2 variants" in ten["merge.lost"]
    assert "its limit of 1.00 % of tokens, that no more than 10.00 % of answers" in ten["merge.parity"]
    assert f"can claim {percent(stats.upper_bound(0, 10, 1 - 0.05 / 2), 2)}" in ten["int8.critical_errors"]
    assert all("can claim 100.00 %" in why for why in said(recipe, 0).values())


def test_what_other_rules_ask_of_answers_is_not_said() -> None:
    plan = plan_of("merged", "int8")
    others = (Rule("int8", "smaller", 0.1), Rule("int8", "lost", 0.1), Rule("variant", "critical_errors", None))
    assert said(ruled(plan, *others).recipe, 0) == {}
    assert said(ruled(plan, Rule("merge", "gain", 0.1)).recipe, 0).keys() == {"variant.critical_errors"}
    lax = (Rule("merge", "lost", 0.97), Rule("variant", "critical_errors", None))
    assert said(ruled(plan_of("merged"), *lax).recipe, 1) == {}, "one prompt leaves 96 % open"


def test_a_rule_of_the_whole_variant_takes_the_place_of_the_usual_one() -> None:
    own = ruled(plan_of("merged"), Rule("merge", "lost", None), Rule("variant", "critical_errors", 0.5)).recipe
    needed = stats.needed_n(0.5)
    (line,) = said(own, needed - 1).values()
    assert f"takes {needed} prompts" in line and said(own, needed) == {}


def test_answers_that_no_recipe_asks_for_cannot_be_judged() -> None:
    rules = (Rule("merge", "lost", 0.1), Rule("merge", "gain", 0.1), Rule("variant", "critical_errors", 0.05))
    recipe = replace(ruled(plan_of("merged"), *rules).recipe, quality=None)
    (line,) = stopping.undecidable(recipe, 0)
    assert line.startswith("merge.lost: no answers are checked")
    silent = replace(ruled(plan_of("merged"), *rules[1:]).recipe, quality=None)
    assert list(stopping.undecidable(silent, 0)) == []


def test_plans_of_other_meters_have_the_same_needs() -> None:
    plan = planning.elsewhere(plan_of("merged").recipe)
    assert stopping.blocks(evidence_of(plan, []), "chat") == {"adapter", "merged"}


@pytest.mark.parametrize(
    ("text", "fewest"),
    [
        ("accuracy >= 0.95x", 77),
        ("validity >= 0.9x", 38),
        ("accuracy > 95 %", 72),
        ("accuracy >= 2 %", 1),
        ("accuracy >= 1x", None),
    ],
)
def test_a_limit_on_right_answers_takes_as_many_prompts_as_it_is_told(text: str, fewest: int | None) -> None:
    """0 of n lost bounds the rate at 1 - p^(1/n), p = 2.5 % a side, of which lost answers have four fifths."""
    recipe = plan_of("merged", require=[text]).recipe
    if fewest is None:
        assert "no number" in said(recipe)["require"]
        return
    (why,) = (line for line in stopping.undecidable(recipe, fewest - 1) if text in line)
    assert why.endswith(f"takes {fewest}")
    assert not any(text in line for line in stopping.undecidable(recipe, fewest))


def test_limits_on_other_metrics_take_no_number_of_right_answers() -> None:
    recipe = plan_of("merged", require=["perplexity <= 1.02x"]).recipe
    assert not any("perplexity" in line for line in stopping.undecidable(recipe, 1))


def test_a_variant_that_goes_token_by_token_is_asked_what_its_requirements_take() -> None:
    recipe = replace(compiled(50, Rule("variant", "critical_errors", None)), require=(parse("accuracy >= 0.97x"),))
    takes = next(n for n in range(1, 9999) if stopping._showable(recipe.require[0], n, 50))
    assert stopping.answers(recipe, recipe.variants["v0"]) == takes > stopping.FEWEST_ANSWERS


@pytest.mark.parametrize("text", ["accuracy >= 1x", "accuracy >= 100 %", "top1 >= 99.9 %", "latency.p50@chat <= 1 ms"])
def test_what_no_number_of_prompts_shows_asks_a_slow_engine_for_no_more_of_them(text: str) -> None:
    """It would answer token by token for days, and for nothing."""
    recipe = replace(compiled(1), require=(parse(text),))
    assert stopping.answers(recipe, recipe.variants["v0"]) == stopping.FEWEST_ANSWERS


def test_a_limit_on_tokens_is_told_as_the_recipe_has_it() -> None:
    """Parity's limit of 1 % is on tokens; how many answers may part early follows from it."""
    recipe = plan_of("merged").recipe
    (line,) = (line for line in stopping.undecidable(recipe, 20) if line.startswith("merge.parity"))
    needed = stopping.prompts_for(recipe, "merge.parity")
    assert "its limit of 1.00 % of tokens" in line and f"takes {needed} prompts" in line
    assert line.endswith(f"{needed - 20} more are needed")


def test_nothing_can_be_valid_where_nothing_says_what_is() -> None:
    recipe = plan_of("merged", require=["validity >= 99 %"]).recipe
    asked = replace(recipe, quality=Quality("p.jsonl"))
    (line,) = (line for line in stopping.undecidable(asked, 400) if "validity" in line)
    assert "schema" in line
    assert not any("schema" in line for line in stopping.undecidable(recipe, 400))
