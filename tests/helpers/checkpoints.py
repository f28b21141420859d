"""Checkpoints of small models of several families, whole or without a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, "tie_word_embeddings": False}),
    "tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64}),
}


def saved(name: str, folder: Path) -> Path:
    import transformers

    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def without(folder: Path, key: str) -> Path:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights[key]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
