"""Baking a prompt: the same model as the live adapter, for every method and architecture, or refused by name."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import make
from helpers.command_line import command, errors
from helpers.tiny_models import PROMPTS, make_prompt

from peftopt import identity, store
from peftopt.engines import eager
from peftopt.errors import BadInput
from peftopt.gateway import checks
from peftopt.jobs import Transformed, TransformJob
from peftopt.merging import baking, certificate
from peftopt.models import baked, hf
from peftopt.models.adapter import open_adapter
from peftopt.records import Build, Model, Step
from peftopt.runner import build
from peftopt.transforms import bake, int8
from peftopt.worker import Worker

KINDS = ("mistral", "gpt2", "opt", "gemma", "phi3", "gpt_neox", "qwen3")
"""Sliding windows; learned positions, with an offset too; scaled embeddings; fused and partly rotated heads; norms of
keys."""

METHODS = ("prompt", "p-mlp", "prefix", "multitask", "cpt")
TASK = 1
ASKED = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], list(range(30, 52)), [5, 6, 41, 42]]
"""Token ids of prompts: of different lengths, so that a batch is padded; the longest is more than Mistral's window."""

SAME = 1e-4
"""Nats by which a log-probability of an fp32 model may differ."""


@pytest.fixture(scope="module")
def bases(tiny_base_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a base of a kind in fp32, made once."""
    home, known = tmp_path_factory.mktemp("bases"), {"llama": tiny_base_fp32}

    def get(kind: str) -> Path:
        if kind not in known:
            known[kind] = make(home / kind, kind, tiny_base_fp32, "float32")
        return known[kind]

    return get


@pytest.fixture(scope="module")
def prompt(tiny_base_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of prompt tuning on `tiny_base_fp32`."""
    return make_prompt(tiny_base_fp32, tmp_path_factory.mktemp("adapter") / "prompt", "prompt")


@pytest.fixture(scope="module")
def finished(tiny_base_fp32: Path, prompt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, baked by the command line."""
    out = tmp_path_factory.mktemp("finished") / "baked"
    assert command("bake", "--base", tiny_base_fp32, "--adapter", prompt, "--out", out) == 0
    return out


def task_of(method: str) -> int:
    return TASK if method == "multitask" else -1


def parity(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "parity.json").read_text()))


# ---- the same model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method"), [*[("llama", m) for m in PROMPTS], *[(kind, m) for kind in KINDS for m in METHODS]]
)
def test_a_baked_prompt_is_the_live_adapter_alone_and_in_padded_batches(
    kind: str, method: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(kind)
    adapter = make_prompt(base, tmp_path / "adapter", method)
    source, task = Model(str(base), (str(adapter),)), task_of(method)
    model = bake.transform(source, bake.Params(task=task), tmp_path / "baked", [], 0)
    assert model == Model(str(base), (str(tmp_path / "baked"),))
    assert parity(tmp_path / "baked")["passed"]

    live, ours = eager.open(source, eager.Params(task=task)), eager.open(model, eager.Params())
    answers = [live.generate([ids], 4, stop=False)[0].tokens for ids in ASKED]
    assert [answer.tokens for answer in ours.generate(ASKED, 4, stop=False)] == answers
    expected = [live.score([ids], [answer])[0].logprobs for ids, answer in zip(ASKED, answers, strict=True)]
    batch = [row.logprobs for row in ours.score(ASKED, answers)]
    alone = [ours.score([ids], [answer])[0].logprobs for ids, answer in zip(ASKED, answers, strict=True)]
    for row, one, own in zip(expected, batch, alone, strict=True):
        assert one == pytest.approx(row, abs=SAME) and own == pytest.approx(row, abs=SAME)
    with ours.without_adapters():
        plain = ours.score(ASKED, answers)
    assert plain[0].logprobs != pytest.approx(expected[0], abs=0.01)


def test_what_prompts_begin_with_together_is_computed_behind_the_virtual_tokens(
    tiny_base_fp32: Path, finished: Path
) -> None:
    engine = eager.open(Model(str(tiny_base_fp32), (str(finished),)), eager.Params())
    prompts = [[5, 6, 7, 8, 20 + n] + [9] * n for n in range(3)]
    together = engine.score(prompts, [[30, 31]] * 3)
    for ids, row in zip(prompts, together, strict=True):
        assert engine.score([ids], [[30, 31]])[0].logprobs == pytest.approx(row.logprobs, abs=SAME)


def test_requests_write_to_caches_of_their_own(tiny_base_fp32: Path, finished: Path) -> None:
    prefix = baked.load(baked.open_baked(finished), hf.load(str(tiny_base_fp32)))
    before = [keys.clone() for keys, _ in prefix.layers]
    one, two = prefix.start(2), prefix.start(2)
    one.layers[0].keys[0].fill_(7.0)
    one.layers[0].values[0].fill_(7.0)
    assert two.layers[0].keys.max() < 7 and two.layers[0].values.max() < 7
    assert one.layers[0].keys[1].max() < 7
    assert all(old.equal(keys) for old, (keys, _) in zip(before, prefix.layers, strict=True))


def test_a_prompt_is_baked_on_a_quantized_base_and_belongs_to_it(tiny_base: Path, prompt: Path, tmp_path: Path) -> None:
    source = int8.transform(Model(str(tiny_base), (str(prompt),)), int8.Params(), tmp_path / "int8", [], 0)
    model = bake.transform(source, bake.Params(), tmp_path / "baked", [], 0)
    certified = parity(tmp_path / "baked")
    assert certified["passed"] and certified["depth"] == "own"
    answers = eager.open(model, eager.Params()).generate(ASKED, 4, stop=False)
    assert len(answers) == len(ASKED)
    with pytest.raises(BadInput, match="was baked from int8"):
        eager.open(Model(str(tiny_base), model.adapters), eager.Params())
    with pytest.raises(BadInput, match="quantized") as refused:
        bake.transform(source, bake.Params(certify="full"), tmp_path / "other", [], 0)
    assert "own" in refused.value.hint


# ---- the certificate ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["tiny_base", "tiny_base_fp32"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_keys_at_positions_one_further_do_not_pass(
    dtype: str, method: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Planted: what a cache holds one position too far on. All shapes are right, and answers look like answers."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    base = request.getfixturevalue(dtype)
    adapter = make_prompt(base, tmp_path / "adapter", method)
    source = Model(str(base), (str(adapter),))
    bake.transform(source, bake.Params(), tmp_path / "right", [], 0)
    right = baked.open_baked(tmp_path / "right")

    live = baking.Live(base, open_adapter(adapter), None)
    layers = baked.tensors(right)
    positions = torch.ones(1, right.tokens, dtype=torch.long)
    cos, sin = live.base.model.rotary_emb(layers[0][0], positions)
    turned = [apply_rotary_pos_emb(keys[None], keys[None], cos, sin)[1][0] for keys, _ in layers]
    pairs = [(keys, values) for keys, (_, values) in zip(turned, layers, strict=True)]
    wrong = baked.write(tmp_path / "wrong", pairs, right.config["base"], {"peft_type": right.kind})
    prompts = certificate.prompts(base, [])
    assert baking.predictions(right, live, "own", prompts, str).passed
    assert baking.shapes(wrong, live).passed and baking.finite(wrong).passed
    assert not baking.predictions(wrong, live, "own", prompts, str).passed
    assert not baking.predictions(wrong, live, "full", prompts, str).passed


def test_a_prompt_that_is_silently_not_there_does_not_pass_and_is_kept_aside(
    tiny_base_fp32: Path,
    prompt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Planted: an engine that answers without the virtual tokens."""

    def plain(prefix: Any, base: Any, input_ids: Any) -> Any:
        return base(input_ids=input_ids)

    def here(job: TransformJob, *_: Any) -> Transformed:
        return Worker(lambda word, record: None).transform(job)

    monkeypatch.setattr(baking, "_begun", plain)
    monkeypatch.setattr(build, "make_artifact", here)  # where the fault is planted
    out = tmp_path / "out"
    assert command("bake", "--base", tiny_base_fp32, "--adapter", prompt, "--out", out) == 1
    assert "did not pass its certificate" in errors(capsys) and not out.exists()
    failed = [check for check in parity(tmp_path / "out.failed")["checks"] if not check["passed"]]
    assert [check["name"] for check in failed] == ["predictions"] and "prompt is lost" in failed[0]["detail"]


def test_values_that_are_not_finite_or_of_another_shape_do_not_pass(
    tiny_base_fp32: Path, prompt: Path, finished: Path, tmp_path: Path
) -> None:
    right = baked.open_baked(finished)
    live = baking.Live(tiny_base_fp32, open_adapter(prompt), None)
    layers = [(keys.clone(), values.clone()) for keys, values in baked.tensors(right)]
    layers[1][1][0, 0, 0] = float("nan")
    broken = baked.write(tmp_path / "nan", layers, right.config["base"], {"peft_type": right.kind})
    assert not baking.finite(broken).passed and baking.shapes(broken, live).passed
    halves = [(keys[:1], values[:1]) for keys, values in baked.tensors(right)]
    narrow = baked.write(tmp_path / "narrow", halves, right.config["base"], {"peft_type": right.kind})
    assert not baking.shapes(narrow, live).passed
    fewer = baked.write(tmp_path / "fewer", layers[:1], right.config["base"], {"peft_type": right.kind})
    assert not baking.shapes(fewer, live).passed


# ---- the folder --------------------------------------------------------------------------------


def test_the_folder_is_small_and_says_what_it_is_and_the_base_is_as_it_was(
    tiny_base_fp32: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "out", identity.of_folder(tiny_base_fp32)
    assert command("bake", "--base", tiny_base_fp32, "--adapter", prompt, "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["certificate"]["passed"] and printed["certificate"]["depth"] == "full"
    assert printed["model"] == {"path": str(tiny_base_fp32), "adapters": [str(out)]}
    assert identity.of_folder(tiny_base_fp32) == before
    assert {file.name for file in out.iterdir()} == {"baked.json", "prefix.safetensors", "parity.json"}
    whole = baked.open_baked(out)
    # two layers of keys and values: 2 heads, 5 tokens, 16 numbers of 4 bytes
    assert (whole.kind, whole.tokens, whole.layers, whole.kv_bytes) == ("PROMPT_TUNING", 5, 2, 2 * 2 * 2 * 5 * 16 * 4)
    assert whole.config["adapter"]["sha256"] == identity.of_file(prompt / "adapter_model.safetensors")
    assert set(parity(out)["tensors"]) == {"0.keys", "0.values", "1.keys", "1.values"}


def test_baking_leaves_its_input_and_the_working_folder_alone(
    tiny_base_fp32: Path,
    prompt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = [identity.of_folder(folder) for folder in (tiny_base_fp32, prompt)]
    bake.transform(Model(str(tiny_base_fp32), (str(prompt),)), bake.Params(), tmp_path / "out", [], 0)
    assert [identity.of_folder(folder) for folder in (tiny_base_fp32, prompt)] == before
    assert list(elsewhere.iterdir()) == []
    assert capfd.readouterr().out == "", "stdout is the worker's protocol"


def test_the_tokenizer_that_the_adapter_was_trained_with_comes_along(
    tiny_base_fp32: Path, prompt: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(prompt, tmp_path / "adapter"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_base_fp32 / name, adapter / name)
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}!")
    out = tmp_path / "out"
    assert command("bake", "--base", tiny_base_fp32, "--adapter", adapter, "--out", out) == 1, "unless it is wanted"
    own = ["--base", tiny_base_fp32, "--adapter", adapter, "--out", out, "--allow-base-mismatch"]
    assert command("bake", *own) == 0
    model = Model(str(tiny_base_fp32), (str(out),))
    assert hf.tokenizer_home(model) == str(out) == hf.template_home(model)
    engine = eager.open(model, eager.Params())
    ids, _ = engine.encode([{"role": "user", "content": "the dog"}])
    assert engine.decode(ids) == "the dog!"


def test_an_artifact_sits_on_what_it_was_made_from_and_is_as_large_as_both(tmp_path: Path) -> None:
    """As a recipe's [int8, bake] on a base of the user's."""
    home = store.Store(tmp_path)
    source = Model("base", ("adapter",))

    def quantized(out: Path) -> tuple[Model, dict[str, Any]]:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"w" * 1000)
        return Model(str(out), source.adapters), {"seconds": 1}

    def prefix(out: Path) -> tuple[Model, dict[str, Any]]:
        out.mkdir()
        (out / "prefix.safetensors").write_bytes(b"p" * 10)
        return Model(home.model("q" * 64, source).path, (str(out),)), {"seconds": 1}

    home.build(Build("q" * 64, "", Step("int8", "transform", "quantize")), quantized)
    step = Step("bake", "transform", "bake")
    artifact = home.build(Build("b" * 64, "q" * 64, step), prefix)
    assert artifact.size_bytes == 1010
    folders = [str(home.folder(each * 64) / "model") for each in "qb"]
    assert home.model("b" * 64, source) == Model(folders[0], (folders[1],))
    assert home.model("", source) == source


def test_bench_times_a_baked_prompt(tiny_base_fp32: Path, finished: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": n, "prompt": f"the lazy dog {n}"}) + "\n" for n in range(4)))
    arguments = ("--model", tiny_base_fp32, "--adapter", finished, "--prompts", prompts, "--blocks", 1)
    assert command("bench", *arguments, "--new-tokens", 2, "--json") == 0


# ---- refusals ----------------------------------------------------------------------------------


def changed(folder: Path, to: Path, **settings: Any) -> Path:
    """A copy of an adapter with other words in its config."""
    copy = Path(shutil.copytree(folder, to))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return copy


@pytest.mark.parametrize(
    ("settings", "why", "hint"),
    [
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, "puts no virtual tokens", "peftopt merge"),
        ({"peft_type": "IA3"}, "puts no virtual tokens", "peftopt merge"),
        ({"peft_type": "ADAPTION_PROMPT"}, "gated prompt tokens", "serve it live"),
        ({"peft_type": "XLORA"}, "depends on the input", "serve it live"),
        ({"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2}, "SEQ_2_SEQ_LM", "serve it live"),
        ({"auto_mapping": {"base_model_class": "MistralForCausalLM"}}, "trained on a Mistral", "--allow-base-mismatch"),
    ],
)
def test_what_is_no_prompt_of_its_own_is_refused_with_what_to_do_instead(
    settings: dict[str, Any],
    why: str,
    hint: str,
    tiny_base_fp32: Path,
    prompt: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = changed(prompt, tmp_path / "adapter", **settings)
    assert command("bake", "--base", tiny_base_fp32, "--adapter", adapter, "--out", tmp_path / "out") == 2
    told = errors(capsys)
    assert why in told and hint in told and not (tmp_path / "out").exists()


def test_an_adapter_that_brings_embeddings_is_refused(tiny_base_fp32: Path, prompt: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = Path(shutil.copytree(prompt, tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors")
    words = load_file(tiny_base_fp32 / "model.safetensors")["model.embed_tokens.weight"]
    file = adapter / "adapter_model.safetensors"
    save_file({**weights, "base_model.model.model.embed_tokens.weight": words}, file)
    with pytest.raises(BadInput, match="brings embeddings"):
        bake.transform(Model(str(tiny_base_fp32), (str(adapter),)), bake.Params(), tmp_path / "out", [], 0)


def test_none_and_several_adapters_are_refused(tiny_base_fp32: Path, prompt: Path, finished: Path) -> None:
    base = str(tiny_base_fp32)
    with pytest.raises(BadInput, match="no adapter"):
        bake.transform(Model(base), bake.Params(), Path("out"), [], 0)
    with pytest.raises(BadInput, match="2 adapters"):
        bake.transform(Model(base, (str(prompt),) * 2), bake.Params(), Path("out"), [], 0)
    with pytest.raises(BadInput, match="baked already"):
        bake.transform(Model(base, (str(finished),)), bake.Params(), Path("out"), [], 0)
    with pytest.raises(BadInput, match="with other adapters"):
        eager.open(Model(base, (str(finished), str(prompt))), eager.Params())
    with pytest.raises(BadInput, match="certify"):
        bake.transform(Model(base, (str(prompt),)), bake.Params(certify="blocks"), Path("out"), [], 0)


def test_a_multitask_adapter_needs_its_task_and_others_have_none(
    tiny_base_fp32: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_prompt(tiny_base_fp32, tmp_path / "adapter", "multitask")
    arguments = ("bake", "--base", tiny_base_fp32, "--out", tmp_path / "out", "--adapter")
    assert command(*arguments, adapter) == 2
    assert "3 tasks" in (told := errors(capsys)) and "--task" in told
    assert command(*arguments, adapter, "--task", 3) == 2
    assert "task 3" in errors(capsys)
    assert command(*arguments, prompt, "--task", 0) == 2
    assert "has no tasks" in errors(capsys)
    with pytest.raises(BadInput, match="3 tasks"):
        eager.open(Model(str(tiny_base_fp32), (str(adapter),)), eager.Params())
    baked_tasks = []
    for task in (0, 2):
        assert command(*arguments[:4], tmp_path / f"out{task}", "--adapter", adapter, "--task", task) == 0
        baked_tasks.append(baked.tensors(baked.open_baked(tmp_path / f"out{task}"))[0][0])
    assert not baked_tasks[0].equal(baked_tasks[1])


def test_a_base_whose_cache_is_not_keys_and_values_is_refused(tiny_base_fp32: Path, tmp_path: Path) -> None:
    import transformers

    settings = transformers.MambaConfig(vocab_size=384, hidden_size=64, num_hidden_layers=2, state_size=4)
    with pytest.raises(BadInput, match="mamba") as refused:
        baked.check_cache(settings, 5)
    assert "live" in refused.value.hint


def test_virtual_tokens_that_fill_a_sliding_window_are_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("mistral")
    adapter = make_prompt(base, tmp_path / "adapter", "prompt", tokens=16)
    with pytest.raises(BadInput, match="sliding window of 16") as refused:
        bake.transform(Model(str(base), (str(adapter),)), bake.Params(), tmp_path / "out", [], 0)
    assert "fewer" in refused.value.hint


def test_virtual_tokens_take_positions_of_prompts(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("gpt2")  # 128 positions
    adapter = make_prompt(base, tmp_path / "adapter", "prompt")
    source = Model(str(base), (str(adapter),))
    model = bake.transform(source, bake.Params(), tmp_path / "out", [], 0)
    for engine in (eager.open(source, eager.Params()), eager.open(model, eager.Params())):
        assert engine.positions == 123
        assert len(engine.generate([[7] * 119], 4, stop=False)[0].tokens) == 4
        with pytest.raises(BadInput, match="5 virtual tokens"):
            engine.generate([[7] * 120], 4, stop=False)
        with pytest.raises(BadInput, match="5 virtual tokens"):
            engine.score([[7] * 120], [[8] * 4])
    crowded = make_prompt(base, tmp_path / "crowded", "prompt", tokens=120)
    with pytest.raises(BadInput, match="no room"):
        bake.transform(Model(str(base), (str(crowded),)), bake.Params(), tmp_path / "other", [], 0)


def test_a_prefix_that_does_not_fit_the_base_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Falcon shares one head of keys among all queries, and PEFT makes one for each."""
    adapter = make_prompt(bases("falcon"), tmp_path / "adapter", "prefix")
    with pytest.raises(BadInput, match="4 heads of 16") as refused:
        bake.transform(Model(str(bases("falcon")), (str(adapter),)), bake.Params(), tmp_path / "out", [], 0)
    assert "PROMPT_TUNING" in refused.value.hint


def test_another_base_is_refused_by_what_it_holds(tiny_base_fp32: Path, finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def opened(base: Path) -> None:
        eager.open(Model(str(base), (str(finished),)), eager.Params()).close()

    copy = Path(shutil.copytree(tiny_base_fp32, tmp_path / "elsewhere"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    opened(copy)  # the same model at another place, saved by another version
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(BadInput, match="another config"):
        opened(copy)
    shutil.copyfile(tiny_base_fp32 / "config.json", copy / "config.json")
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"] *= 1.01
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="other weights") as refused:
        opened(copy)
    assert "bake" in refused.value.hint


@pytest.mark.parametrize("fault", ["no file", "cut", "other tokens", "no number"])
def test_a_folder_that_is_not_whole_is_refused(
    fault: str, tiny_base_fp32: Path, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "baked"))
    weights, config = folder / "prefix.safetensors", json.loads((folder / "baked.json").read_text())
    if fault == "no file":
        weights.unlink()
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif fault == "other tokens":
        (folder / "baked.json").write_text(json.dumps({**config, "virtual_tokens": 6}))
    else:
        (folder / "baked.json").write_text(json.dumps({**config, "layers": "two"}))
    with pytest.raises(BadInput) as refused:
        eager.open(Model(str(tiny_base_fp32), (str(folder),)), eager.Params())
    assert "bake it again" in refused.value.hint


def test_what_reads_a_folder_again_and_again_keeps_nothing_of_it(tmp_path: Path) -> None:
    """A server loads and unloads it, and the gateway checks it before each load."""
    layers = [tuple(torch.zeros(1, 3, 2, dtype=torch.bfloat16) for _ in range(2)) for _ in range(100)]
    folder = baked.write(tmp_path / "baked", layers, {}, {"peft_type": "P_TUNING"}).folder
    tensors, loads = 2 * len(layers), 10

    def load() -> None:
        checks.adapter(folder, None, 0)
        baked.tensors(baked.open_baked(folder))

    def objects() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    for _ in range(3):
        load()
    before = objects()
    for _ in range(loads):
        load()
    assert (objects() - before) / loads < tensors / 10


def test_a_step_bake_does_not_follow_one_that_writes_other_weights() -> None:
    before = [Step("gguf", "transform", "quantize")]
    with pytest.raises(BadInput, match="gguf"):
        bake.check(Path("base"), bake.Params(), before, [])
    bake.check(Path("base"), bake.Params(), [Step("nf4", "transform", "quantize")], [])
