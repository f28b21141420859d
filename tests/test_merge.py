"""Merging: every PEFT type and architecture gives the live adapter's logits, or is refused with what to do instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from peftopt.checkpoint import open_model
from peftopt.records import Model
from peftopt.transforms import merge

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 128}

ARCHITECTURES: Mapping[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", {**LLAMA, "tie_word_embeddings": False}, LINEAR),
    "llama-tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}, LINEAR),
    "qwen2": ("Qwen2", {**LLAMA, "tie_word_embeddings": True}, LINEAR),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}, ["c_attn", "c_proj", "c_fc"]),
    "opt": (
        "OPT",
        {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 128},
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    "mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}, LINEAR[:4]),
}


def peft_config(kind: str, **settings: Any) -> Any:
    import peft

    return getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random fp32 model of each architecture, made when it is first asked for."""
    root = tmp_path_factory.mktemp("architectures")

    def base(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            import torch
            import transformers

            family, settings, _ = ARCHITECTURES[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{family}Config")(initializer_range=0.2, **settings)
            model = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(
                config
            )
            model.save_pretrained(folder)
        return folder

    return base


def make_adapter(base: Path, folder: Path, config: Any, std: float = 0.05) -> Path:
    """An adapter of any type on `base`, every trainable weight moved by noise of size `std`."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    adapted.save_pretrained(folder)
    return folder


def logits(base: Path, adapter: Path | None = None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(3, 63)[None]).logits


def merged(base: Path, *adapters: Path, out: Path, **params: Any) -> Path:
    settings = merge.Params(**{"certify": "blocks", **params})
    merge.transform(Model(str(base), tuple(map(str, adapters))), settings, out, [], 0)
    assert certificate(out)["passed"]
    return out


def certificate(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "parity.json").read_text())
    return found


def assert_same_model(base: Path, adapter: Path, out: Path) -> None:
    """The merged and reloaded model is the live adapter (1e-4), and not the base."""
    live, plain, found = logits(base, adapter), logits(base), logits(out)
    assert (live - plain).abs().max() > 0.01, "the adapter must do something"
    assert (found - live).abs().max() < 1e-4


# ---- types -------------------------------------------------------------------------------------

Q_V = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
TYPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "lora": ("Lora", {"r": 4, "target_modules": LINEAR}),
    "rslora": ("Lora", {"r": 4, "use_rslora": True, "target_modules": LINEAR}),
    "rank and alpha patterns": (
        "Lora",
        {
            "r": 4,
            "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"k_proj": 3},
            "target_modules": LINEAR,
        },
    ),
    "lora by pattern": ("Lora", {"r": 4, "target_modules": r".*\.self_attn\.(q|v)_proj"}),
    "lora on some layers": ("Lora", {"r": 4, "layers_to_transform": [1], **Q_V}),
    "lora with bias": ("Lora", {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "lora of gaussian init": ("Lora", {"r": 4, "init_lora_weights": "gaussian", **Q_V}),
    "dora": ("Lora", {"r": 4, "use_dora": True, **Q_V}),
    "lora and a whole norm": ("Lora", {"r": 4, "modules_to_save": ["norm", "lm_head"], **Q_V}),
    "lora on embeddings": ("Lora", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    "lora on the head": ("Lora", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    "lora and tokens": ("Lora", {"r": 4, "trainable_token_indices": [5, 7], **Q_V}),
    "adalora": ("AdaLora", {"init_r": 6, "target_r": 4, "total_step": 10, **Q_V}),
    "loha": ("LoHa", {"r": 4, **Q_V}),
    "lokr": ("LoKr", {"r": 4, **Q_V}),
    "vera": ("Vera", {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
    "oft": ("OFT", {"oft_block_size": 8, "use_cayley_neumann": False, **Q_V}),
    "boft": ("BOFT", {"boft_block_size": 8, **Q_V}),
    "ia3": ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ln tuning": ("LNTuning", {"target_modules": ["input_layernorm", "norm"]}),
    "fourierft": ("FourierFT", {"n_frequency": 50, **Q_V}),
    "hra": ("HRA", {"r": 4, **Q_V}),
    "vblora": ("VBLoRA", {"r": 4, "num_vectors": 16, "vector_length": 16, "topk": 2, **Q_V}),
    "miss": ("Miss", {"r": 4, **Q_V}),
    "randlora": ("RandLora", {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
    "trainable tokens": ("TrainableTokens", {"token_indices": [4, 5, 9], "target_modules": ["embed_tokens"]}),
    "shira": ("Shira", {"r": 4, **Q_V}),
    "c3a": ("C3A", {"block_size": 16, **Q_V}),
    "road": ("Road", {"group_size": 16, **Q_V}),
    "waveft": ("WaveFT", {"n_frequency": 50, **Q_V}),
    "delora": ("Delora", {"r": 4, **Q_V}),
    "gralora": ("Gralora", {"r": 4, "gralora_k": 2, **Q_V}),
    "osf": ("OSF", {"effective_rank": 8, **Q_V}),
    "tinylora": ("TinyLora", {"r": 2, **Q_V}),
    "psoft": ("Psoft", {"r": 8, **Q_V}),
    "hira": ("Hira", {"r": 4, **Q_V}),
    "adamss": ("Adamss", {"r": 4, **Q_V}),
    "unilora": ("UniLora", {"r": 4, **Q_V}),
    "glora": ("Glora", {"r": 4, **Q_V}),
    "frod": ("Frod", {**Q_V}),
    "deft": ("Deft", {"r": 4, **Q_V}),
    "beft": ("Beft", {"target_modules": ["v_proj"]}),
    "peanut": ("Peanut", {"r": 4, **Q_V}),
    "supertuning": ("Supertuning", {**Q_V}),
    "pvera": ("Pvera", {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
}


BIASED = ("lora with bias", "beft")
"""Types whose delta has a bias, which only a base with biases can take."""


@pytest.mark.parametrize("name", TYPES)
def test_every_type_merges_to_the_live_adapter(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    kind, settings = TYPES[name]
    if name == "adamss":
        pytest.importorskip("sklearn")
    base = bases("qwen2" if name in BIASED else "llama")
    adapter = make_adapter(base, tmp_path / "adapter", peft_config(kind, **settings))
    assert_same_model(base, adapter, merged(base, adapter, out=tmp_path / "out"))


def test_the_types_are_all_that_peft_has() -> None:
    """A new PEFT type has to be put in the matrix, or among those that cannot be merged."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from peftopt.adapter import NO_DELTA

    names = {f"{kind}Config" for kind, _ in TYPES.values()}
    tested = {kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config.__name__ in names}
    assert {kind.value for kind in peft.PeftType} == tested | NO_DELTA.keys()


# ---- architectures -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_merges_to_the_live_adapter(
    name: str, settings: dict[str, Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(name)
    config = peft_config("Lora", r=4, target_modules=ARCHITECTURES[name][2], **settings)
    adapter = make_adapter(base, tmp_path / "adapter", config)
    out = merged(base, adapter, out=tmp_path / "out")
    assert_same_model(base, adapter, out)
    assert (out / "model.safetensors").stat().st_size == (base / "model.safetensors").stat().st_size
    assert ("blocks" in certificate(out)["method"]) == (not settings and name != "gpt2")


def test_fused_experts_are_merged_and_split_again(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("mixtral")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft_config("Lora", r=2, target_modules=["q_proj"], target_parameters=experts)
    adapter = make_adapter(base, tmp_path / "adapter", config)
    out = merged(base, adapter, out=tmp_path / "out")
    assert_same_model(base, adapter, out)
    with open_model(base) as before, open_model(out) as after:
        assert [(e.name, e.shape) for e in before.entries.values()] == [
            (e.name, e.shape) for e in after.entries.values()
        ]


def test_a_checkpoint_with_older_names_is_understood(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """GPT-2 as it lies on the hub has no `transformer.` before its names."""
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(bases("gpt2"), base)
    weights = load_file(base / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    adapter = make_adapter(base, tmp_path / "adapter", peft_config("Lora", r=4, target_modules=["c_attn", "c_fc"]))
    out = merged(base, adapter, out=tmp_path / "out")
    assert_same_model(base, adapter, out)
    assert "h.0.attn.c_attn.weight" in open_model(out).entries


# ---- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, True),
        ({"target_modules": ["q_proj"]}, True),
    ],
    ids=lambda value: ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_tied_embeddings_stay_tied_exactly_when_they_are_still_one(
    settings: dict[str, Any], tied: bool, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("llama-tied")
    adapter = make_adapter(base, tmp_path / "adapter", peft_config("Lora", r=4, **settings))
    out = merged(base, adapter, out=tmp_path / "out")
    assert_same_model(base, adapter, out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in open_model(out).entries) is not tied


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_an_adapter_with_new_tokens_brings_its_embeddings(
    name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base, ids = bases(name), torch.arange(3, 63)[None]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(100)
    adapted = get_peft_model(model, peft_config("Lora", r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with torch.inference_mode():
        live = adapted.eval()(input_ids=ids).logits
    out = merged(base, tmp_path / "adapter", out=tmp_path / "out")
    assert logits(out).shape[-1] == 100
    assert (logits(out) - live).abs().max() < 1e-4
    assert isinstance(adapted, PeftModel)
