"""Merging what people really have: adapters and bases that other tools wrote, saved half, or put in odd places."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import saved, without
from helpers.tiny_models import make_base, make_lora

from peftopt.errors import BadInput
from peftopt.models import hf
from peftopt.models.adapter import open_adapter
from peftopt.models.checkpoint import open_model
from peftopt.probes.weights import foreign_words
from peftopt.records import Model
from peftopt.runner import preflight
from peftopt.transforms import merge

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Edit = Callable[[dict[str, Any]], dict[str, Any]]


def tensors(file: Path, change: Edit | None = None) -> dict[str, Any]:
    """A file's tensors, changed in place if asked."""
    from safetensors.torch import load_file, save_file

    found: dict[str, Any] = load_file(file)
    if change:
        found = {name: value.contiguous() for name, value in change(found).items()}
        save_file(found, file, {"format": "pt"})
    return found


def settings(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def lora(tiny_lora: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_lora, tmp_path / "adapter"))


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def merged(base: Path, adapter: Path, out: Path, **params: Any) -> Path:
    """As the verb does: looked at first, then merged."""
    preflight.check_base(base, quantized=True, ours=False)
    preflight.check_adapter(adapter, base, ["merge"])
    given = merge.Params(**{"certify": "blocks", **params})
    merge.transform(Model(str(base), (str(adapter),)), given, out, [], 0)
    assert json.loads((out / "parity.json").read_text())["passed"]
    return out


def difference(base: Path, adapter: Path, out: Path, resize: int = 0) -> tuple[float, float]:
    """Largest distance of the merged folder's logits from PEFT's live adapter's, and from the base's."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    ids = torch.arange(3, 60)[None]
    model = load(base)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        if resize:
            model.resize_token_embeddings(resize)
        live = PeftModel.from_pretrained(model, str(adapter)).eval()(input_ids=ids).logits
        found = load(out)(input_ids=ids).logits
    assert found.shape == live.shape
    shared = min(plain.shape[-1], found.shape[-1])
    return float((found - live).abs().max()), float((found[..., :shared] - plain[..., :shared]).abs().max())


# ---- what is refused, and by which name ----------------------------------------------------------


def _empty(t: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.zeros(0) if "lora_B" in name else value for name, value in t.items()}


ADAPTERS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "gathered not": (lambda a: tensors(a / WEIGHTS, _empty), "lora_B.* is empty"),
    "no tensor": (lambda a: tensors(a / WEIGHTS, lambda _: {}), "no tensor"),
    "FSDP": (
        lambda a: tensors(
            a / WEIGHTS, lambda t: {k.replace("layers.", "layers._fsdp_wrapped_module."): v for k, v in t.items()}
        ),
        "FSDP.*_fsdp_wrapped_module",
    ),
    "checkpointing": (
        lambda a: tensors(
            a / WEIGHTS,
            lambda t: {re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", k): v for k, v in t.items()},
        ),
        "activation checkpointing",
    ),
    "alpha null": (lambda a: settings(a / CONFIG, lora_alpha=None), "lora_alpha is null"),
    "alpha a word": (lambda a: settings(a / CONFIG, lora_alpha="8"), 'lora_alpha is "8"'),
    "rank pattern": (lambda a: settings(a / CONFIG, rank_pattern={"q_proj": "8"}), "rank_pattern of q_proj"),
    "small letters": (lambda a: settings(a / CONFIG, peft_type="lora"), 'peft_type is "lora"'),
    "enum's name": (lambda a: settings(a / CONFIG, peft_type="PeftType.LORA"), 'peft_type is "PeftType.LORA"'),
    "type null": (lambda a: settings(a / CONFIG, peft_type=None), "peft_type is null"),
    "byte order mark": (
        lambda a: (a / CONFIG).write_bytes(b"\xef\xbb\xbf" + (a / CONFIG).read_bytes()),
        "byte order mark",
    ),
    "targets null": (lambda a: settings(a / CONFIG, target_modules=None), "has no target_modules.*q_proj"),
    "MLX": (lambda a: (a / WEIGHTS).rename(a / "adapters.safetensors"), "MLX"),
    "shards": (lambda a: (a / WEIGHTS).rename(a / "adapter_model-00001-of-00002.safetensors"), "shards"),
    "a folder above": (
        lambda a: shutil.move(a, a.parent / "x") and shutil.copytree(a.parent / "x", a / "step-7"),
        "step-7",
    ),
    "headless": (
        lambda a: (
            settings(a / CONFIG, task_type="FEATURE_EXTRACTION"),
            tensors(a / WEIGHTS, lambda t: {k.replace("model.model.", "model.", 1): v for k, v in t.items()}),
        ),
        "without its head.*FEATURE_EXTRACTION",
    ),
}


@pytest.mark.parametrize("why", ADAPTERS)
@pytest.mark.fault(21, "refused by what is wrong with it")
@pytest.mark.fault(22, "a config that cannot be is refused with the field's name")
def test_an_adapter_that_cannot_be_read_is_refused_by_what_is_wrong_with_it(
    why: str, tiny_base: Path, lora: Path, tmp_path: Path
) -> None:
    spoil, said = ADAPTERS[why]
    spoil(lora)
    with pytest.raises(BadInput) as refused:
        merged(tiny_base, lora, tmp_path / "out")
    assert re.search(said, f"{refused.value.message} {refused.value.hint}")
    assert not (tmp_path / "out").exists()


def test_a_name_on_the_hub_is_told_from_a_folder(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    for given in ((Path("org/model"), tiny_lora), (tiny_base, Path("org/model"))):
        with pytest.raises(BadInput) as refused:
            merged(*given, tmp_path / "out")
        assert "hf download org/model" in refused.value.hint


def test_two_sets_of_weights_and_a_stale_index_are_told_apart(base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    index = base / "model.safetensors.index.json"
    names = tensors(base / "model.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    with pytest.raises(BadInput) as stale:
        merged(base, tiny_lora, tmp_path / "out")
    assert "the index is stale" in stale.value.hint
    shutil.copy(base / "model.safetensors", base / "model-00001-of-00001.safetensors")
    with pytest.raises(BadInput, match="two sets of weights"):
        merged(base, tiny_lora, tmp_path / "out")
    (base / "model.safetensors").unlink()
    merged(base, tiny_lora, tmp_path / "out")


def test_an_index_may_name_a_tied_head_and_leave_out_tensors_of_no_layer(
    base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    file = (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    names = [*tensors(file), "lm_head.weight"]
    tensors(file, lambda t: {**t, "mtp.layers.0.norm.weight": next(iter(t.values())).clone()})
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file.name)}))
    out = merged(base, tiny_lora, tmp_path / "out")
    with open_model(out) as found:
        assert "mtp.layers.0.norm.weight" in found.entries


def test_an_adapters_config_among_the_bases_files_is_refused(base: Path, lora: Path, tmp_path: Path) -> None:
    shutil.copy(lora / CONFIG, base)
    with pytest.raises(BadInput, match=CONFIG):
        merged(base, lora, tmp_path / "out")


def test_quantized_bases_are_refused_without_asking_for_their_readers(
    base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    settings(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BadInput, match=r"already quantized \(gptq\)"):
        merged(base, tiny_lora, tmp_path / "out")


def test_eight_bit_floats_without_scales_are_refused(base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    import torch

    key = "model.layers.0.mlp.down_proj.weight"
    tensors(base / "model.safetensors", lambda t: {**t, key: t[key].to(torch.float8_e4m3fn)})
    with pytest.raises(BadInput, match=re.escape(key)):
        merged(base, tiny_lora, tmp_path / "out")


@pytest.mark.parametrize("certify", ["blocks", "full"])
def test_a_base_that_lacks_a_weight_is_not_merged_into(
    certify: str, base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    without(base, "model.norm.weight")
    with pytest.raises(BadInput, match=r"lacks model\.norm\.weight"):
        merged(base, tiny_lora, tmp_path / "out", certify=certify)


def test_the_verb_finds_a_missing_weight_beside_a_merge_in_blocks(base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    without(base, "model.layers.0.input_layernorm.weight")
    command = [sys.executable, "-m", "peftopt.cli", "merge", "--certify", "blocks", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--base", str(base), "--adapter", str(tiny_lora)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "lacks model.layers.0.input_layernorm.weight" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- what merges after all -----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "trained", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [64, 65, 66]}]
)
def test_new_tokens_are_merged_as_peft_saved_them(trained: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = saved("tied" if tied else "llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(67)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **trained)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    out = merged(base, tmp_path / "adapter", tmp_path / "out")
    ours, away = difference(base, tmp_path / "adapter", out, resize=67)
    assert ours < 1e-4 < away


def test_new_tokens_whose_head_the_adapter_does_not_bring_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = saved("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(67)
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[64, 65, 66])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    tensors(tmp_path / "adapter" / WEIGHTS, lambda t: {k: v for k, v in t.items() if "lm_head" not in k})
    with pytest.raises(BadInput, match="lm_head"):
        merged(base, tmp_path / "adapter", tmp_path / "out")


def experts(base: Path, folder: Path, numbers: range) -> Path:
    """An adapter of transformers 4: a pair for each of these experts, by the checkpoint's names."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(3)
    pairs = {}
    for layer in range(2):
        for expert in numbers:
            for name, (wide, high) in {"w1": (32, 48), "w3": (32, 48), "w2": (48, 32)}.items():
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                pairs[f"{key}.lora_A.weight"] = torch.randn(2, wide) * 0.3
                pairs[f"{key}.lora_B.weight"] = torch.randn(high, 2) * 0.3
    folder.mkdir()
    save_file(pairs, folder / WEIGHTS, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["w1", "w2", "w3"],
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("certify", ["blocks", "full"])
def test_a_pair_for_each_expert_is_merged_and_run_as_one_for_all(certify: str, tmp_path: Path) -> None:
    base = saved("mixtral", tmp_path / "base")
    adapter = experts(base, tmp_path / "adapter", range(3))
    out = merged(base, adapter, tmp_path / "out", certify=certify)
    ours, away = difference(base, adapter, out)
    assert ours < 1e-4 < away
    hf.attach(hf.load(str(base)), str(adapter))


def test_pairs_for_some_experts_only_are_refused_everywhere(tmp_path: Path) -> None:
    base = saved("mixtral", tmp_path / "base")
    adapter = experts(base, tmp_path / "adapter", range(2))
    with pytest.raises(BadInput, match="some of the experts"):
        preflight.check_adapter(adapter, base, [])


def test_square_layers_of_gpt2_are_transposed_whatever_the_config_says(tmp_path: Path) -> None:
    base = saved("gpt2", tmp_path / "base")
    make_lora(base, tmp_path / "adapter", target_modules=["attn.c_proj"], fan_in_fan_out=True, std=1.0)
    settings(tmp_path / "adapter" / CONFIG, fan_in_fan_out=False)
    out = merged(base, tmp_path / "adapter", tmp_path / "out")
    ours, away = difference(base, tmp_path / "adapter", out)
    assert ours < 1e-4 < away


def test_a_tensor_that_the_model_computes_with_in_fp32_stays_in_fp32(tmp_path: Path) -> None:
    import torch
    import transformers

    small = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.DeepseekV3Config(
        **small, num_key_value_heads=2, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, n_group=2,
        num_experts_per_tok=2, topk_group=1, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    (key,) = (k for k in tensors(base / "model.safetensors") if "e_score" in k)
    tensors(base / "model.safetensors", lambda t: {**t, key: 8 + torch.rand(t[key].shape)})
    make_lora(base, tmp_path / "adapter", target_modules=["o_proj"])
    out = tensors(merged(base, tmp_path / "adapter", tmp_path / "out", dtype="bf16") / "model.safetensors")
    assert out[key].equal(tensors(base / "model.safetensors")[key])
    assert {value.dtype for name, value in out.items() if name != key} == {torch.bfloat16}


@pytest.mark.parametrize("inline", [False, True])
def test_the_bases_chat_template_stays_where_the_adapters_tokenizer_has_none(
    inline: bool, base: Path, lora: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    template = tokenizer.chat_template
    if inline:  # as older versions saved it
        (base / "chat_template.jinja").unlink()
        settings(base / "tokenizer_config.json", chat_template=template)
    tokenizer.chat_template = None
    tokenizer.add_tokens(["<<own>>"])
    tokenizer.save_pretrained(lora)
    out = merged(base, lora, tmp_path / "out")
    model = Model(str(base), (str(lora),))
    live = hf.tokenizer(hf.tokenizer_home(model), model.path)
    made = AutoTokenizer.from_pretrained(out)
    assert made.chat_template == live.chat_template == template
    assert "<<own>>" in made.get_vocab()
    assert not foreign_words(out, model)


def test_a_packed_base_fits_the_adapter_that_was_trained_on_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_base(tmp_path / "whole", "bfloat16")
    make_lora(tmp_path / "whole", tmp_path / "adapter")
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=packing).save_pretrained(base)
    settings(tmp_path / "adapter" / CONFIG, base_model_name_or_path="org/some-bnb-4bit")
    merged(base, tmp_path / "adapter", tmp_path / "out", merge_base="dequantized")


def test_an_adapter_is_opened_by_what_its_config_really_says(lora: Path) -> None:
    settings(lora / CONFIG, lora_alpha=8.0, rank_pattern={}, alpha_pattern=None)
    with open_adapter(lora).weights:
        pass
