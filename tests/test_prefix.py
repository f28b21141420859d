"""Prefixes: what is found of earlier prompts, what it takes, and that answers stay the same, whoever asked before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.architectures import KINDS, make
from helpers.asked import ids
from helpers.tiny_models import make_lora, make_prompt
from hypothesis import given
from hypothesis import strategies as st

from peftopt import plugins
from peftopt.corpus import Row
from peftopt.engines._prefix import Reuse, Store, chain, name_of, repeated
from peftopt.errors import BadInput
from peftopt.probes import quality, speed
from peftopt.records import Model

BLOCK = 2
prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12)
bounds = st.integers(0, 12)


def asked(store: Store[tuple[int, ...]], prompt: Sequence[int], whose: str = "a") -> int:
    """Ask for a prompt and leave it, as an engine does: how many of its tokens were there. A block is its tokens."""
    keys = chain(whose, prompt, BLOCK)
    found = store.match(keys, {name_of(prompt)})
    blocks = [tuple(prompt[n * BLOCK : (n + 1) * BLOCK]) for n in range(len(keys))]
    assert found == blocks[: len(found)], "what is found is what the prompt begins with"
    store.put(keys, name_of(prompt), lambda n: blocks[n], 1)
    return len(found) * BLOCK


# ---- what is found -----------------------------------------------------------------------------


@given(prompts, bounds)
def test_what_is_found_is_a_prefix_and_no_more_is_held_than_may_be(several: list[list[int]], bound: int) -> None:
    store: Store[tuple[int, ...]] = Store(bound)
    for prompt in several:
        assert asked(store, prompt) < len(prompt)
        assert store.nbytes == len(store) <= bound


@given(prompts)
def test_without_a_bound_it_finds_what_any_other_prompt_began_with(several: list[list[int]]) -> None:
    store: Store[tuple[int, ...]] = Store(10**6)
    before: list[list[int]] = []
    for prompt in several:
        shared = 0
        for other in (o for o in before if o != prompt):
            same = next((n for n, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), len(other))
            # of a prompt that is left, the last token is in no block
            shared = max(shared, min(same, len(other) - 1, len(prompt) - 1) // BLOCK * BLOCK)
        assert asked(store, prompt) == shared
        before.append(prompt)


@given(prompts, st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_what_others_weights_or_adapters_left_is_not_found(several: list[list[int]], prompt: list[int]) -> None:
    store: Store[tuple[int, ...]] = Store(10**6)
    for other in [*several, [*prompt, 0]]:
        asked(store, other, "a")
    assert asked(store, prompt, "b") == 0


@given(prompts, st.integers(1, 6))
def test_what_was_asked_for_longest_ago_goes_first(several: list[list[int]], bound: int) -> None:
    store: Store[tuple[int, ...]] = Store(bound)
    for prompt in several:
        asked(store, prompt)
        keys = chain("a", prompt, BLOCK)[:bound]
        assert len(store.match(keys, ())) == len(keys), "the last prompt is held, as far as it fits"


def test_a_prefix_that_is_asked_for_outlives_what_is_not() -> None:
    store: Store[tuple[int, ...]] = Store(4)
    system = [9, 9, 9, 9]
    asked(store, [*system, 1, 1, 1])
    for n in range(2, 8):
        assert asked(store, [*system, n, n, n]) == len(system)
    assert len(store) == 4
    assert asked(store, [*system, 1, 1, 1]) == len(system), "its own tail has gone"


def test_a_prompt_that_comes_again_does_not_find_what_it_alone_left() -> None:
    store: Store[tuple[int, ...]] = Store(100)
    prompt = [1, 1, 2, 2, 3, 3, 4]
    assert [asked(store, prompt) for _ in range(3)] == [0, 0, 0]
    asked(store, [1, 1, 5, 5])
    assert asked(store, prompt) == 2


@given(prompts)
def test_the_share_that_repeats_does_not_depend_on_repetitions(several: list[list[int]]) -> None:
    share = repeated(several)
    assert 0 <= share < 1
    assert repeated([*several, *several]) == share


def test_the_share_that_repeats_is_of_tokens() -> None:
    assert repeated([[1, 2, 3, 4], [1, 2, 3, 5], [7, 2, 3, 4]]) == 3 / 12
    assert repeated([]) == repeated([[1, 2]]) == repeated([[1, 2], [1, 2]]) == 0


@pytest.mark.parametrize("wrong", [{"block": 0}, {"memory_gb": 0.0}, {"memory_gb": float("nan")}])
def test_a_store_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Reuse(**wrong)


# ---- engines -----------------------------------------------------------------------------------


def opened(name: str, model: Model, reuse: Reuse | None, **params: Any) -> Any:
    engine = plugins.module("engine", name)
    if name == "compiled":
        settings = engine.Params(prompt_buckets="none", fullgraph=False, **params)
        return engine.Compiled(model, settings, backend="eager", reuse=reuse)
    return engine.open(model, engine.Params(**params), **({"reuse": reuse} if reuse else {}))


SYSTEM = "You answer in one line. " * 8


def messages(question: str) -> tuple[dict[str, str], ...]:
    return {"role": "system", "content": SYSTEM}, {"role": "user", "content": question}


def shared(engine: Any, *questions: str) -> list[list[int]]:
    """Prompts that begin alike."""
    return [
        engine.encode([{"role": "system", "content": SYSTEM}, {"role": "user", "content": q}])[0] for q in questions
    ]


QUESTIONS = ("How many stars?", "Where does the fox jump to, and why does it not stay here?", "Who?")


@pytest.mark.parametrize("name", ["eager", "compiled", "continuous"])
@pytest.mark.parametrize("lora", [False, True])
def test_answers_are_those_without_it(name: str, lora: bool, tiny_base_fp32: Path, tiny_lora: Path) -> None:
    model = Model(str(tiny_base_fp32), (str(tiny_lora),) if lora else ())
    plain, reusing = opened(name, model, None), opened(name, model, Reuse(block=8))
    try:
        prompts = shared(plain, *QUESTIONS)
        for together in (prompts[:1], prompts[1:2], prompts[2:], prompts, prompts[1:]):
            wanted = plain.generate(together, 12, False)
            given_ = reusing.generate(together, 12, False)
            assert [a.tokens for a in given_] == [a.tokens for a in wanted]
            assert not any(a.reused for a in wanted)
    finally:
        plain.close()
        reusing.close()


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_the_second_prompt_starts_after_what_it_shares(name: str, tiny_base_fp32: Path) -> None:
    engine = opened(name, Model(str(tiny_base_fp32)), Reuse(block=8))
    first, second, _ = shared(engine, *QUESTIONS)
    same = next(n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert [engine.generate([prompt], 2, False)[0].reused for prompt in (first, first, second, first)] == [
        0,
        0,
        same // 8 * 8,
        same // 8 * 8,
    ]
    held = engine.facts()["prefix_bytes"]
    assert held > 0
    engine.generate([second], 2, False)
    assert engine.facts()["prefix_bytes"] == held
    engine.close()


def test_what_is_held_stays_below_its_bound(tiny_base_fp32: Path) -> None:
    reuse = Reuse(block=8, memory_gb=64 * 2**10 / 2**30)
    engine = opened("eager", Model(str(tiny_base_fp32)), reuse)
    for n in range(6):
        engine.generate([ids(engine)[2] * 3 + [n + 3] * 20], 1, False)
        assert 0 < engine.facts()["prefix_bytes"] <= reuse.memory_bytes
    engine.close()


def test_the_base_alone_is_not_given_the_adapters_prefix(tiny_base_fp32: Path, tiny_lora: Path) -> None:
    base = opened("eager", Model(str(tiny_base_fp32)), None)
    engine = opened("eager", Model(str(tiny_base_fp32), (str(tiny_lora),)), Reuse(block=8))
    first, second, third = shared(engine, *QUESTIONS)
    adapted = engine.generate([first], 12, False)[0].tokens
    with engine.without_adapters():
        (bare,) = engine.generate([second], 12, False)
    assert bare.reused == 0 and bare.tokens == base.generate([second], 12, False)[0].tokens
    again = engine.generate([third], 12, False)[0]
    assert again.reused > 0 and engine.generate([first], 12, False)[0].tokens == adapted
    base.close()
    engine.close()


def test_another_adapter_is_not_given_the_prefix_of_the_one_before(
    tiny_base_fp32: Path, tiny_lora: Path, other_adapter: Path
) -> None:
    first, other = (Model(str(tiny_base_fp32), (str(a),)) for a in (tiny_lora, other_adapter))
    engine, fresh = opened("compiled", first, Reuse(block=8)), opened("eager", other, None)
    prompts = shared(engine, *QUESTIONS)
    engine.generate([prompts[0]], 2, False)
    engine.switch(str(other_adapter))
    (answer,) = engine.generate([prompts[1]], 12, False)
    assert answer.reused == 0 and answer.tokens == fresh.generate([prompts[1]], 12, False)[0].tokens
    assert engine.generate([prompts[2]], 12, False)[0].reused > 0
    engine.close()
    fresh.close()


@pytest.fixture(scope="module")
def other_adapter(tiny_base_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the tiny adapter, with other weights."""
    folder = tmp_path_factory.mktemp("other") / "adapter"
    make_lora(tiny_base_fp32, folder, std=0.3)
    return folder


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_architecture_answers_the_same_or_is_refused_by_name(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    model = Model(str(make(tmp_path / kind, kind, tiny_base, "float32")))
    plain = opened("eager", model, None)
    try:
        engine = opened("eager", model, Reuse(block=8))
    except BadInput as refused:
        assert "sliding window" in str(refused) or "keeps" in str(refused) or "rotary" in str(refused)
        return
    prompts = [[*range(3, 30), n, *range(40, 40 + n)] for n in (5, 9, 3)]
    for together in (prompts[:1], prompts[1:], prompts):
        wanted = plain.generate(together, 12, False)
        assert [a.tokens for a in engine.generate(together, 12, False)] == [a.tokens for a in wanted]
    assert engine.generate(prompts[:1], 1, False)[0].reused == 24


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_what_comes_after_a_baked_prompt_is_reused_too(name: str, tiny_base_fp32: Path, tmp_path: Path) -> None:
    from peftopt.transforms import bake

    live = make_prompt(tiny_base_fp32, tmp_path / "live", "p-mlp", 5)
    baked = bake.transform(
        Model(str(tiny_base_fp32), (str(live),)), bake.Params(certify="own"), tmp_path / "baked", [], 0
    )
    plain, engine = opened(name, baked, None), opened(name, baked, Reuse(block=8))
    first, second, third = shared(engine, *QUESTIONS)
    for together in ([first], [second], [second, third], [first, second, third]):
        wanted = [answer.tokens for answer in plain.generate(together, 12, False)]
        assert [answer.tokens for answer in engine.generate(together, 12, False)] == wanted
    assert engine.generate([third], 1, False)[0].reused > 0
    plain.close()
    engine.close()


def test_a_live_prompt_is_refused(tiny_base_fp32: Path, tmp_path: Path) -> None:
    live = make_prompt(tiny_base_fp32, tmp_path / "live", "p-mlp", 5)
    with pytest.raises(BadInput) as refused:
        opened("eager", Model(str(tiny_base_fp32), (str(live),)), Reuse())
    assert "live prompt method" in str(refused.value)


def test_servers_take_it_by_their_own_flags() -> None:
    from peftopt.engines import llamacpp_server, vllm

    reuse = Reuse(memory_gb=2.0)
    assert ("--no-enable-prefix-caching",) in vllm.measured(vllm.Params())
    assert ("--enable-prefix-caching",) in vllm.measured(vllm.reusing(vllm.Params(), reuse))
    plain = llamacpp_server.measured(llamacpp_server.Params())
    assert ("--no-cache-prompt",) in plain and ("--cache-ram", "0") in plain
    reusing = llamacpp_server.measured(llamacpp_server.reusing(llamacpp_server.Params(), reuse))
    assert ("--cache-prompt",) in reusing and ("--cache-ram", "2048") in reusing


@pytest.mark.parametrize("reuses", [False, True])
def test_vllm_is_asked_to_tell_what_it_reused_where_it_reuses(reuses: bool, tiny_base: Path) -> None:
    from peftopt.engines import vllm

    words, _ = vllm.command(Model(str(tiny_base)), vllm.Params(prefix_caching=reuses), 8123, ())
    assert ("--enable-prompt-tokens-details" in words) is reuses


# ---- measured by a run -------------------------------------------------------------------------


def test_a_turn_tells_how_much_of_the_prompts_was_there(tiny_base_fp32: Path) -> None:
    engine = opened("eager", Model(str(tiny_base_fp32)), Reuse(block=8))
    rows = [Row(q, messages(q), "") for q in QUESTIONS]
    told = speed.turn(engine, [[row] for row in rows], 2, 1)
    assert told[0].reused == 0 and all(request.reused for request in told[1:])
    again = speed.turn(engine, [[rows[2]]], 2, 0)
    assert again[0].reused == told[2].reused, "its own tail is not found when it is asked again"
    engine.close()
    assert speed.turn(opened("eager", Model(str(tiny_base_fp32)), None), [[rows[0]]], 1, 0)[0].reused is None


def test_answers_are_checked_on_what_is_generated(tiny_base_fp32: Path) -> None:
    engine = opened("eager", Model(str(tiny_base_fp32)), Reuse(block=8))
    asked_: list[int] = []
    generate = engine.generate

    def counted(*given_: Any, **settings: Any) -> Any:
        answers = generate(*given_, **settings)
        asked_.extend(answer.reused for answer in answers)
        return answers

    engine.generate = counted
    rows = [Row(q, messages(q), "5") for q in QUESTIONS]
    quality.ask(engine, rows, None, 4, 1)
    assert len(asked_) == len(rows) and asked_[-1] > 0
    engine.close()
