"""Packing: a batch is answered in parts of prompts of like length: which parts, and when that is worth it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.chains import check_refused, recipe
from helpers.records import PACK, decide, outcome, plan_of, verdict, whole
from hypothesis import given
from hypothesis import strategies as st

from peftopt.decision.rules.parents import parent_of
from peftopt.engines import eager
from peftopt.policies import Policed, pack
from peftopt.records import Model, Plan, Step


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=64), st.integers(1, 256), st.integers(1, 20_000))
def test_every_prompt_is_in_one_part_and_no_part_of_several_exceeds_the_budget(
    lengths: list[int], new_tokens: int, budget: int
) -> None:
    parts = pack.parts(lengths, new_tokens, pack.Params(budget))
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        longest = max(lengths[row] for row in part)
        assert len(part) == 1 or len(part) * (longest + new_tokens) <= budget


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=64), st.integers(1, 256), st.integers(1, 20_000))
def test_prompts_of_a_part_are_neighbours_in_length(lengths: list[int], new_tokens: int, budget: int) -> None:
    parts = pack.parts(lengths, new_tokens, pack.Params(budget))
    for shorter, longer in itertools.pairwise(parts):
        assert max(lengths[row] for row in shorter) <= min(lengths[row] for row in longer)


def test_a_long_prompt_does_not_make_the_short_ones_long() -> None:
    assert pack.parts([100, 2000, 90, 110], 16, pack.Params(2048)) == [[2, 0, 3], [1]]
    assert pack.parts([100, 120, 90, 110], 16, pack.Params(2048)) == [[2, 0, 3, 1]], "nothing is split for nothing"


def test_answers_are_those_of_the_whole_batch_in_its_order(tiny_base_fp32: Path, tiny_lora: Path) -> None:
    engine = eager.open(Model(str(tiny_base_fp32), (str(tiny_lora),)), eager.Params(device="cpu"))
    asked: list[int] = []
    answer = engine.generate

    def counted(prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> Any:
        asked.append(len(prompts))
        return answer(prompts, new_tokens, stop)

    prompts = [[7, 9, 11], [5] * 60, [8, 2], list(range(4, 60)), [30] * 5]
    whole_batch = [generation.tokens for generation in answer(prompts, 12, False)]
    engine.generate = counted  # type: ignore[method-assign]
    packed = Policed(engine, [Step("pack", "policy", "pack", {"tokens": 150})])
    assert [generation.tokens for generation in packed.generate(prompts, 12, False)] == whole_batch
    assert asked == [3, 2]
    engine.close()


# ---- when it is worth it -----------------------------------------------------------------------


def plan(batch: int) -> Plan:
    """One that minimizes the time of a request of so many prompts; bulk has eight."""
    usual = plan_of("merged", "packed")
    workloads = {**usual.recipe.workloads, "chat": replace(usual.recipe.workloads["chat"], batch=batch)}
    return replace(usual, recipe=replace(usual.recipe, workloads=workloads))


@pytest.mark.parametrize(("ratio", "expected"), [(0.6, "accepted"), (0.94, "accepted"), (0.96, "rejected")])
def test_it_has_to_be_faster_than_the_same_variant_without_it(ratio: float, expected: str) -> None:
    run = plan(8)
    assert parent_of(run.recipe, run.recipe.variants["packed"], PACK) == "merged"
    decision = decide(run, whole(run, {"merged": 0.8, "packed": 0.8 * ratio}, noise=0.002), {})
    assert outcome(decision, "packed", "pack.gain") == expected
    assert decision.chosen == ("packed" if expected == "accepted" else "merged")


def test_it_is_judged_where_there_is_a_batch() -> None:
    run = plan(1)
    decision = decide(run, whole(run, {"merged": 0.8, "packed": 0.4}), {})
    assert verdict(decision, "packed", "pack.gain").workload == "bulk"


@pytest.mark.parametrize(
    ("chain", "batch", "why", "hint"),
    [
        ("[merge, pack, {engine: vllm}]", 8, "vllm makes its own batches", "eager"),
        ("[merge, pack, {engine: compiled}]", 8, "of fixed sizes", "eager"),
        ("[merge, pack]", 1, "no workload has one", "batch"),
        ("[merge, pack, pack]", 8, "packs its batches twice", "keep one"),
        ("[merge, {pack: {tokens: 0}}]", 8, "tokens must be 1 or more", ""),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(chain: str, batch: int, why: str, hint: str) -> None:
    check_refused(why, hint, chain, batch)


def test_a_batch_on_an_engine_that_pads_is_packed() -> None:
    assert [step.plugin for step in recipe("[merge, pack]", batch=8).variants["tried"].policies] == ["pack"]
