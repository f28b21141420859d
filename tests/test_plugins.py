"""What every transform and every engine promises, checked on a tiny model; a new plug-in file is found by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.asked import PROMPTS, ask
from helpers.tiny_models import make_lora
from safetensors.torch import load_file

from peftopt import plugins
from peftopt.corpus import Row
from peftopt.engines import _graphs, _traced
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.measurements import NO_FACTS
from peftopt.models import provenance
from peftopt.probes import kernels, speed
from peftopt.records import Model

CATALOGUE = plugins.catalogue()
LOCAL = [p for p in CATALOGUE.values() if p.kind == "transform" and p.environment == "main"]
TRANSFORMS = sorted(p.name for p in LOCAL if p.technique != "bake")  # which writes no model: tests/test_bake.py
ENGINES = sorted(p.name for p in CATALOGUE.values() if p.kind == "engine" and p.environment == "main")
QUANTIZERS = [name for name in TRANSFORMS if CATALOGUE[name].technique == "quantize"]
LOCAL_ENGINES = [name for name in ENGINES if name in ("eager", "compiled", "continuous")]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(name: str, model: Model, out: Path, texts: Sequence[str] = (), **params: Any) -> Model:
    """Run a transform, with its default parameters but for `params`."""
    plugin = plugins.module("transform", name)
    out.mkdir(parents=True, exist_ok=True)
    result: Model = plugin.transform(model, plugin.Params(**params), out, texts, 0)
    return result


def logits(folder: Path | str, adapter: Path | None = None) -> Any:
    """Logits [1, tokens, vocabulary] of a folder that is loaded as a user would load it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 60)[None]).logits.float()


@pytest.fixture(scope="module")
def built(
    tiny_base: Path, tiny_lora: Path, calibration_texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Build each transform's output once: from base and adapter for a merge, from the merged model otherwise."""
    done: dict[str, Model] = {}
    root = tmp_path_factory.mktemp("built")

    def build(name: str) -> Model:
        if name not in done:
            source = Model(str(tiny_base), (str(tiny_lora),)) if name == "merge" else build("merge")
            done[name] = run(name, source, root / name, calibration_texts)
        return done[name]

    return build


# ---- what the catalogue promises ---------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_a_plugin_describes_itself(name: str) -> None:
    plugin = CATALOGUE[name]
    assert plugin.help.endswith(".") and len(plugin.help) < 110
    known = ("merge", "bake", "quantize", "compile", "speculate", "prefix", "pack", "truncate", "shorten", "")
    assert plugin.technique in known
    assert is_dataclass(plugin.params) and plugin.params.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert {f.type for f in fields(plugin.params)} <= {"int", "float", "str", "bool", "Folder"}
    plugin.params()  # every field has a default
    if plugin.kind == "engine":
        assert callable(plugins.module("engine", name).prepare), "a worker asks every engine for it"


# ---- transforms --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_leaves_a_whole_finite_folder(name: str, built: Any, tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    from peftopt.probes.weights import foreign_words

    out = Path(built(name).path)
    assert logits(out).isfinite().all()
    assert list(out.glob("*.safetensors")) and not list(out.glob("*.bin"))
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / file).read_bytes() == (tiny_base / file).read_bytes(), file
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert foreign_words(out, Model(str(tiny_base))) == []
    assert (out / "parity.json").is_file() is (name == "merge"), "a certificate is of the weights beside it"
    made = provenance.read(out)
    assert (made is not None) is (name in QUANTIZERS), "and so is a provenance"
    if made:
        assert made["method"] == name and made["libraries"] and made["params"].keys() >= {"keep"}
        assert bool(made["calibration"]) is CATALOGUE[name].calibrates


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_leaves_its_input_and_the_working_folder_alone(
    name: str,
    tiny_base: Path,
    tiny_lora: Path,
    calibration_texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = snapshot(tiny_base), snapshot(tiny_lora)
    params = {"keep": "mlp.down_proj"} if name in QUANTIZERS else {}
    run(name, Model(str(tiny_base), (str(tiny_lora),)), tmp_path / "out", calibration_texts, **params)
    assert (snapshot(tiny_base), snapshot(tiny_lora)) == before
    assert list(elsewhere.iterdir()) == []
    assert capfd.readouterr().out == "", "stdout is the worker's protocol"
    if name in QUANTIZERS:
        stored = load_file(tmp_path / "out" / "model.safetensors")
        kept = {key: str(tensor.dtype) for key, tensor in stored.items() if "down_proj" in key}
        assert kept == {f"model.layers.{n}.mlp.down_proj.weight": "torch.bfloat16" for n in range(2)}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_changes_the_weights_a_little_and_carries_adapters(
    name: str, built: Any, tiny_base: Path, tiny_lora: Path, calibration_texts: list[str], tmp_path: Path
) -> None:
    full, quantized = logits(built("merge").path), logits(built(name).path)
    assert (full != quantized).any()
    # Four bits of random weights are far off; unrelated logits would be 1.4 of the norm.
    few_bits = name in ("gptq", "awq", "nf4")
    assert (full - quantized).norm() < (0.9 if few_bits else 0.2) * full.norm()
    carried = run(name, Model(str(tiny_base), (str(tiny_lora),)), tmp_path / "out", calibration_texts)
    assert carried.adapters == (str(tiny_lora),)
    engine = plugins.module("engine", "eager")
    plain, adapted = Model(carried.path), carried
    answers = [ask(engine.open(model, engine.Params()), new_tokens=8) for model in (plain, adapted)]
    assert answers[0] != answers[1], "the adapter is still at work on the quantized base"


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.fault(32, "a quantizer refuses a quantized model")
def test_a_quantizer_refuses_a_quantized_model(
    name: str, built: Any, calibration_texts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="already quantized"):
        run(name, Model(built("int8").path), tmp_path, calibration_texts)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_what_a_calibrating_quantizer_cannot_use_is_refused_before_it_reads_weights(
    name: str, tiny_base: Path, calibration_texts: list[str], tmp_path: Path
) -> None:
    plugin = plugins.module("transform", name)

    def refused(why: str, texts: Sequence[str] = calibration_texts, **params: Any) -> str:
        with pytest.raises(BadInput, match=why) as error:
            plugin.transform(Model(str(tiny_base)), plugin.Params(**params), tmp_path, texts, 0)
        return str(error.value.hint)

    assert refused("group_size: 128 does not divide the input width of .*q_proj .64.", group_size=128) == "use 32 or 64"
    assert "generic" in refused("no calibration texts", [])
    assert "generic" in refused("too short: [0-9]+ tokens in 1 rows", calibration_texts[:1])
    assert "down_proj" in refused("no layer is named head", keep="head")
    for params in ({"bits": 3}, {"group_size": 48}, {"mixed": 1.0}, {"samples": 0}):
        with pytest.raises(ValueError, match=next(iter(params))):
            plugin.Params(**params)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_is_the_same_model(built: Any, tiny_base: Path, tiny_lora: Path) -> None:
    merged, unmerged, base = logits(built("merge").path), logits(tiny_base, tiny_lora), logits(tiny_base)
    assert built("merge").adapters == ()
    noise, delta = (merged - unmerged).norm(), (unmerged - base).norm()
    assert noise < 0.05 * delta, f"{noise} is more than bf16 rounding of a change of {delta}"


def test_a_merge_keeps_dtype_and_tied_embeddings(built: Any, tiny_base: Path) -> None:
    out = Path(built("merge").path)
    base, merged = load_file(tiny_base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in base.items()} == {k: (v.dtype, v.shape) for k, v in merged.items()}
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_merge_into_one_side_of_tied_embeddings_leaves_the_other(
    tiny_base: Path, tmp_path: Path, target: str
) -> None:
    lora = tmp_path / "lora"
    make_lora(tiny_base, lora, target_modules=["q_proj", target])
    merged = run("merge", Model(str(tiny_base), (str(lora),)), tmp_path / "out")
    same, changed = logits(merged.path), logits(tiny_base, lora)
    assert (same - changed).norm() < 0.05 * (changed - logits(tiny_base)).norm()


def edited(lora: Path, out: Path, change: Any) -> Path:
    """A copy of an adapter whose tensors went through `change`."""
    from safetensors.torch import save_file

    shutil.copytree(lora, out)
    save_file(change(load_file(lora / "adapter_model.safetensors")), out / "adapter_model.safetensors")
    return out


BROKEN = {
    "lacks weights": lambda weights: dict(list(weights.items())[1:]),
    "has unknown weights": lambda weights: (
        weights | {"base_model.model.model.layers.9.x": next(iter(weights.values())) + 0}
    ),
    "does not fit": lambda weights: {key: value[:, :-1].contiguous() for key, value in weights.items()},
    "NaN or infinity": lambda weights: {key: value * float("nan") for key, value in weights.items()},
}


@pytest.mark.parametrize("reason", BROKEN)
@pytest.mark.parametrize("hand", ["merge", "eager"])
@pytest.mark.fault(20, "an adapter with such a weight is refused")
@pytest.mark.fault(21, "refused, where PEFT only warns")
def test_a_broken_adapter_is_refused(hand: str, reason: str, tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    model = Model(str(tiny_base), (str(edited(tiny_lora, tmp_path / "broken", BROKEN[reason])),))
    with pytest.raises(BadInput, match=reason):
        if hand == "merge":
            run("merge", model, tmp_path / "out")
        else:
            engine = plugins.module("engine", "eager")
            engine.open(model, engine.Params())


def test_a_merge_that_cannot_be_is_refused(tiny_base: Path, tiny_lora: Path, built: Any, tmp_path: Path) -> None:
    from peft import PromptEncoderConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def refused(why: str, *adapters: Path, base: str = str(tiny_base)) -> None:
        with pytest.raises(BadInput, match=why) as error:
            run("merge", Model(base, tuple(map(str, adapters))), tmp_path / "out")
        assert error.value.hint

    refused("nothing to merge")
    refused("has no adapter_config.json", tmp_path)
    refused("already quantized", tiny_lora, base=built("int8").path)
    make_lora(tiny_base, tmp_path / "zero", std=0)
    refused("changed nothing", tmp_path / "zero")
    shutil.copytree(tiny_lora, tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    refused("pickled", tmp_path / "pickled")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16)
    get_peft_model(model, config).save_pretrained(tmp_path / "p-tuning")
    refused("no weight delta", tmp_path / "p-tuning")


@pytest.mark.fault(24, "words that are not the adapter's reject the variant")
def test_words_that_are_not_the_adapters_are_told(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    from peftopt.probes.weights import foreign_words

    source = Model(str(tiny_base), (str(tiny_lora),))
    made = Path(shutil.copytree(tiny_base, tmp_path / "made"))
    assert foreign_words(made, source) == []
    (made / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    (made / "tokenizer.json").unlink()
    assert foreign_words(made, source) == [
        "tokenizer.json is not the adapter's",
        "chat_template.jinja is not the adapter's",
        "config.json: the end of sequence is 0, the base's is 2",
    ]


# ---- engines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tiny_base_fp32: Path, tiny_lora: Path, built: Any) -> Iterator[Any]:
    """Open each engine once, in fp32 with the LoRA unmerged (greedy answers are then exact). Each is closed at the end:
    a thread that still generates would keep this process."""
    done: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in done:
            plugin = plugins.module("engine", name)
            done[name] = plugin.open(Model(str(tiny_base_fp32), (str(tiny_lora),)), plugin.Params())
        return done[name]

    yield get
    for engine in done.values():
        engine.close()


@pytest.mark.parametrize("name", LOCAL_ENGINES)
def test_stop_false_gives_exactly_that_many_tokens_with_their_times(name: str, opened: Any) -> None:
    engine = opened(name)
    prompts = [engine.encode([{"role": "user", "content": text}])[0] for text in PROMPTS]
    for answer in engine.generate(prompts, 24, stop=False):
        assert len(answer.tokens) == len(answer.times) == 24
        assert answer.times == sorted(set(answer.times)) and not answer.stopped


@pytest.mark.parametrize("name", LOCAL_ENGINES)
def test_a_batch_answers_as_one_by_one(name: str, opened: Any) -> None:
    together, alone = (ask(opened(name), 16, batch) for batch in (True, False))
    assert together == alone
    assert len({tuple(answer) for answer in together}) > 1, "the tiny model must tell prompts apart"


def test_compiled_answers_and_scores_as_eager(opened: Any) -> None:
    eager, compiled = opened("eager"), opened("compiled")
    assert ask(compiled, 16) == ask(eager, 16)
    prompts = [eager.encode([{"role": "user", "content": text}])[0] for text in PROMPTS]
    answers = [[7, 9, 11, 2], [8, 2], [30] * 6]
    for ours, theirs in zip(compiled.score(prompts, answers), eager.score(prompts, answers), strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert (ours.best, ours.finite) == (theirs.best, True)


def test_regions_are_the_same_model_and_no_graph_is_made_for_the_last_few_rows(
    tiny_base_fp32: Path, tiny_lora: Path
) -> None:
    model = Model(str(tiny_base_fp32), (str(tiny_lora),))
    eager, compiled = (plugins.module("engine", name) for name in ("eager", "compiled"))
    plain, engine = eager.open(model, eager.Params()), compiled.open(model, compiled.Params(regions=True))
    assert type(engine._inner.model.layers[0]).__name__ == type(plain._owners[-1].model.layers[0]).__name__
    assert ask(engine, 16) == ask(plain, 16)
    prompt = engine.encode([{"role": "user", "content": PROMPTS[0]}])[0]
    (ours,), (theirs,) = (each.score([prompt], [[7, 9, 11, 2]]) for each in (engine, plain))
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    engine.generate([prompt], 4, stop=True)
    facts = engine.facts()
    assert (facts["graphs"], facts["graph_breaks"], facts["uncompiled"]) == (2, 0, 0), "prompt and step"
    engine.generate([prompt], 4, stop=False)
    assert engine.facts()["graphs"] == 4, "what is timed has the shape it asks for"


def test_compiled_counts_what_it_compiles_and_bounds_it(opened: Any, tiny_base_fp32: Path) -> None:
    engine = opened("compiled")
    ask(engine, 16), ask(engine, 16, batch=False)
    before = engine.facts()
    assert before["compile_time"] > 0
    assert before["graph_breaks"] == before["recompiles"] == before["uncompiled"] == before["eager_prompts"] == 0
    for length in (3, 17, 32):
        engine.generate([list(range(5, 5 + length))], 20, stop=False)
    assert engine.facts() == before, "prompts of any length in a bucket run through the same graphs"
    plugin = plugins.module("engine", "compiled")
    small = plugin.open(Model(str(tiny_base_fp32)), plugin.Params(cache_len=16))
    plain = plugins.module("engine", "eager")
    assert ask(small, 8) == ask(plain.open(Model(str(tiny_base_fp32)), plain.Params()), 8)
    facts = small.facts()
    assert (facts["graphs"], facts["uncompiled"]) == (0, 1)
    assert "longer than the cache of 16 tokens" in facts["log"][0]


def test_weights_that_no_graph_can_hold_are_refused_by_name(built: Any) -> None:
    plugin = plugins.module("engine", "compiled")
    with pytest.raises(BadInput, match=r"bnb8.* no graph can hold") as refused:
        plugin.open(built("bnb8"), plugin.Params())
    assert "int8" in refused.value.hint


@pytest.mark.parametrize("method", ["gptq", "fp8", "w8a8", "awq", "nf4"])
def test_packed_weights_are_compiled_in_one_graph(method: str, built: Any) -> None:
    plugin = plugins.module("engine", "compiled")
    engine = plugin.open(built(method), plugin.Params())
    assert all(len(tokens) == 12 for tokens in ask(engine, 12))
    facts = engine.facts()
    assert (facts["graphs"], facts["graph_breaks"]) == (2, 0), "one for prompts, one for a token"


def test_prompts_of_all_lengths_in_a_bucket_are_answered_as_eagerly_and_longer_ones_run_so(
    opened: Any, tiny_base_fp32: Path, tiny_lora: Path
) -> None:
    plugin = plugins.module("engine", "compiled")
    model = Model(str(tiny_base_fp32), (str(tiny_lora),))
    engine, plain = plugin.open(model, plugin.Params(prompt_buckets="24, 48")), opened("eager")

    def prompts(*lengths: int) -> list[list[int]]:
        return [[5 + (7 * n + 3 * length) % 300 for n in range(length)] for length in lengths]

    def same(*lengths: int, new_tokens: int = 12) -> bool:
        ours, theirs = (e.generate(prompts(*lengths), new_tokens, stop=False) for e in (engine, plain))
        return [a.tokens for a in ours] == [a.tokens for a in theirs]

    assert same(2) and same(23) and same(24), "alone, in a bucket"
    assert same(24, 3, 11) and same(1, 24, 24), "unequal ones together"
    assert [line.split(": ")[0] for line in engine.facts()["log"]] == [
        "batch 1, cache 128",
        "batch 1, cache 128, prompts up to 24",
        "batch 4, cache 128",
        "batch 4, cache 128, prompts up to 24",
    ]
    assert same(49) and engine.facts()["eager_prompts"] == 1
    assert "1 requests with an eager prompt: longer than the longest of prompt_buckets" in engine.facts()["log"][-1]
    answers = [[7, 9, 11], [8, 2], [30] * 4]
    for lengths in ((20, 3, 11), (60, 50, 49)):  # through the graph, and eagerly with what they share run once
        asked = [[9, 8, *prompt] for prompt in prompts(*lengths)]
        for ours, theirs in zip(engine.score(asked, answers), plain.score(asked, answers), strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_the_lengths_that_prompts_are_compiled_for_are_bounded(tiny_base: Path) -> None:
    plugin = plugins.module("engine", "compiled")
    engine = plugin.open(Model(str(tiny_base)), plugin.Params(prompt_graphs=1))
    with pytest.raises(BadInput, match="prompt_buckets"):
        plugin.open(Model(str(tiny_base)), plugin.Params(prompt_buckets="long"))
    assert plugin.buckets("auto", 200) == [32, 48, 64, 96, 128, 192, 200]
    assert plugin.buckets("64, 16, 512", 128) == [16, 64] and plugin.buckets("none", 128) == []
    shape = (1, 128)
    assert engine._bucket(shape, 40, timed=True) == (1, 128, 48)
    engine._prompts[1, 128, 96] = (lambda *_: None, None)
    assert engine._bucket(shape, 40, timed=False) == (1, 128, 96), "what is not timed takes a longer one that is there"
    assert engine._bucket(shape, 40, timed=True) == (1, 128, 96), "and so does all when no more may be compiled"
    assert "prompt_graphs" in engine._bucket(shape, 100, timed=True)
    engine._params = plugin.Params()
    assert engine._bucket(shape, 40, timed=True) == (1, 128, 48), "what is timed has the length it asks for"
    assert engine._bucket((4, 128), 40, timed=False) == (4, 128, 48), "a graph of other rows is none for these"


def test_an_engine_is_warm_for_all_that_batches_of_some_prompts_need(tiny_base: Path) -> None:
    plugin = plugins.module("engine", "compiled")

    def made(timed: bool, rows: int) -> list[tuple[int, ...]]:
        engine, done = plugin.open(Model(str(tiny_base)), plugin.Params(cache_len=256)), []
        engine._graphs.ready = lambda _function, shape, *_: done.append(shape)
        engine.warm([20, 40, 50, 90, 400], rows, 8, timed)
        assert engine.facts()["uncompiled"] == 0, "nothing has been asked yet"
        return sorted(done)

    assert made(True, 1) == [(1, 256), (1, 256, 32, 0), (1, 256, 48, 0), (1, 256, 64, 0), (1, 256, 96, 0)]
    assert made(True, 4) == [(4, 256), (4, 256, 96, 0)], "the longest of four has 90 tokens, or does not fit"
    assert made(False, 1) == [(1, 256), (1, 256, 96, 0)]
    engine = plugin.open(Model(str(tiny_base)), plugin.Params(cache_len=256))
    engine._ready = lambda *_: None
    engine.warm([20] * 2 + [90] * 98, 8, 8, True)
    assert engine._bucket((8, 256), 20, True) == (8, 256, 96), "what no batch is likely to need is not compiled later"


def broken(engine: Any) -> Any:
    """The engine, with a layer whose way through depends on a number in its data: a real break of the graph."""
    mlp = engine._inner.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) if float(x.sum()) > -1e30 else x
    return engine


def test_a_graph_break_is_refused_by_its_cause_or_counted_with_it(opened: Any, tiny_base_fp32: Path) -> None:
    plugin, model = plugins.module("engine", "compiled"), Model(str(tiny_base_fp32))
    with pytest.raises(BadInput, match=r"in one graph: .*data-dependent") as refused:
        broken(plugin.open(model, plugin.Params())).generate([[5, 6, 7]], 4, stop=False)
    assert "fullgraph: false" in refused.value.hint
    engine = broken(plugin.Compiled(model, plugin.Params(fullgraph=False, prompt_buckets="none"), backend="eager"))
    plain = plugins.module("engine", "eager").open(model, plugins.module("engine", "eager").Params())
    assert ask(engine, 8) == ask(plain, 8)
    facts = engine.facts()
    assert facts["graph_breaks"] >= 1 and facts["graphs"] >= 2
    assert any(line.startswith("graph break (") and "item" in line for line in facts["log"])


def test_recompiles_are_counted_by_reason_and_a_dynamic_graph_needs_none(tiny_base_fp32: Path) -> None:
    import torch

    plugin, plain = plugins.module("engine", "compiled"), plugins.module("engine", "eager")
    model, found = Model(str(tiny_base_fp32)), {}
    expected = plain.open(model, plain.Params())
    prompts = [[5 + 3 * n + row for n in range(6 + row)] for row in range(16)]
    for dynamic in (False, True):
        torch._dynamo.reset()  # it remembers the graphs of a process, and a worker has one engine
        params = plugin.Params(fullgraph=False, dynamic=dynamic, prompt_buckets="none")
        engine = plugin.Compiled(model, params, backend="eager")
        for rows in (8, 16):  # sizes that no other dimension has: Dynamo takes equal ones for the same
            ours, theirs = (e.generate(prompts[:rows], 6, stop=False) for e in (engine, expected))
            assert [a.tokens for a in ours] == [a.tokens for a in theirs]
        found[dynamic] = engine.facts()
    assert found[False]["recompiles"] == 1 and found[True]["recompiles"] == 0
    (reason,) = [line for line in found[False]["log"] if line.startswith("recompiled")]
    assert reason.startswith("recompiled (1): ") and "size" in reason
    assert found[True]["graphs"] == 1


def test_a_torch_that_cannot_compile_ahead_compiles_at_the_first_request(
    tiny_base_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, plain = plugins.module("engine", "compiled"), plugins.module("engine", "eager")
    model = Model(str(tiny_base_fp32))
    expected = ask(plain.open(model, plain.Params()), 8)
    monkeypatch.setattr(_graphs, "_can_compile_ahead", lambda: False)
    engine = plugin.open(model, plugin.Params(prompt_buckets="none"))
    assert ask(engine, 8) == expected
    assert engine.facts()["graphs"] >= 1 and engine.facts()["compile_time"] > 0


def test_the_cpu_time_of_a_request_holds_that_of_who_serves_it(opened: Any) -> None:
    class Served:
        """An engine whose model is in another process: here one that counts for ever."""

        def __init__(self, pid: int) -> None:
            self.pid, self.inner = pid, opened("eager")

        def processes(self) -> list[int]:
            return [self.pid]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def generate(self, *asked: Any, **kwargs: Any) -> Any:
            deadline = time.monotonic() + 60
            start = psutil.Process(self.pid).cpu_times().user
            while psutil.Process(self.pid).cpu_times().user < start + 0.3 and time.monotonic() < deadline:
                time.sleep(0.01)
            return self.inner.generate(*asked, **kwargs)

    row = Row("a", ({"role": "user", "content": "hi"},))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            (request,) = speed.turn(Served(busy.pid), [[row]], 2, 0)
        finally:
            busy.kill()
    assert request.cpu_ms >= 290


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, X<float>>(int)", "vectorized_elementwise_kernel"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::X, 2>(int)", "CatArrayBatchedCopy"),
        ("triton_red_fused__to_copy_mul_sum_view_2", "triton_red_fused__to_copy_mul_sum_view_2"),
        ("Memcpy DtoH (Device -> Pageable)", "Memcpy DtoH"),
    ],
)
def test_kernels_are_named_without_their_types(name: str, said: str) -> None:
    assert kernels.plain(name) == said


def test_kernels_are_summed_by_name_and_set_against_the_request() -> None:
    found = kernels.summary([("void a<1>()", 0.2), ("void a<2>()", 0.1), ("b", 0.1)], seconds=2.0)
    assert found.gpu_busy == pytest.approx(0.2)
    assert [(k.name, round(k.share, 2)) for k in found.kernels] == [("a", 0.75), ("b", 0.25)]
    assert found.log == ("its GPU computes for 20 % of a request's time: a 75 %, b 25 %",)
    assert kernels.summary([], 1.0) == NO_FACTS


def test_tensorrt_is_refused_where_there_is_no_gpu(tiny_base: Path) -> None:
    plugin = plugins.module("engine", "tensorrt")
    assert "torch_tensorrt" in CATALOGUE["tensorrt"].needs
    if pytest.importorskip("torch").cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(MissingEnvironment, match="NVIDIA"):
        plugin.open(Model(str(tiny_base)), plugin.Params())


@pytest.mark.parametrize("wrong", [{"mode": "fast"}, {"attention": "flash"}])
def test_compiled_refuses_what_it_does_not_know(wrong: dict[str, str], tiny_base: Path) -> None:
    plugin = plugins.module("engine", "compiled")
    with pytest.raises(BadInput, match=next(iter(wrong))) as refused:
        plugin.open(Model(str(tiny_base)), plugin.Params(**wrong))
    assert refused.value.hint.startswith("use one of")


def test_a_compiled_step_is_kept_and_a_model_that_fits_another_shape_is_not_given_it(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plugin = plugins.module("engine", "compiled")
    bare = plugin.open(Model(str(tiny_base)), plugin.Params())
    adapted = plugin.open(Model(str(tiny_base), (str(tiny_lora),)), plugin.Params())

    def kept(engine: Any, *shape: int) -> str:
        function = _traced.step if len(shape) == 2 else _traced.read
        return str(engine._graphs._kept(function, shape, engine._adapters).name)

    shapes = ((1, 128), (2, 128), (1, 256), (1, 128, 32), (1, 128, 64), (1, 256, 32))
    assert len({kept(engine, *shape) for engine in (bare, adapted) for shape in shapes}) == 2 * len(shapes)
    assert kept(bare, 1, 128) == kept(plugin.open(Model(str(tiny_base)), plugin.Params()), 1, 128)


def test_a_kept_graph_that_cannot_be_read_is_compiled_again_with_a_notice(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plugin = plugins.module("engine", "compiled")

    def answered() -> tuple[list[int], dict[str, Any]]:
        engine = plugin.open(Model(str(tiny_base)), plugin.Params(prompt_buckets="none"))
        return engine.generate([[5, 6, 7]], 4, stop=False)[0].tokens, engine.facts()

    first, _ = answered()
    (file,) = (tmp_path / "steps").rglob("*.*")
    assert file.suffix == ".step", "nothing half written lies about"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again, facts = answered()
    assert again == first and "warm_start" not in facts and file.stat().st_size > len(whole) // 2
    assert "the kept graph cannot be used" in facts["log"][0] and "compiled in" in facts["log"][1]
    again, facts = answered()
    assert again == first and "compile_time" not in facts


@pytest.mark.parametrize("name", LOCAL_ENGINES)
def test_stop_true_ends_each_row_at_its_own_end_of_sequence(name: str, opened: Any) -> None:
    engine = opened(name)
    prompts = [engine.encode([{"role": "user", "content": text}])[0] for text in PROMPTS]
    free = engine.generate(prompts, 24, stop=False)
    end = free[0].tokens[5]  # make a token that the first row says the end of sequence
    engine._stopping.eos_token_id, engine.eos = [end], frozenset([end])
    try:
        answers = engine.generate(prompts, 24, stop=True)
    finally:
        engine._stopping.eos_token_id, engine.eos = 2, frozenset([2])
    for answer, whole in zip(answers, free, strict=True):
        count = whole.tokens.index(end) + 1 if end in whole.tokens else 24
        assert answer.tokens == whole.tokens[:count] and len(answer.times) == count
        assert answer.stopped == (end in whole.tokens)
    assert answers[0].stopped


@pytest.mark.parametrize("name", LOCAL_ENGINES)
def test_score_agrees_with_generate_whatever_the_batch(name: str, opened: Any) -> None:
    engine = opened(name)
    prompts = [engine.encode([{"role": "user", "content": text}])[0] for text in PROMPTS]
    answers = [a.tokens[:n] for a, n in zip(engine.generate(prompts, 12, stop=False), (12, 5, 1), strict=True)]
    for prompt, answer, scores in zip(prompts, answers, engine.score(prompts, answers), strict=True):
        assert scores.best == answer and scores.finite
        assert [len(row) for row in scores.top_ids] == [64] * len(answer)
        assert scores.logprobs == pytest.approx([row[0] for row in scores.top_logprobs])
        assert all(row == sorted(row, reverse=True) and row[0] < 0 for row in scores.top_logprobs)
        assert engine.score([prompt], [answer])[0].logprobs == pytest.approx(scores.logprobs, abs=1e-4)
    wrong = engine.score(prompts[:1], [[7, 7]])[0]
    assert wrong.logprobs[1] < wrong.top_logprobs[1][0], "a given token that is not the best one scores lower"


def test_encode_and_decode_follow_the_chat_template(opened: Any) -> None:
    engine = opened("eager")
    prompt, answer = engine.encode([{"role": "user", "content": "the fox"}], "five stars")
    assert answer[-1] in engine.eos and engine.decode(answer) == "five stars"
    assert engine.decode(prompt) == "user\nthe fox\nassistant\n"
    assert engine.encode([{"role": "user", "content": "the fox"}]) == (prompt, [])
    assert {0, 1, 2} == engine.special_tokens and engine.eos == {2}


def test_the_adapter_is_served_in_the_dtype_of_its_base(tiny_base: Path, tiny_lora: Path) -> None:
    import torch

    eager = plugins.module("engine", "eager")
    engine = eager.open(Model(str(tiny_base), (str(tiny_lora),)), eager.Params())
    assert {p.dtype for p in engine._model.parameters()} == {torch.bfloat16}
    engine.close()


def test_the_compiled_engine_leaves_its_adapter_out(tiny_base_fp32: Path, tiny_lora: Path) -> None:
    """What is compiled has the adapter in it."""
    from peftopt.engines import compiled, eager

    engine = compiled.open(Model(str(tiny_base_fp32), (str(tiny_lora),)), compiled.Params(cache_len=64))
    base = eager.open(Model(str(tiny_base_fp32)), eager.Params())
    asked, answer = [[5, 9, 77, 30]], [[3, 9, 41, 200]]
    expected, adapted = base.score(asked, answer)[0].logprobs, engine.score(asked, answer)[0].logprobs
    with engine.without_adapters():
        assert engine.score(asked, answer)[0].logprobs == pytest.approx(expected, abs=1e-4)
        assert engine.generate(asked, 8, False)[0].tokens == base.generate(asked, 8, False)[0].tokens
    assert engine.score(asked, answer)[0].logprobs == pytest.approx(adapted, abs=1e-5)
    assert adapted != pytest.approx(expected, abs=1e-2) and engine.facts()["uncompiled"] == 0
    engine.close()


def test_switching_to_an_adapter_of_the_same_shape_compiles_nothing_again(
    opened: Any, tiny_base: Path, tiny_base_fp32: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    make_lora(tiny_base, tmp_path / "other", std=0.3)
    make_lora(tiny_base, tmp_path / "scaled", lora_alpha=16)
    plain = plugins.module("engine", "eager")
    engine = opened("compiled")
    assert ask(engine, 8) == ask(opened("eager"), 8)
    before = engine.facts()
    for adapter, again in (("other", 0), ("scaled", before["graphs"])):
        engine.switch(str(tmp_path / adapter))
        assert engine.facts()["recompiles"] - before["recompiles"] == again
        if not again:
            theirs = plain.open(Model(str(tiny_base_fp32), (str(tmp_path / adapter),)), plain.Params())
            assert ask(engine, 8) == ask(theirs, 8) != ask(opened("eager"), 8)
    with pytest.raises(BadInput, match="only a model with one adapter"):
        plugin = plugins.module("engine", "compiled")
        plugin.open(Model(str(tiny_base_fp32)), plugin.Params()).switch(str(tiny_lora))
