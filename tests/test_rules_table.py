"""The table's exact rules, its row of the whole, parents, and what is said of all of a variant."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.records import BAKE, CHAINS, EAGER, INT8, MERGE, builds, decide, of, outcome, plan_of, verdict, whole
from helpers.ruled import CAP, TRUNCATE, asked, policed, rows, ruled

from peftopt.decision.rules import parents, table
from peftopt.recipe import plan as planning
from peftopt.records import Interval, Measurement, Outcome, Rule, Step, Variant


@pytest.mark.parametrize(("size", "expected"), [(749, "accepted"), (750, "accepted"), (751, "rejected")])
def test_a_quarter_smaller_is_three_quarters_or_less(size: int, expected: str) -> None:
    plan = ruled(plan_of("merged", "int8"), Rule("int8", "smaller", 0.25))
    sizes = {build.id: size if build.step == INT8 else 1000 for build in plan.builds}
    found = [Measurement("build", "", values={"id": i, "size_bytes": s, "tier0": []}) for i, s in sizes.items()]
    said = verdict(decide(plan, found, {}), "int8", "int8.smaller")
    assert (said.outcome, said.limit, said.against, said.unit) == (expected, 0.75, "merged", "x")
    assert said.value == Interval(size / 1000, size / 1000, size / 1000, 1)
    assert outcome(decide(plan, found[:1], {}), "int8", "int8.smaller") == "inconclusive"
    assert outcome(decide(plan, found[1:], {}), "int8", "int8.smaller") == "inconclusive"


@pytest.mark.parametrize(
    ("over", "lengths", "expected"),
    [
        (2048, (2049, 3000), "accepted"),
        (2048, (2048, 3000), "rejected"),
        (2047, (3000,), "rejected"),
        (4096, (), "accepted"),
    ],
)
def test_only_longer_inputs_are_cut(over: int, lengths: tuple[int, ...], expected: str) -> None:
    plan = policed(replace(TRUNCATE, params={"over": over}), Rule("truncate", "over", 2048))
    cut = {f"p{n}": {"uncut_tokens": length} for n, length in enumerate(lengths)}
    said = verdict(decide(plan, asked(cut=cut), {}), "cut", "truncate.over")
    assert said.outcome == expected and said.value == Interval(over, over, over, len(lengths))
    assert (said.unit, said.limit) == ("tokens", 2048)
    assert (str(min(lengths)) if lengths else "none was asked") in said.reason


@pytest.mark.parametrize(
    ("table", "checked", "answered", "there"),
    [
        ((), True, True, True),
        ((Rule("variant", "critical_errors", 0.5),), True, True, True),
        ((Rule("variant", "critical_errors", None),), True, True, False),
        ((), False, True, False),
        ((), True, False, False),
    ],
)
def test_every_variant_faces_the_row_of_the_whole_where_answers_are_checked(
    table: tuple[Rule, ...], checked: bool, answered: bool, there: bool
) -> None:
    plan = ruled(plan_of("merged"), *table)
    plan = plan if checked else replace(plan, recipe=replace(plan.recipe, quality=None))
    decision = decide(plan, asked(merged={}) if answered else [], {})
    found = [v for v in of(decision, "merged").verdicts if v.rule == "variant.critical_errors"]
    assert len(found) == there
    if there:
        assert (found[0].limit, found[0].against) == (0.5 if table else 0.05, "adapter")


def test_every_rule_says_what_it_protects_against() -> None:
    for rule in table.RULES:
        assert table.protects(f"merge.{rule}") == table.PROTECTS[rule]
    assert table.protects("require: latency.p50@chat <= 1.5 ms") == table.PROTECTS["require"]
    assert table.protects("artifact.intact") == table.PROTECTS["artifact.intact"]
    assert table.protects("merge.what_comes_next") == ""


@pytest.mark.parametrize(
    ("others", "step", "parent"),
    [
        (("merged", "compiled"), INT8, "compiled"),
        (("merged", "int8"), INT8, "merged"),
        (("merged", "int8"), CHAINS["compiled"].engine, "int8"),
        (("merged",), CHAINS["compiled"].engine, "adapter"),
        (("merged", "apart"), MERGE, "apart"),
        (("int8",), MERGE, "adapter"),
        ((), INT8, "adapter"),
    ],
)
def test_a_parent_is_as_like_its_variant_as_the_recipe_has(others: tuple[str, ...], step: Step, parent: str) -> None:
    recipe = plan_of(*others, "int8_compiled").recipe
    assert parents.parent_of(recipe, CHAINS["int8_compiled"], step) == parent
    assert parents.parent_of(recipe, CHAINS["int8"], EAGER) != "int8", "nothing is its own parent"


def test_a_parent_keeps_the_other_policies() -> None:
    """Of two policies each is judged against the variant that has the other one."""
    engine = CHAINS["merged"].engine
    both, cut = Variant("both", (MERGE,), engine, (TRUNCATE, CAP)), Variant("cut", (MERGE,), engine, (TRUNCATE,))
    capped, recipe = Variant("capped", (MERGE,), engine, (CAP,)), plan_of("merged").recipe
    recipe = replace(recipe, variants={**recipe.variants, "cut": cut, "capped": capped, "both": both})
    assert parents.parent_of(recipe, both, TRUNCATE) == "capped"
    assert parents.parent_of(recipe, both, CAP) == "cut"
    assert parents.parent_of(recipe, cut, TRUNCATE) == parents.parent_of(recipe, capped, CAP) == "merged"


def test_a_step_by_itself_is_the_variant_with_no_other_technique_on_the_baselines_engine() -> None:
    ready = Step("ready", "transform", "")  # no technique, such as one that only changes a dtype
    for name, others, step, expected in (
        ("int8", ("merged",), MERGE, "merged"),
        ("int8_compiled", ("compiled", "merged"), MERGE, "merged"),
        ("int8_compiled", ("compiled",), MERGE, None),
        ("int8_baked", ("apart", "baked"), BAKE, "baked"),
        ("int8_baked", ("apart",), BAKE, None),
        ("merged", (), MERGE, "merged"),
    ):
        assert parents.by_itself(plan_of(*others, name).recipe, name, step) == expected, (name, others)
    chains = {"plain": (MERGE,), "readied": (ready, MERGE), "whole": (ready, INT8, MERGE)}
    policed_ = Variant("policed", (ready, MERGE), EAGER, (CAP,))
    variants = {"adapter": CHAINS["adapter"], "policed": policed_}
    variants |= {name: Variant(name, steps, EAGER) for name, steps in chains.items()}
    recipe = replace(plan_of().recipe, variants=variants)
    assert parents.by_itself(recipe, "whole", MERGE) == "readied"
    assert parents.by_itself(recipe, "plain", MERGE) == "plain"


def test_files_that_are_wrong_reject_and_those_that_were_not_built_leave_it_open() -> None:
    plan = plan_of("merged", "int8")
    for tier0, expected in (((), "accepted"), (("a", "b", "c", "d"), "rejected")):
        found = verdict(decide(plan, builds(plan, tier0), {}), "merged", "artifact.intact")
        assert found.outcome == expected and (not tier0 or found.reason == "a; b; c")
    assert outcome(decide(plan, [], {}), "merged", "artifact.intact") == "inconclusive"
    merge = next(build.id for build in plan.builds if build.step == MERGE)
    bad = [replace(m, values={**m.values, "tier0": ["NaN"]}) if m.values["id"] == merge else m for m in builds(plan)]
    assert outcome(decide(plan, bad, {}), "int8", "artifact.intact") == "rejected", "whose parent is damaged"


def test_where_nothing_was_built_no_weights_are_said_to_be_whole() -> None:
    plan = plan_of("merged")
    bare = replace(plan.recipe, variants={**plan.recipe.variants, "cut": Variant("cut", (), EAGER, (CAP,))})
    capped = planning.plan(bare, {"base": "b", "adapter": "a", "calibration": ""}, {})
    said = verdict(decide(capped, asked(cut={}), {}), "cut", "artifact.intact")
    assert said.outcome == "accepted" and "weights" not in said.reason
    assert "weights" in verdict(decide(plan, builds(plan), {}), "merged", "artifact.intact").reason


@pytest.mark.parametrize(("kept", "expected"), [(0.09, "rejected"), (0.11, "accepted")])
def test_less_than_a_tenth_of_the_adapter_is_none(kept: float, expected: str) -> None:
    plan = plan_of("merged")
    found = builds(plan) + asked(merged=rows(*range(60), shift=10.0, kept=10 * kept))
    assert outcome(decide(plan, found, {}), "merged", "artifact.intact") == expected


def test_an_adapter_that_may_be_there_is_not_said_to_be_gone() -> None:
    plan = plan_of("merged")
    uneven = rows(*range(0, 60, 2), shift=10.0, kept=0.0) | rows(*range(1, 60, 2), shift=10.0, kept=1.8)
    decision = decide(plan, builds(plan) + asked(merged=uneven), {})  # 7 to 11 %
    assert outcome(decision, "merged", "artifact.intact") == "accepted"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [*((why, "not judged") for why in ("missing library", "missing environment", "refused")), ("killed", "rejected")],
)
def test_a_variant_that_was_not_tried_is_not_judged(reason: str, expected: Outcome) -> None:
    plan = plan_of("merged")
    died = {"stage": "build", "reason": reason, "detail": "why", "hint": ""}
    decision = decide(plan, [*whole(plan, {"merged": 0.5}), Measurement("failure", "merged", values=died)], {})
    (only,) = of(decision, "merged").verdicts
    assert (only.rule, only.outcome) == ("artifact.runs", expected)
    assert reason in only.reason and "why" in only.reason and "build" in only.reason
