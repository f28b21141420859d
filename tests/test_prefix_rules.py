"""When reusing prefixes is worth it: the rules of the row `prefix`, what they say, and what a recipe is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.chains import check_refused, recipe
from helpers.records import PREFIX, decide, evidence_of, of, outcome, plan_of, quality, verdict, whole

from peftopt import stats
from peftopt.decision import stopping
from peftopt.decision.rules.parents import parent_of
from peftopt.errors import BadInput
from peftopt.records import Json, Measurement, Recipe, Step
from peftopt.report import table
from peftopt.runner import preflight

PLAN = plan_of("merged", "compiled", "reusing")


def told(found: Sequence[Measurement], reused: int) -> list[Measurement]:
    """The same with what each request of the reusing variant found of its 100 prompt tokens."""
    changed = []
    for each in found:
        values: dict[str, Json] = dict(each.values)
        if each.variant == "reusing" and each.probe == "speed":
            values["requests"] = [{**r, "prompt_tokens": 100, "reused": reused} for r in values["requests"]]
        changed.append(replace(each, values=values))
    return changed


def run(ratio: float, reused: int = 61, **rest: Json) -> list[Measurement]:
    """A run in which the variant takes so many times the compiled one's time."""
    return told(whole(PLAN, {"merged": 0.8, "compiled": 0.5, "reusing": 0.5 * ratio}, **rest), reused)


def test_it_is_compared_with_the_variant_without_it() -> None:
    assert parent_of(PLAN.recipe, PLAN.recipe.variants["reusing"], PREFIX) == "compiled"


@pytest.mark.parametrize(("ratio", "expected"), [(0.6, "accepted"), (0.94, "accepted"), (0.96, "rejected")])
def test_the_gain_has_to_be_more_than_five_percent(ratio: float, expected: str) -> None:
    decision = decide(PLAN, run(ratio, noise=0.002), {})
    assert outcome(decision, "reusing", "prefix.gain") == expected
    assert decision.chosen == ("reusing" if expected == "accepted" else "compiled")


def test_the_rule_and_the_table_say_how_much_was_reused() -> None:
    decision = decide(PLAN, run(0.6), {})
    assert "61 % of prompt tokens were reused" in verdict(decision, "reusing", "prefix.gain").reason
    assert of(decision, "reusing").figures["reused@chat"].estimate == pytest.approx(0.61)
    assert "reused@chat" not in of(decision, "compiled").figures
    assert "reused" in {name.partition("@")[0] for name in table.metrics(decision)}


def test_the_memory_it_takes_is_told() -> None:
    facts = Measurement("engine", "reusing", "", 1, {"prefix_bytes": 35_000_000})
    decision = decide(PLAN, [*run(0.6), facts], {})
    assert of(decision, "reusing").figures["prefix_bytes"].estimate == 35e6


def test_answers_that_part_from_those_without_it_are_turned_down() -> None:
    parted: dict[str, Any] = {f"p{n}": {"tokens": [7, *range(29)], "agree": 20} for n in range(0, 400, 2)}
    found = [m for m in run(0.6) if not (m.probe == "quality" and m.variant == "reusing")]
    assert outcome(decide(PLAN, [*found, *quality("reusing", **parted)], {}), "reusing", "prefix.parity") == "rejected"
    assert outcome(decide(PLAN, run(0.6), {}), "reusing", "prefix.parity") == "accepted"


def test_nothing_reused_is_told_as_nothing() -> None:
    nothing = evidence_of(PLAN, run(1.0, reused=0)).reused("reusing", "chat")
    assert nothing and (nothing.estimate, nothing.low, nothing.high) == (0, 0, 0)
    assert evidence_of(PLAN, run(1.0)).reused("compiled", "chat") is None


def test_the_share_that_is_reused_is_of_all_tokens_of_prompts_that_tell() -> None:
    """A long prompt weighs more than a short one; one without a count, or without a token, says nothing."""
    found = [(0, 10), (90, 100), (None, 1000), (7, 0), (7, None), (30, 40)]
    (turn, *_) = (m for m in run(1.0) if (m.probe, m.variant) == ("speed", "reusing"))
    timed = turn.values["requests"][1]
    requests = [{**timed, "reused": reused, "prompt_tokens": tokens} for reused, tokens in found]
    requests.append({**timed, "reused": 100, "prompt_tokens": 100, "warmup": True})
    evidence = evidence_of(PLAN, [replace(turn, values={**turn.values, "requests": requests})])
    for level in (0.9, 0.95):
        expected = stats.ratio_of_means([0, 90, 30], [10, 100, 40], level)
        assert evidence.reused("reusing", "chat", level) == expected
    assert expected.estimate == 0.8 and evidence.reused("reusing", "chat") == expected
    assert evidence.reused("reusing", "bulk") is None


def test_it_answers_no_more_prompts_than_rules_take() -> None:
    eager = replace(PLAN.recipe.variants["merged"], name="other", policies=(PREFIX,))
    assert stopping.answers(PLAN.recipe, eager) is not None


# ---- recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "why", "hint"),
    [
        ("[merge, prefix, {engine: openvino}]", "openvino does not reuse prefixes", "compiled, continuous, eager"),
        ("[merge, prefix, prefix]", "reuses prefixes twice", "keep one"),
        ("[merge, speculate, prefix, {engine: compiled}]", "does not speculate and reuse prefixes", "remove one"),
        ("[merge, {prefix: {block: 0}}]", "block must be 1 or more", ""),
    ],
)
def test_what_an_engine_cannot_reuse_is_refused_by_name(chain: str, why: str, hint: str) -> None:
    check_refused(why, hint, chain, 8)


def test_servers_do_both() -> None:
    found = recipe("[merge, speculate, prefix, {engine: vllm}]", batch=8)
    assert [step.plugin for step in found.variants["tried"].policies] == ["speculate", "prefix"]


def asking(base: Path, folder: Path, shared: str, **load: Any) -> Recipe:
    """The recipe with a workload of eight prompts that begin alike."""
    rows = [{"id": str(n), "prompt": f"{shared}{n} stars and {n * n} more of another kind"} for n in range(8)]
    prompts = folder / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workload = replace(PLAN.recipe.workloads["chat"], prompts=str(prompts), **load)
    return replace(PLAN.recipe, base=str(base), adapter=str(base), workloads={"chat": workload})


@pytest.mark.parametrize("load", [{}, {"users": 4}, {"rate": 2.0}])
@pytest.mark.parametrize(("shared", "expected"), [("Be brief. " * 40, True), ("", False)])
def test_how_much_of_a_workload_repeats_is_told(
    shared: str, expected: bool, load: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    lines = preflight.repeats(asking(tiny_base, tmp_path, shared, **load))
    assert bool(lines) == expected
    if expected:
        assert "workload chat: " in lines[0] and "of prompt tokens repeat" in lines[0]


@pytest.mark.parametrize(
    ("engine", "load", "expected"),
    [
        ("vllm", {"users": 2, "requests": 3}, False),
        ("vllm", {"users": 2, "requests": 4}, True),
        ("llamacpp_server", {"batch": 2}, True),
        ("llamacpp_server", {}, False),
        ("eager", {"batch": 2}, False),
    ],
)
def test_a_server_that_is_asked_a_prompt_again_shows_no_more_than_an_upper_bound(
    engine: str, load: dict[str, Any], expected: bool, tiny_base: Path, tmp_path: Path
) -> None:
    """With a warm-up and three requests a turn, two blocks of a launch ask eight prompts one by one."""
    plan = asking(tiny_base, tmp_path, "", **load)
    reusing = replace(plan.variants["reusing"], engine=Step(engine, "engine", ""))
    lines = preflight.warnings(replace(plan, variants={**plan.variants, "reusing": reusing}))
    assert any("upper bound" in line and "reusing" in line for line in lines) is expected
    plain = replace(reusing, policies=())
    lines = preflight.warnings(replace(plan, variants={**plan.variants, "reusing": plain}))
    assert not any("upper bound" in line for line in lines)


# ---- models that cannot ------------------------------------------------------------------------


def test_an_adapter_has_keys_of_its_own(tiny_base: Path, tiny_lora: Path) -> None:
    from peftopt.engines._prefix import whose
    from peftopt.records import Model

    plain, adapted = Model(str(tiny_base)), Model(str(tiny_base), (str(tiny_lora),))
    assert whose(plain, False) != whose(adapted, False)
    assert whose(plain, False) == whose(adapted, bare=True)


@pytest.mark.parametrize("rotary", ["dynamic", "longrope"])
def test_keys_that_depend_on_the_length_are_refused(rotary: str) -> None:
    from helpers.architectures import config

    from peftopt.engines._prefix import check

    check(config("llama"))
    settings = config("llama")
    settings.rope_parameters = {"rope_type": rotary}
    with pytest.raises(BadInput) as refused:
        check(settings)
    assert rotary in str(refused.value)
