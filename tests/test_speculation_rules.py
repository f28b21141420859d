"""When proposing tokens is worth it: the rules of the row `speculate`, where it loses, and what the report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from helpers.chains import check_refused, recipe
from helpers.records import (
    COMPILED,
    SPECULATE,
    decide,
    evidence_of,
    of,
    outcome,
    plan_of,
    quality,
    speed,
    verdict,
    whole,
)

from peftopt.decision import stopping
from peftopt.decision.rules.parents import parent_of
from peftopt.errors import BadRecipe
from peftopt.records import Json, Measurement
from peftopt.report import answers, markdown, table

PLAN = plan_of("merged", "compiled", "speculating")
TOLD = {"steps": 10, "proposed": 40, "accepted": 15}


def steps(found: Sequence[Measurement], **told: int) -> list[Measurement]:
    """The same with what the speculating variant's requests and answers tell of their steps."""
    changed = []
    for each in found:
        values: dict[str, Json] = dict(each.values)
        if each.variant == "speculating" and each.probe == "speed":
            values["requests"] = [{**request, **told} for request in values["requests"]]
        elif each.variant == "speculating" and each.probe == "quality":
            values |= told
        changed.append(replace(each, values=values))
    return changed


def run(speculating: float, **rest: Json) -> list[Measurement]:
    """A run in which the variant takes so many times the compiled one's time."""
    return steps(whole(PLAN, {"merged": 0.8, "compiled": 0.5, "speculating": 0.5 * speculating}, **rest), **TOLD)


# ---- the rules ---------------------------------------------------------------------------------


def test_it_is_compared_with_the_variant_without_it_and_that_with_its_own_parent() -> None:
    variants = PLAN.recipe.variants
    assert parent_of(PLAN.recipe, variants["speculating"], SPECULATE) == "compiled"
    assert parent_of(PLAN.recipe, variants["compiled"], COMPILED) == "merged"


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.6, "accepted"), (0.94, "accepted"), (0.96, "rejected"), (1.0, "rejected")]
)
def test_the_gain_has_to_be_more_than_five_percent(ratio: float, expected: str) -> None:
    decision = decide(PLAN, run(ratio, noise=0.002), {})
    assert outcome(decision, "speculating", "speculate.gain") == expected
    assert verdict(decision, "speculating", "speculate.gain").against == "compiled"
    assert decision.chosen == ("speculating" if expected == "accepted" else "compiled")


def test_the_rule_says_how_many_tokens_a_step_gave_and_where_it_loses() -> None:
    def bulk(ratio: float) -> list[Measurement]:
        slow = speed(PLAN, {"merged": 0.8, "compiled": 0.5, "speculating": 0.5 * ratio}, 20)
        return [replace(each, workload="bulk") for each in slow]

    def said(ratio: float) -> str:
        return verdict(decide(PLAN, [*run(0.6), *bulk(ratio)], {}), "speculating", "speculate.gain").reason

    assert "2.50 tokens a step" in said(1.2) and "it loses on bulk: 1.19x (" in said(1.2)
    assert "loses" not in said(0.9)
    assert "tokens a step" not in verdict(decide(PLAN, run(0.6), {}), "compiled", "compile.gain").reason


def test_answers_that_part_from_those_without_it_are_turned_down() -> None:
    parted: dict[str, Any] = {f"p{n}": {"tokens": [7, *range(29)], "agree": 20} for n in range(0, 400, 2)}
    found = [m for m in run(0.6) if not (m.probe == "quality" and m.variant == "speculating")]
    decision = decide(PLAN, [*found, *quality("speculating", **parted)], {})
    assert outcome(decision, "speculating", "speculate.parity") == "rejected"
    assert verdict(decision, "speculating", "speculate.parity").against == "compiled"
    assert outcome(decide(PLAN, run(0.6), {}), "speculating", "speculate.parity") == "accepted"


def test_it_answers_no_more_prompts_than_rules_take_on_any_engine() -> None:
    eager = replace(PLAN.recipe.variants["merged"], name="looking", policies=(SPECULATE,))
    assert stopping.answers(PLAN.recipe, PLAN.recipe.variants["merged"]) is None
    assert stopping.answers(PLAN.recipe, eager) is not None


# ---- the report --------------------------------------------------------------------------------


def test_the_report_shows_tokens_a_step_by_workload_and_by_slice() -> None:
    tagged: dict[str, Any] = {f"p{n}": {"slices": ["copies"], **TOLD, "accepted": 30} for n in range(100)}
    tagged |= {f"p{n}": {"slices": ["free"], **TOLD, "accepted": 0} for n in range(100, 400)}
    found = [m for m in run(0.6) if not (m.probe == "quality" and m.variant == "speculating")]
    found += quality("speculating", **tagged)
    decision, evidence = decide(PLAN, found, {}), evidence_of(PLAN, found)
    header, body = answers.steps(decision, evidence)
    assert header == ["slice", "speculating"]
    assert body == [["all", "1.75 (400 answers)"], ["copies", "4.00 (100 answers)"], ["free", "1.00 (300 answers)"]]
    assert "4.00 (100 answers)" in markdown.part(decision, evidence, "steps")
    figures = of(decision, "speculating").figures
    assert figures["acceptance_length@chat"].estimate == pytest.approx(2.5)
    assert figures["acceptance@chat"].estimate == pytest.approx(15 / 40)
    assert "acceptance_length@chat" not in of(decision, "compiled").figures
    assert {"acceptance_length", "acceptance"} <= {name.partition("@")[0] for name in table.metrics(decision)}


def test_a_report_without_proposals_has_no_such_part() -> None:
    plan = plan_of("merged")
    found = whole(plan, {"merged": 0.8})
    decision, evidence = decide(plan, found, {}), evidence_of(plan, found)
    assert answers.steps(decision, evidence)[1] == []
    assert "Tokens a step" not in markdown.render(decision, evidence)


# ---- the recipe --------------------------------------------------------------------------------


def test_a_step_of_the_chain_asks_for_it_before_or_after_the_engine() -> None:
    for chain in ("[merge, {speculate: {tokens: 6}}, {engine: compiled}]", "[merge, {engine: compiled}, speculate]"):
        variant = recipe(chain).variants["tried"]
        (step,) = variant.policies
        assert step.technique == "speculate" and step.params["tokens"] in (4, 6)
        assert parent_of(recipe(chain, others="plain: [merge, {engine: compiled}], "), variant, step) == "plain"
    rules = {f"{r.technique}.{r.name}": r.limit for r in recipe("[merge, speculate]").rules}
    assert rules["speculate.gain"] == 0.05 and rules["speculate.parity"] == 0.01


@pytest.mark.parametrize(
    ("chain", "batch", "why", "hint"),
    [
        ("[merge, speculate, {engine: continuous}]", 1, "continuous does not speculate", "compiled, eager"),
        ("[merge, speculate]", 8, "eager speculates for one prompt at a time, and chat has a batch", "compiled"),
        ("[merge, {speculate: {shortest: 2}}]", 1, "eager looks up n-grams down to one token, not 2", "compiled"),
        ("[merge, {speculate: {answers: true}}]", 1, "speculate needs calibration texts", "calibration"),
        ("[merge, speculate, speculate]", 1, "speculates twice", "keep one"),
        ("[merge, {speculate: {tokens: 0}}]", 1, "tokens must be 1 or more", ""),
    ],
)
def test_what_an_engine_cannot_look_up_is_refused_by_name(chain: str, batch: int, why: str, hint: str) -> None:
    check_refused(why, hint, chain, batch)


def test_other_answers_need_an_engine_that_looks_them_up() -> None:
    with pytest.raises(BadRecipe) as refused:
        recipe("[merge, {speculate: {answers: true}}]", more="calibration: rows.jsonl")
    ((_, message, hint),) = refused.value.problems
    assert "eager proposes nothing of other answers" in message and "compiled" in hint
    found = recipe("[merge, {speculate: {answers: true}}, {engine: compiled}]", more="calibration: rows.jsonl")
    assert found.variants["tried"].policies[0].params["answers"] is True
