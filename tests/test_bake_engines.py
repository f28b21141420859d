"""Engines that start from a baked prompt: the tokens are those of the live adapter, whatever stands in the batch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_prompts import KINDS, bake, make_prompt

from peftopt import plugins
from peftopt.engines import compiled, continuous, eager
from peftopt.errors import BadInput
from peftopt.records import Model

TOKENS = 12
PROMPTS = [[5, 9, 77, 30], [8, 8, 100, 41, 33, 200, 12], [7], [9, 4, 4, 250, 16, 18, 3, 5, 99]]
VIRTUAL = 5


@dataclass(frozen=True)
class Prompt:
    """An adapter, what it was baked to, and what the live one answers to each of PROMPTS alone."""

    live: Path
    baked: Path
    answers: list[list[int]]


@pytest.fixture(scope="module")
def prompts(tiny_base_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prompt]:
    """One of each kind, and a second p-tuning."""
    home, made = tmp_path_factory.mktemp("prompts"), {}
    for name, kind, tokens in [*((kind, kind, VIRTUAL) for kind in KINDS), ("other", "P_TUNING", 11)]:
        live = make_prompt(tiny_base_fp32, home / "live" / name, kind, tokens, seed=len(made))
        made[name] = Prompt(live, bake(tiny_base_fp32, live, home / name), alone(tiny_base_fp32, live))
    plain = alone(tiny_base_fp32, None)
    assert all(prompt.answers != plain for prompt in made.values())
    assert made["other"].answers != made["P_TUNING"].answers
    return made


def alone(base: Path, folder: Path | None) -> list[list[int]]:
    """What PEFT's live adapter, or the base, answers to each prompt alone."""
    engine = eager.open(Model(str(base), (str(folder),) if folder else ()), eager.Params("cpu"))
    answers = [engine.generate([prompt], TOKENS, False)[0].tokens for prompt in PROMPTS]
    engine.close()
    return answers


def tokens(engine: Any, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [answer.tokens for answer in engine.generate(rows, TOKENS, False)]


def model(base: Path, prompt: Prompt) -> Model:
    return Model(str(base), (str(prompt.baked),))


# ---- compiled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", ["16, 32", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_engine_answers_as_the_live_adapter(
    kind: str, buckets: str, prompts: dict[str, Prompt], tiny_base_fp32: Path
) -> None:
    params = compiled.Params(fullgraph=False, cache_len=64, prompt_buckets=buckets)
    engine = compiled.Compiled(model(tiny_base_fp32, prompts[kind]), params, backend="eager")
    expected = prompts[kind].answers
    assert tokens(engine, PROMPTS) == expected, "padded on the left to the longest, and on the right to the bucket"
    assert [tokens(engine, [row])[0] for row in PROMPTS] == expected
    assert tokens(engine, PROMPTS * 2) == expected * 2
    assert engine.facts()["uncompiled"] == engine.facts()["eager_prompts"] == 0
    engine.close()


def test_inductor_takes_the_prompt_and_the_step_after_virtual_tokens(
    prompts: dict[str, Prompt], tiny_base_fp32: Path
) -> None:
    engine = compiled.open(
        model(tiny_base_fp32, prompts["P_TUNING"]), compiled.Params(cache_len=64, prompt_buckets="16")
    )
    assert tokens(engine, PROMPTS) == prompts["P_TUNING"].answers
    assert engine.facts()["uncompiled"] == engine.facts()["eager_prompts"] == 0
    engine.close()


def test_the_virtual_tokens_count_for_the_length_of_the_cache(prompts: dict[str, Prompt], tiny_base_fp32: Path) -> None:
    longest = max(map(len, PROMPTS)) + TOKENS
    engines = {
        room: compiled.Compiled(
            model(tiny_base_fp32, prompts["P_TUNING"]),
            compiled.Params(fullgraph=False, cache_len=room, prompt_buckets="9"),
            backend="eager",
        )
        for room in (longest + VIRTUAL, longest + VIRTUAL - 1)
    }
    assert all(tokens(engine, PROMPTS) == prompts["P_TUNING"].answers for engine in engines.values())
    assert [engine.facts()["uncompiled"] for engine in engines.values()] == [0, 1]


def test_compiled_scores_are_those_of_the_live_adapter(prompts: dict[str, Prompt], tiny_base_fp32: Path) -> None:
    same = [5, 9, 77, 30]
    rows, answers = [[*same, *row] for row in PROMPTS], [[3, 9, 41], [7], [200, 14], [5, 6, 7, 8]]
    live = eager.open(Model(str(tiny_base_fp32), (str(prompts["P_TUNING"].live),)), eager.Params("cpu"))
    expected = [live.score([row], [answer])[0] for row, answer in zip(rows, answers, strict=True)]
    for buckets in ("16", "none"):
        params = compiled.Params(fullgraph=False, cache_len=64, prompt_buckets=buckets)
        engine = compiled.Compiled(model(tiny_base_fp32, prompts["P_TUNING"]), params, backend="eager")
        for ours, theirs in zip(engine.score(rows, answers), expected, strict=True):
            assert ours.best == theirs.best and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        with engine.without_adapters():
            plain = engine.score(rows[:1], answers[:1])[0].logprobs
        base = eager.open(Model(str(tiny_base_fp32)), eager.Params("cpu"))
        assert plain == pytest.approx(base.score(rows[:1], answers[:1])[0].logprobs, abs=1e-4)
        assert plain != pytest.approx(expected[0].logprobs, abs=1e-2)


# ---- continuous --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_continuous_batching_start_after_the_virtual_tokens(
    kind: str, prompts: dict[str, Prompt], tiny_base_fp32: Path
) -> None:
    params = continuous.Params(cache_tokens=512, block=4, step_tokens=8)  # prompts in pieces, pages that are not whole
    engine = continuous.open(model(tiny_base_fp32, prompts[kind]), params)
    try:
        assert tokens(engine, PROMPTS * 2) == prompts[kind].answers * 2
        assert tokens(engine, PROMPTS[:1]) == prompts[kind].answers[:1]
    finally:
        engine.close()


def test_a_full_cache_lets_rows_wait_and_start_again(prompts: dict[str, Prompt], tiny_base_fp32: Path) -> None:
    params = continuous.Params(cache_tokens=40, block=4, step_tokens=16)
    engine = continuous.open(model(tiny_base_fp32, prompts["other"]), params)
    try:
        assert tokens(engine, PROMPTS) == prompts["other"].answers
        with pytest.raises(BadInput, match="does not fit"):
            engine.generate([[5] * 20], TOKENS, False)
    finally:
        engine.close()


def test_two_engines_of_one_process_keep_their_prompts_apart(prompts: dict[str, Prompt], tiny_base_fp32: Path) -> None:
    names = ("P_TUNING", "other")
    engines = [continuous.open(model(tiny_base_fp32, prompts[name]), continuous.Params(block=4)) for name in names]
    try:
        for _ in range(2):
            for name, engine in zip(names, engines, strict=True):
                assert tokens(engine, PROMPTS) == prompts[name].answers
    finally:
        for engine in engines:
            engine.close()


def test_pages_are_not_shared_after_a_baked_prompt(prompts: dict[str, Prompt], tiny_base_fp32: Path) -> None:
    with pytest.raises(BadInput, match="cannot share pages"):
        continuous.open(model(tiny_base_fp32, prompts["other"]), continuous.Params(prefix_sharing=True))


# ---- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compiled", "continuous"])
def test_a_live_prompt_method_is_refused_with_what_to_do(
    name: str, prompts: dict[str, Prompt], tiny_base_fp32: Path
) -> None:
    plugin = plugins.module("engine", name)
    with pytest.raises(BadInput) as refused:
        plugin.open(Model(str(tiny_base_fp32), (str(prompts["P_TUNING"].live),)), plugin.Params())
    assert "peftopt bake" in refused.value.hint


@pytest.mark.parametrize("name", ["compiled", "continuous"])
def test_closing_frees_the_prompt(name: str, prompts: dict[str, Prompt], tiny_base_fp32: Path) -> None:
    plugin = plugins.module("engine", name)
    engine = plugin.open(model(tiny_base_fp32, prompts["P_TUNING"]), plugin.Params())
    if name == "continuous":
        tokens(engine, PROMPTS[:1])
    kept = weakref.ref(engine._prefix.layers[0][0])
    engine.close()
    del engine
    gc.collect()
    assert kept() is None
