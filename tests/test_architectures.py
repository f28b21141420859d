"""Quantizing other architectures than Llama: right, or refused before anything is calibrated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.architectures import KINDS, config, make
from helpers.command_line import command
from helpers.tiny_models import TEXTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peftopt import plugins
from peftopt.errors import BadInput, WorkerFailed
from peftopt.models import hf, provenance
from peftopt.records import Model
from peftopt.runner import build
from peftopt.transforms import _layers, _smoothing


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a model of a kind, once."""
    home, made = tmp_path_factory.mktemp("kinds"), dict[tuple[str, ...], Path]()

    def get(kind: str, dtype: str = "bfloat16") -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = make(home / f"{kind}-{dtype}", kind, tiny_base, dtype)
        return made[kind, dtype]

    return get


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "calibration.jsonl"
    rows = [{"id": n, "prompt": text, "expected": text} for n, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def predictions(folder: Path) -> Any:
    """Log-probabilities [1, 60, vocabulary]."""
    import torch

    with torch.no_grad():
        logits = hf.load(str(folder))(input_ids=torch.arange(3, 63)[None]).logits
    return torch.log_softmax(logits.float(), -1)


def divergence(base: Path, other: Path) -> float:
    before, after = predictions(base), predictions(other)
    return float((before.exp() * (before - after)).sum(-1).mean())


def transformed(method: str, base: Path, out: Path, texts: list[str], **settings: Any) -> None:
    source = plugins.module("transform", method)
    source.transform(Model(str(base)), source.Params(**settings), out, texts, 0)


# ---- smoothing ---------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, Any]]:
    encode = hf.tokenizer(str(folder))
    return [dict(encode(text, return_tensors="pt", return_token_type_ids=False)) for text in TEXTS[:8]]


@pytest.mark.parametrize(
    ("kind", "norms"),
    [
        *[("llama", 4), ("gemma2", 4), ("gemma3", 4), ("phi", 2), ("cohere", 2), ("gpt_neox", 4), ("opt", 4)],
        ("olmo2", 0),  # norms after the layers: nothing reads them but the sum
        ("qwen3_moe", 2),  # a router reads the other two
    ],
)
def test_smoothing_alone_leaves_the_model_what_it_is(kind: str, norms: int, bases: Any) -> None:
    import torch

    model, rows = hf.load(str(bases(kind, "float32"))), rows_of(bases(kind))
    layers = _layers.find(model.config).layers
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in layers}
    with torch.no_grad():
        before = model(**rows[0]).logits
        found, said = _smoothing.smooth(model, rows, layers, 0.8)
        after = model(**rows[0]).logits
    assert found["norms"] == norms and bool(said) is (kind in ("olmo2",))
    changed = [n for n, old in weights.items() if not torch.equal(old, model.get_submodule(n).weight)]
    assert len(changed) == found["layers"] and bool(changed) is bool(norms)
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


def test_a_small_weight_of_gemmas_norms_keeps_its_scale_when_it_is_rounded(bases: Any) -> None:
    """1 + w is what multiplies: near w = -1 bf16 has two digits, and the layers have to get the scale that is left."""
    import torch

    model, rows = hf.load(str(bases("gemma2"))), rows_of(bases("gemma2"))
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("input_layernorm"):
                module.weight.fill_(-0.9)
        found, _ = _smoothing.smooth(model, rows, _layers.find(model.config).layers, 0.8)
    assert found["norms"] == 4 and found["kl"] < 0.002


def test_a_norm_with_a_reader_that_is_not_named_is_not_scaled(bases: Any) -> None:
    """Phi's attention and MLP read one norm: without fc1 the model would be another one."""
    model, rows = hf.load(str(bases("phi"))), rows_of(bases("phi"))
    whole = _smoothing.readers(model, rows[0])
    inside = [group for group in whole if "layernorm" in group.source and "final" not in group.source]
    assert [len(group.readers) for group in inside] == [4, 4]
    halves = [group._replace(readers=group.readers[:3]) for group in inside]
    assert _smoothing.unchanged(model, rows[0], inside) == inside
    assert _smoothing.unchanged(model, rows[0], halves) == []


def test_a_smoothed_model_that_is_another_one_is_refused(bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = hf.load(str(bases("phi"))), rows_of(bases("phi"))
    halves = [g._replace(readers=g.readers[:3]) for g in _smoothing.readers(model, rows[0])]
    monkeypatch.setattr(_smoothing, "unchanged", lambda *_: [g for g in halves if "input" in g.source])
    with pytest.raises(WorkerFailed, match="smoothing alone"):
        _smoothing.smooth(model, rows, _layers.find(model.config).layers, 0.8)


@pytest.mark.parametrize("kind", ["gemma2", "phi"])
def test_w8a8_is_near_the_model(kind: str, bases: Any, task: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "out", bases(kind)
    assert command("quantize", "--method", "w8a8", "--model", base, "--calibration", task, "--out", out) == 0
    assert divergence(base, out) < 0.02
    made = provenance.read(out)
    assert made and made["smoothing"]["norms"] and made["smoothing"]["kl"] < 0.02


# ---- experts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_written_as_transformers_reads_them(
    kind: str, bases: Any, calibration_texts: list[str], tmp_path: Path
) -> None:
    base = bases(kind)
    transformed("gptq", base, tmp_path / "out", calibration_texts, bits=8)
    assert divergence(base, tmp_path / "out") < 0.05
    assert _layers.unrounded(base, tmp_path / "out") < 0.1
    stored, names = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    experts = [name for name in names if ".experts." in name]
    assert experts and all(f"{name}_packed" in stored for name in experts)


def test_experts_are_never_the_layers_that_stay_at_8_bits(
    bases: Any, calibration_texts: list[str], tmp_path: Path
) -> None:
    """transformers reads one scheme for all of them."""
    transformed("gptq", bases("mixtral"), tmp_path / "out", calibration_texts, mixed=0.5)
    made = provenance.read(tmp_path / "out")
    assert made and made["mixed"]["spared"]
    assert not any("experts" in name for unit in made["mixed"]["spared"] for name in unit["layers"])
    assert _layers.unrounded(bases("mixtral"), tmp_path / "out") < 0.1
    hf.load(str(tmp_path / "out"))


@pytest.mark.parametrize("method", ["int8", "nf4", "bnb8"])
def test_experts_that_stay_as_they_are_are_named(method: str, bases: Any, tmp_path: Path) -> None:
    transformed(method, bases("mixtral"), tmp_path / "out", [])
    made = provenance.read(tmp_path / "out")
    (said,) = made["notices"] if made else []
    assert "experts" in said and "%" in said and "gptq" in said


@pytest.mark.parametrize(
    ("kind", "method", "settings", "says"),
    [
        ("mixtral", "awq", {}, "use gptq"),
        ("mixtral", "w8a8", {}, "use gptq"),
        ("qwen3_moe", "gptq", {"keep": "experts.1.up_proj"}, "all or none"),
        ("gpt_oss", "gptq", {}, "gguf"),
        ("opt", "awq", {}, "use gptq"),
        ("gpt_neox", "awq", {}, "use gptq"),
        ("olmo2", "awq", {}, "use gptq"),
        ("falcon", "gptq", {}, "almost nothing"),
        ("falcon", "fp8", {}, "almost nothing"),
        ("falcon", "int8", {}, "almost nothing"),
        ("falcon", "nf4", {}, "almost nothing"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_a_weight_is_read(
    kind: str,
    method: str,
    settings: dict[str, Any],
    says: str,
    bases: Any,
    calibration_texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unread(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(hf, "load", unread)
    texts = calibration_texts if plugins.catalogue()[method].calibrates else []
    with pytest.raises(BadInput) as refused:
        transformed(method, bases(kind), tmp_path / "out", texts, **settings)
    assert says in f"{refused.value.message} {refused.value.hint}" and not (tmp_path / "out").exists()


def test_a_model_that_is_nearly_all_experts_is_refused() -> None:
    few = _layers.find(config("mixtral", intermediate_size=512, num_local_experts=8))
    with pytest.raises(BadInput, match="almost nothing") as refused:
        _layers.left_alone(few, "int8")
    assert "gptq" in refused.value.hint
    assert _layers.left_alone(_layers.find(config("llama")), "int8") == []


def test_a_folder_in_which_nothing_was_rounded_is_not_verified(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_layers, "unrounded", lambda *_: 1.0)
    assert command("quantize", "--method", "int8", "--model", bases("llama"), "--out", tmp_path / "out") == 1
    assert "nothing was quantized" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert _layers.unrounded(bases("llama"), bases("llama")) == 1.0


def test_a_quantized_folder_with_weights_that_nobody_reads_is_refused(bases: Any, tmp_path: Path) -> None:
    transformed("int8", bases("llama"), tmp_path / "out", [])
    hf.load(str(tmp_path / "out"))
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    stored = load_file(file)
    stray = stored["model.norm.weight"].clone()
    save_file({**stored, "model.layers.0.mlp.experts.0.w1.weight": stray}, file, metadata)
    with pytest.raises(BadInput, match=r"experts\.0\.w1"):
        hf.load(str(tmp_path / "out"))
    with pytest.raises(WorkerFailed, match="unusable"):
        int8, made = plugins.catalogue()["int8"], Model(str(tmp_path / "out"))
        with build._opener(int8, made, tmp_path / "log", 1, 120) as opener:
            build._verified(opener, int8, made, Model(str(bases("llama"))), (), tmp_path / "log", 1, 120)


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_a_generation_config_that_transformers_would_not_write_is_copied(
    method: str, bases: Any, tmp_path: Path
) -> None:
    """As Llama 2 has it: a temperature, and no sampling."""
    base = make(tmp_path / "base", "llama", bases("llama"))
    text = '{"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}'
    (base / "generation_config.json").write_text(text)
    transformed(method, base, tmp_path / "out", [])
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


def test_no_generation_config_is_made_up(bases: Any, tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama", bases("llama"))
    (base / "generation_config.json").unlink()
    assert command("quantize", "--method", "int8", "--model", base, "--out", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_calibration_rows_are_cut_at_the_positions_that_a_model_has(bases: Any, tmp_path: Path) -> None:
    base, file = bases("opt"), tmp_path / "long.jsonl"
    rows = [{"id": n, "prompt": " ".join([text] * 20)} for n, text in enumerate(TEXTS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert command("quantize", "--method", "gptq", "--model", base, "--calibration", file, "--out", out) == 0
    made = provenance.read(out)
    assert made and made["calibration"]["tokens"] == 32 * 128


def test_a_prompt_longer_than_the_positions_is_a_mistake_of_the_user(
    bases: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"id": 0, "prompt": "the fox " * 200}) + "\n")
    assert command("bench", "--model", bases("opt"), "--prompts", file, "--blocks", 1, "--new-tokens", 4) == 2
    assert "128 positions" in " ".join(capsys.readouterr().err.split())


def test_every_kind_of_these_tests_is_one_that_transformers_has() -> None:
    assert all(config(kind).vocab_size == 384 for kind in KINDS)
