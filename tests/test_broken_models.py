"""No broken model is shipped, whatever it is made of, and no faithful one is turned down for the adapter's noise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
from helpers.records import RULES, builds, decide, of, outcome, plan_of, quality, speed

from peftopt.records import Decision, Json, Measurement, Plan, Rule

LONG = list(range(200))
GIBBERISH = [9] * 150
Rows = Mapping[str, Mapping[str, Json]]


def table(*rules: Rule) -> tuple[Rule, ...]:
    mine = {(rule.technique, rule.name) for rule in rules}
    return (*(rule for rule in RULES if (rule.technique, rule.name) not in mine), *rules)


def with_rules(plan: Plan, *rules: Rule) -> Plan:
    return replace(plan, recipe=replace(plan.recipe, rules=table(*rules)))


def said(tokens: list[int], *rows: int) -> dict[str, dict[str, Json]]:
    return {f"p{n}": {"tokens": tokens, "scored_tokens": 200, "agree": 200} for n in rows}


def judged(plan: Plan, n: int, second: Rows | None = None, first: Rows | None = None, **variants: Rows) -> Decision:
    """Everything clear but the answers: each variant takes half of the adapter's time."""
    first, second = first or {}, second or first or {}
    answers = quality("adapter", n, **first) + quality("adapter", n, launch=2, **second)
    for name, changes in variants.items():
        answers += quality(name, n, **changes)
    return decide(plan, builds(plan) + speed(plan, dict.fromkeys(variants, 0.5)) + answers, {})


def reason(decision: Decision, name: str, rule: str) -> str:
    return next(v.reason for v in of(decision, name).verdicts if v.rule == rule)


# ---- catastrophe -------------------------------------------------------------------------------

CATASTROPHES: Mapping[str, Mapping[str, Json]] = {
    "wrong": {"correct": False},
    "empty": {"tokens": [], "flags": ["empty"]},
    "special": {"flags": ["special token"]},
}


@pytest.mark.parametrize("kind", CATASTROPHES)
@pytest.mark.parametrize("variant", ["merged", "compiled", "int8"])
def test_a_variant_that_breaks_the_critical_prompts_is_never_shipped(kind: str, variant: str) -> None:
    """Under the default table as under one that knows no such rule."""
    broken = {f"p{n}": dict(CATASTROPHES[kind]) for n in range(40)}
    decision = judged(plan_of("merged", "compiled", "int8"), 400, **{"merged": {}, variant: broken})
    assert of(decision, variant).outcome == "rejected" and decision.chosen != variant
    assert outcome(decision, variant, "variant.critical_errors") == "rejected"


def test_catastrophe_rules_can_be_switched_off_by_name_only() -> None:
    plan = with_rules(plan_of("merged"), Rule("variant", "critical_errors", None), Rule("merge", "parity", None))
    assert judged(plan, 400, merged={"p3": {"correct": False}}).chosen == "merged"
    plan = with_rules(plan_of("merged"), Rule("merge", "critical_errors", 0.05), Rule("merge", "parity", None))
    assert (
        outcome(judged(plan, 400, merged={"p3": {"correct": False}}), "merged", "merge.critical_errors") == "rejected"
    )


def test_the_step_that_made_an_error_is_blamed_and_no_other() -> None:
    rules = (Rule("merge", "critical_errors", 0.05), Rule("compile", "critical_errors", 0.05))
    plan = with_rules(
        plan_of("merged", "int8", "compiled", "int8_compiled"), *rules, Rule("int8", "critical_errors", 0.05)
    )
    bad: Rows = {"p3": {"correct": False}}
    decision = judged(plan, 400, merged=bad, int8=bad, compiled=bad, int8_compiled={**bad, "p4": {"correct": False}})
    for variant in ("merged", "int8", "compiled", "int8_compiled"):
        assert outcome(decision, variant, "merge.critical_errors") == "rejected"
        assert outcome(decision, variant, "variant.critical_errors") == "rejected"
    assert outcome(decision, "int8", "int8.critical_errors") == "accepted"
    assert outcome(decision, "compiled", "compile.critical_errors") == "accepted"
    assert outcome(decision, "int8_compiled", "int8.critical_errors") == "rejected"
    assert "p4" in reason(decision, "int8_compiled", "int8.critical_errors")
    assert of(decision, "int8").figures["critical_errors"].estimate == 1 / 400, "every row shows its total"


def test_an_error_in_a_prompt_that_the_adapter_was_asked_once_is_open() -> None:
    plan = plan_of("int8")
    second = [m for m in quality("adapter", launch=2) if m.values["row"] != "p3"]
    common = builds(plan) + speed(plan, {"int8": 0.5}) + quality("adapter") + second
    found = decide(plan, common + quality("int8", p3={"correct": False}), {})
    assert outcome(found, "int8", "int8.critical_errors") == "inconclusive"
    found = decide(plan, common + quality("int8", p3={"correct": False}, p4={"correct": False}), {})
    assert outcome(found, "int8", "int8.critical_errors") == "rejected"


@pytest.mark.parametrize(
    ("margin", "noise", "expected"),
    [
        (0.05, [0.0] * 20 + [0.1] + [0.0] * 10, "accepted"),
        (0.05, [0.2] * 31, "accepted"),
        (0.3, [0.2] * 31, "rejected"),
    ],
)
def test_a_flip_at_a_near_tie_is_named_and_not_counted(margin: float, noise: list[float], expected: str) -> None:
    plan = plan_of("int8")
    decision = judged(
        plan, 400, second={"p3": {"noise": noise}}, int8={"p3": {"correct": False, "parting": (20, margin)}}
    )
    assert outcome(decision, "int8", "int8.critical_errors") == expected
    assert ("near tie" in reason(decision, "int8", "int8.critical_errors")) == (expected == "accepted")
    assert "p3" in reason(decision, "int8", "int8.critical_errors")
    empty = {"p3": {"flags": ["empty"], "parting": (20, margin)}}
    assert outcome(judged(plan, 400, second={"p3": {"noise": noise}}, int8=empty), "int8", "int8.critical_errors") == (
        "rejected"
    ), "only which answer is right can be a tie"


def test_copies_of_a_prompt_count_once() -> None:
    plan = plan_of("int8")
    copies = {f"p{n}": {"prompt": "the same"} for n in range(400)}
    decision = judged(plan, 400, first=copies, int8=copies)
    assert outcome(decision, "int8", "int8.critical_errors") == "inconclusive"


# ---- parity ------------------------------------------------------------------------------------


def broken_worlds(n: int) -> dict[str, tuple[Rows, Rows]]:
    """(the adapter's second run, the merge's answers), of answers of 200 tokens."""
    every = range(n)
    late = [*LONG[:180], *[7] * 20]
    early = [*LONG[:5], *GIBBERISH]
    return {
        "gibberish from token 5, the null parts late in all": (said(late, *every), said(early, *every)),
        "gibberish from token 5, the null parts late in most": (
            said(LONG, *every) | said(late, *(k for k in every if k % 10)),
            said(early, *every),
        ),
        "a quarter broken from token 3": (
            said(LONG, *every),
            said(LONG, *every) | said([0, 1, 2, *GIBBERISH], *every[::4]),
        ),
        "all differ from token 150 on": (said(LONG, *every), said([*LONG[:150], *[7] * 50], *every)),
    }


@pytest.mark.parametrize("world", list(broken_worlds(8)))
@pytest.mark.parametrize("n", [64, 128, 400])
def test_another_model_is_never_shipped_though_the_scores_do_not_see_it(world: str, n: int) -> None:
    second, merged = broken_worlds(n)[world]
    decision = judged(plan_of("merged"), n, first=said(LONG, *range(n)), second=second, merged=merged)
    assert outcome(decision, "merged", "merge.parity") != "accepted" and decision.chosen is None
    if n == 400:
        assert outcome(decision, "merged", "merge.parity") == "rejected"


@pytest.mark.parametrize("n", [64, 400])
def test_a_merge_that_parts_where_the_adapter_itself_does_is_shipped(n: int) -> None:
    first = said(LONG, *range(n))
    late = said([*LONG[:180], *[7] * 20], *range(0, n, 2))
    other = said([*LONG[:180], *[8] * 20], *range(0, n, 2))
    decision = judged(plan_of("merged"), n, first=first, second={**first, **late}, merged={**first, **other})
    assert outcome(decision, "merged", "merge.parity") == "accepted"


def test_scored_tokens_are_compared_at_the_same_positions() -> None:
    """The adapter's second run disagrees in three tokens of a hundred; so may the merge, and no more."""
    n = 200
    null = {f"p{k}": {"scored_tokens": 100, "agree": 97} for k in range(n)}
    first = {f"p{k}": {"scored_tokens": 100, "agree": 100} for k in range(n)}
    worse = {f"p{k}": {"scored_tokens": 100, "agree": 94} for k in range(n)}
    plan = plan_of("merged")
    assert outcome(judged(plan, n, first=first, second=null, merged=null), "merged", "merge.parity") == "accepted"
    assert outcome(judged(plan, n, first=first, second=null, merged=worse), "merged", "merge.parity") == "rejected"
    assert outcome(judged(plan, n, first=first, second=first, merged=null), "merged", "merge.parity") == "rejected"


def test_a_broken_slice_is_seen_in_a_sound_whole() -> None:
    n = 400
    first = {f"p{k}": {"scored_tokens": 100, "agree": 100, "slices": ["rare" if k < 8 else "rest"]} for k in range(n)}
    few = {f"p{k}": {"scored_tokens": 100, "agree": 80, "slices": ["rare"]} for k in range(8)}
    decision = judged(plan_of("merged"), n, first=first, merged={**first, **few})
    assert outcome(decision, "merged", "merge.parity") == "rejected"
    assert "slice rare" in reason(decision, "merged", "merge.parity")


def test_a_compile_is_compared_with_what_it_compiles() -> None:
    """The merge below has its own distance from the adapter; the compiled variant answers for what it adds."""
    n = 200
    first = {f"p{k}": {"scored_tokens": 100, "agree": 100} for k in range(n)}
    far = {f"p{k}": {"scored_tokens": 100, "agree": 90} for k in range(n)}
    plan = plan_of("merged", "compiled")
    decision = judged(plan, n, first=first, merged=far, compiled=far)
    assert outcome(decision, "merged", "merge.parity") == "rejected"
    assert outcome(decision, "compiled", "compile.parity") == "accepted"
    assert of(decision, "compiled").outcome == "rejected", "what it is made of is judged too"


def test_few_prompts_show_no_parity_however_clean_they_are() -> None:
    assert outcome(judged(plan_of("merged"), 20, merged={}), "merged", "merge.parity") == "inconclusive"


# ---- lost answers ------------------------------------------------------------------------------


def wrong(*rows: int) -> Rows:
    return {f"p{n}": {"correct": False, "critical": False} for n in rows}


@pytest.mark.parametrize(
    ("second", "merged", "expected"),
    [((), (), "accepted"), ((), range(50, 90), "rejected"), (range(50, 90), range(60, 100), "accepted")],
)
def test_a_merge_may_lose_what_the_adapter_itself_loses(second: range, merged: range, expected: str) -> None:
    plan = with_rules(plan_of("merged"), Rule("merge", "lost", 0.05))
    decision = judged(plan, 400, second=wrong(*second), merged=wrong(*merged))
    assert outcome(decision, "merged", "merge.lost") == expected


def test_a_share_of_right_answers_needs_its_prompts() -> None:
    for n, expected in ((5, "inconclusive"), (400, "accepted")):
        plan = plan_of("int8", require=["accuracy >= 0.99x"])
        assert outcome(judged(plan, n, int8={}), "int8", "require: accuracy >= 0.99x") == expected


def test_eight_quantizers_are_one_family() -> None:
    """What one alone could claim of 299 prompts, four that may be chosen cannot."""
    alone, four = plan_of("int8"), plan_of("merged", "int8", "compiled", "int8_compiled")
    assert outcome(judged(alone, 299, int8={}), "int8", "int8.critical_errors") == "accepted"
    decision = judged(four, 299, **{name: {} for name in four.recipe.variants if name != "adapter"})
    assert outcome(decision, "int8", "int8.critical_errors") == "inconclusive"


def test_each_verdict_says_what_it_protects_against() -> None:
    decision = judged(plan_of("merged", require=["accuracy >= 0.9x"]), 400, merged={})
    assert all(verdict.protects for variant in decision.variants for verdict in variant.verdicts)


def test_measurements_of_answers_are_ignored_where_no_recipe_asks_for_them() -> None:
    plan = plan_of("merged")
    bare = replace(plan, recipe=replace(plan.recipe, quality=None))
    found: list[Measurement] = builds(bare) + speed(bare, {"merged": 0.5})
    rules = {verdict.rule for verdict in of(decide(bare, found, {}), "merged").verdicts}
    assert "variant.critical_errors" not in rules and "merge.gain" in rules


def test_answers_that_never_stop_are_said() -> None:
    endless = {f"p{n}": {"stopped": False} for n in range(64)}
    warnings = judged(plan_of("merged"), 64, first=endless, merged=endless).warnings
    assert [w.split(":")[0] for w in warnings if "0 of 64 answers stopped" in w] == ["adapter", "merged"]
    assert not judged(plan_of("merged"), 64, merged={}).warnings


@pytest.mark.parametrize("rule", ["merge.parity", "bake.parity"])
@pytest.mark.parametrize("n", [12, 30, 64, 128, 400])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("scored", [True, False])
def test_an_open_parity_is_never_beyond_its_limit(rule: str, n: int, share: float, scored: bool) -> None:
    """Of so many prompts such a share is gibberish from token 5 on, in an engine that scores and in one that does not.
    What is left open shows an interval that holds the limit, and says how many prompts would turn the model down."""
    name = {"merge.parity": "merged", "bake.parity": "baked"}[rule]
    rows = range(n)
    bad = [k for k in rows if k < share * n]
    broken = said([*LONG[:5], *GIBBERISH], *bad)
    for row in broken.values():
        row["agree"] = 60 if scored else 200
    decision = judged(plan_of(name), n, first=said(LONG, *rows), **{name: said(LONG, *rows) | broken})
    (verdict,) = (v for v in of(decision, name).verdicts if v.rule == rule)
    assert verdict.value is not None and verdict.limit == 0.01
    if verdict.outcome == "rejected":
        assert verdict.value.low > verdict.limit
    else:
        assert verdict.value.low <= verdict.limit
    if verdict.outcome == "inconclusive":
        assert verdict.value.low <= verdict.limit < verdict.value.high
        assert "prompts" in verdict.reason
        if verdict.value.estimate > verdict.limit:
            assert "turn it down" in verdict.reason


def test_as_many_prompts_as_are_named_turn_it_down() -> None:
    def at(n: int) -> Decision:
        bad = said([*LONG[:5], *GIBBERISH], *range(n // 4))
        first = said(LONG, *range(n))
        return judged(plan_of("merged"), n, first=first, merged=first | bad)

    few = at(24)
    assert outcome(few, "merged", "merge.parity") == "inconclusive"
    named = re.search(r"(\d+) that differ as these do would", reason(few, "merged", "merge.parity"))
    assert named is not None
    assert outcome(at(int(named[1])), "merged", "merge.parity") == "rejected"
