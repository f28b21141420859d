"""Engines that start from a baked prompt: the tokens are those of the live adapter, whatever stands in the batch."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command, errors
from helpers.gateways import Gateway
from helpers.gateways import serving as gateway_serving
from helpers.our_server import PATIENCE_S, Gate, Running, serving, until
from helpers.tiny_models import make_prompt

from peftopt import plugins
from peftopt.engines import _rows, compiled, continuous, eager
from peftopt.errors import BAD_INPUT, BadInput
from peftopt.records import Model
from peftopt.server.__main__ import main as server_main
from peftopt.transforms import bake

KINDS = ("prompt", "p-mlp", "prefix")
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
    for name, kind, tokens in [*((kind, kind, VIRTUAL) for kind in KINDS), ("other", "p-mlp", 11)]:
        live = make_prompt(tiny_base_fp32, home / "live" / name, kind, tokens)
        of_live = Model(str(tiny_base_fp32), (str(live),))
        (folder,) = bake.transform(of_live, bake.Params(certify="own"), home / name, [], 0).adapters
        made[name] = Prompt(live, Path(folder), alone(tiny_base_fp32, live))
    plain = alone(tiny_base_fp32, None)
    assert all(prompt.answers != plain for prompt in made.values())
    assert made["other"].answers != made["p-mlp"].answers
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


@pytest.mark.parametrize(("buckets", "regions"), [("16", False), ("none", True)])
def test_inductor_takes_the_prompt_and_the_step_after_virtual_tokens(
    buckets: str, regions: bool, prompts: dict[str, Prompt], tiny_base_fp32: Path
) -> None:
    params = compiled.Params(cache_len=64, prompt_buckets=buckets, regions=regions)
    engine = compiled.open(model(tiny_base_fp32, prompts["p-mlp"]), params)
    assert tokens(engine, PROMPTS) == prompts["p-mlp"].answers
    assert engine.facts()["uncompiled"] == engine.facts()["eager_prompts"] == 0
    engine.close()


def test_the_virtual_tokens_count_for_the_length_of_the_cache(prompts: dict[str, Prompt], tiny_base_fp32: Path) -> None:
    longest = max(map(len, PROMPTS)) + TOKENS
    engines = {
        room: compiled.Compiled(
            model(tiny_base_fp32, prompts["p-mlp"]),
            compiled.Params(fullgraph=False, cache_len=room, prompt_buckets="9"),
            backend="eager",
        )
        for room in (longest + VIRTUAL, longest + VIRTUAL - 1)
    }
    assert all(tokens(engine, PROMPTS) == prompts["p-mlp"].answers for engine in engines.values())
    assert [engine.facts()["uncompiled"] for engine in engines.values()] == [0, 1]


def test_compiled_scores_are_those_of_the_live_adapter(prompts: dict[str, Prompt], tiny_base_fp32: Path) -> None:
    same = [5, 9, 77, 30]
    rows, answers = [[*same, *row] for row in PROMPTS], [[3, 9, 41], [7], [200, 14], [5, 6, 7, 8]]
    live = eager.open(Model(str(tiny_base_fp32), (str(prompts["p-mlp"].live),)), eager.Params("cpu"))
    expected = [live.score([row], [answer])[0] for row, answer in zip(rows, answers, strict=True)]
    for buckets in ("16", "none"):
        params = compiled.Params(fullgraph=False, cache_len=64, prompt_buckets=buckets)
        engine = compiled.Compiled(model(tiny_base_fp32, prompts["p-mlp"]), params, backend="eager")
        for ours, theirs in zip(engine.score(rows, answers), expected, strict=True):
            assert ours.best == theirs.best and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        with engine.without_adapters():
            plain = engine.score(rows[:1], answers[:1])[0].logprobs
            assert tokens(engine, PROMPTS) == alone(tiny_base_fp32, None)
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
        with engine.without_adapters():
            assert tokens(engine, PROMPTS[:2]) == alone(tiny_base_fp32, None)[:2]
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
    names = ("p-mlp", "other")
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
        plugin.open(Model(str(tiny_base_fp32), (str(prompts["p-mlp"].live),)), plugin.Params())
    assert "peftopt bake" in refused.value.hint


@pytest.mark.parametrize("name", ["compiled", "continuous"])
def test_closing_frees_the_prompt(name: str, prompts: dict[str, Prompt], tiny_base_fp32: Path) -> None:
    plugin = plugins.module("engine", name)
    engine = plugin.open(model(tiny_base_fp32, prompts["p-mlp"]), plugin.Params())
    if name == "continuous":
        tokens(engine, PROMPTS[:1])
    kept = weakref.ref(engine._prefix.layers[0][0])
    engine.close()
    del engine
    gc.collect()
    assert kept() is None


# ---- words of a copy of the base ---------------------------------------------------------------


def certificate(folder: Path) -> dict[str, Any]:
    told = json.loads((folder / "parity.json").read_text())
    return {"passed": told["passed"], **{check["name"]: check for check in told["checks"]}}


@pytest.mark.parametrize("kind", ["prompt", "p-mlp"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_copy_with_the_virtual_tokens_as_words_answers_as_the_live_adapter(
    kind: str, dtype: str, prompts: dict[str, Prompt], tiny_base: Path, tiny_base_fp32: Path, tmp_path: Path
) -> None:
    base = {"fp32": tiny_base_fp32, "bf16": tiny_base}[dtype]
    live = Model(str(base), (str(prompts[kind].live),))
    copy = bake.transform(live, bake.Params(target="vllm"), tmp_path / "words", [], 0)
    assert copy == Model(str(tmp_path / "words"))
    told = certificate(tmp_path / "words")
    assert told["passed"], told
    ours, theirs = eager.open(copy, eager.Params("cpu")), eager.open(live, eager.Params("cpu"))
    message = [{"role": "user", "content": "count the stars"}]
    words, plain = ours.encode(message)[0], theirs.encode(message)[0]
    assert words[VIRTUAL:] == plain, "the chat template begins with the words"
    assert ours.tokenizer("the fox").input_ids == words[:VIRTUAL] + theirs.tokenizer("the fox").input_ids
    assert set(words[:VIRTUAL]) <= ours.special_tokens and len(set(words[:VIRTUAL])) == VIRTUAL
    assert ours.decode(words[:VIRTUAL]) == ""
    if dtype == "fp32":  # in bf16 another order of sums may turn a token
        assert [ours.generate([words[:VIRTUAL] + row], TOKENS, False)[0].tokens for row in PROMPTS] == (
            prompts[kind].answers
        )


def test_the_words_certificate_fails_where_they_are_not_the_prompt(
    prompts: dict[str, Prompt], tiny_base_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftopt.merging import baking

    own = baking.Live.prompt
    monkeypatch.setattr(baking.Live, "prompt", lambda live: own(live).flip(1))
    live = Model(str(tiny_base_fp32), (str(prompts["prompt"].live),))
    bake.transform(live, bake.Params(target="vllm"), tmp_path / "words", [], 0)
    told = certificate(tmp_path / "words")
    assert not told["passed"] and not told["predictions"]["passed"]


def test_prefix_tuning_has_no_words(prompts: dict[str, Prompt], tiny_base_fp32: Path, tmp_path: Path) -> None:
    live = Model(str(tiny_base_fp32), (str(prompts["prefix"].live),))
    with pytest.raises(BadInput, match="PREFIX_TUNING") as refused:
        bake.transform(live, bake.Params(target="vllm"), tmp_path / "words", [], 0)
    assert "--for" in refused.value.hint


# ---- our server --------------------------------------------------------------------------------


def asked_at_once(server: Running, named: Sequence[tuple[str, int]]) -> list[list[int]]:
    """The answers to these names and numbers of PROMPTS, all asked together."""
    with ThreadPoolExecutor(len(named)) as pool:
        return list(pool.map(lambda one: server.ids(one[0], PROMPTS[one[1]], max_tokens=TOKENS), named))


def test_baked_prompts_a_lora_and_the_base_are_served_beside_each_other(
    prompts: dict[str, Prompt], tiny_base_fp32: Path, tiny_lora: Path
) -> None:
    folders = {"lora": tiny_lora, **{name: prompt.baked for name, prompt in prompts.items()}}
    expected = {
        "base": alone(tiny_base_fp32, None),
        "lora": alone(tiny_base_fp32, tiny_lora),
        **{name: prompt.answers for name, prompt in prompts.items()},
    }
    with serving(_rows.Served(str(tiny_base_fp32), "cpu"), folders, max_batch=6) as server:
        named = [(name, row) for row in range(len(PROMPTS)) for name in expected]
        assert asked_at_once(server, named) == [expected[name][row] for name, row in named]


def test_rows_of_a_baked_prompt_join_and_leave_one_batch(
    prompts: dict[str, Prompt], tiny_base_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    served = {"a": prompts["p-mlp"].baked, "b": prompts["other"].baked}
    lengths = (TOKENS, 6, 8, 5)
    with serving(_rows.Served(str(tiny_base_fp32), "cpu"), served) as server, ThreadPoolExecutor(5) as pool:
        answers = []
        for row, length in enumerate(lengths):
            answers.append(pool.submit(server.ids, "a", PROMPTS[row], max_tokens=length))
            if row:  # the model stands at the gate, and takes nobody in before it has made a step
                until(lambda: server.scheduler.waiting == 1)
                gate.steps(1)
            until(lambda row=row: server.scheduler.running == row + 1 and gate.taken())
            assert [len(batch.jobs) for batch in server.scheduler._batches] == [row + 1], "one batch"
        other = pool.submit(server.ids, "b", PROMPTS[0], max_tokens=TOKENS)
        until(lambda: server.scheduler.waiting == 1)
        gate.steps(1)
        until(lambda: len(server.scheduler._batches) == 2)
        gate.open()
        wanted = prompts["p-mlp"].answers
        assert [answer.result(PATIENCE_S) for answer in answers] == [
            wanted[row][:length] for row, length in enumerate(lengths)
        ]
        assert other.result(PATIENCE_S) == prompts["other"].answers[0]


def test_an_unload_frees_a_baked_prompt_and_another_takes_its_name(
    prompts: dict[str, Prompt], tiny_base_fp32: Path
) -> None:
    model = _rows.Served(str(tiny_base_fp32), "cpu")
    with serving(model, {"p": prompts["p-mlp"].baked}) as server:
        assert server.ids("p", PROMPTS[0], max_tokens=TOKENS) == prompts["p-mlp"].answers[0]
        (prefix,) = model._baked.values()
        kept = weakref.ref(prefix.layers[0][0])
        del prefix
        assert server.post("unload_lora_adapter", lora_name="p").status_code == 200
        gc.collect()
        assert kept() is None
        assert server.post("completions", model="p", prompt=PROMPTS[0]).status_code == 404
        path = str(prompts["other"].baked)
        assert server.post("load_lora_adapter", lora_name="p", lora_path=path).status_code == 200
        assert server.ids("p", PROMPTS[0], max_tokens=TOKENS) == prompts["other"].answers[0]


def test_the_server_counts_virtual_tokens_and_refuses_a_prompt_of_another_base(
    prompts: dict[str, Prompt], tiny_base_fp32: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(prompts["p-mlp"].baked, tmp_path / "other")
    config = json.loads((other / "baked.json").read_text())
    config["base"]["weights"] = "0" * 64
    (other / "baked.json").write_text(json.dumps(config))
    with serving(_rows.Served(str(tiny_base_fp32), "cpu"), {"p": prompts["p-mlp"].baked}) as server:
        room = server.scheduler.context - VIRTUAL
        body = {"model": "p", "prompt": [5] * (room - 1)}
        assert server.post("completions", **body, max_tokens=1).status_code == 200
        refused = server.post("completions", **body, max_tokens=2)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
        refused = server.post("load_lora_adapter", lora_name="q", lora_path=str(other))
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "lora_path"


# ---- the gateway -------------------------------------------------------------------------------


def said(gateway: Gateway, model: str) -> str:
    answer = gateway.ask("count the stars", model, max_tokens=16, temperature=0)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def chat(base: Path, folder: Path | None) -> str:
    """The live adapter's answer to the same question."""
    engine = eager.open(Model(str(base), (str(folder),) if folder else ()), eager.Params("cpu"))
    prompt = engine.encode([{"role": "user", "content": "count the stars"}])[0]
    text = engine.decode(engine.generate([prompt], 16, True)[0].tokens)
    engine.close()
    return text


def test_the_gateway_puts_a_baked_prompt_and_then_another_while_it_serves(
    prompts: dict[str, Prompt], tiny_base_fp32: Path, tmp_path: Path
) -> None:
    first, second = prompts["prompt"], prompts["other"]
    options = ("--base", tiny_base_fp32, "--adapter", f"p={first.baked}", "--engine", "eager", "--threads", 1)
    options += ("--adapters-from", second.baked.parent)
    with gateway_serving(tmp_path, *options) as gateway:
        assert said(gateway, "p") == chat(tiny_base_fp32, first.live)
        code, told = gateway.operate("put", f"p={second.baked}")
        assert code == 0, told
        assert said(gateway, "p") == chat(tiny_base_fp32, second.live)
        assert said(gateway, "base") == chat(tiny_base_fp32, None)
        code, told = gateway.operate("rollback", "p")
        assert code == 0, told
        assert said(gateway, "p") == chat(tiny_base_fp32, first.live)
        broken = shutil.copytree(first.baked, second.baked.parent / "broken")
        weights = broken / "prefix.safetensors"
        weights.write_bytes(weights.read_bytes()[:-40])
        code, told = gateway.operate("put", f"p={broken}")
        assert code != 0 and "not whole" in told
        assert said(gateway, "p") == chat(tiny_base_fp32, first.live)


def test_a_gateway_of_several_processes_serves_and_replaces_a_baked_prompt(
    prompts: dict[str, Prompt], tiny_base_fp32: Path, tmp_path: Path
) -> None:
    first, second = prompts["prompt"], prompts["other"]
    options = ("--base", tiny_base_fp32, "--adapter", f"p={first.baked}", "--engine", "eager", "--threads", 1)
    with gateway_serving(tmp_path, *options, "--adapters-from", second.baked.parent, "--workers", 2) as gateway:
        for folder in (first, second):
            if folder is second:
                code, told = gateway.operate("put", f"p={second.baked}")
                assert code == 0, told
            expected = chat(tiny_base_fp32, folder.live)
            with ThreadPoolExecutor(4) as pool:
                assert set(pool.map(lambda _: said(gateway, "p"), range(8))) == {expected}
        assert said(gateway, "base") == chat(tiny_base_fp32, None)


def test_what_the_compiled_server_does_not_serve_is_refused_with_what_does(
    prompts: dict[str, Prompt], tiny_base_fp32: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A baked prompt cannot be merged."""
    given = ("--base", str(tiny_base_fp32), "--adapter", f"p={prompts['prompt'].baked}", "--engine", "compiled")
    assert server_main(given) == BAD_INPUT
    own = capsys.readouterr().err
    assert command("serve", *given) == BAD_INPUT
    for told in (own, errors(capsys)):
        assert "baked prompt" in told and "--engine eager" in told
