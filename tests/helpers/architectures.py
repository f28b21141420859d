"""Tiny random models of other architectures than conftest's Llama, with its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
GEMMA = {**SMALL, "head_dim": 16, "sliding_window": 64}
EXPERTS = {**SMALL, "num_experts_per_tok": 2}
NOT_OF_OPT = ("intermediate_size", "initializer_range", "num_key_value_heads")
OPT = {"ffn_dim": 128, "max_position_embeddings": 128, "word_embed_proj_dim": 64, "init_std": 0.2}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "phi": ("PhiConfig", SMALL),
    "cohere": ("CohereConfig", SMALL),
    "olmo2": ("Olmo2Config", SMALL),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "opt": ("OPTConfig", {**{k: v for k, v in SMALL.items() if k not in NOT_OF_OPT}, **OPT}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": 16}),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 16}),
    "gemma": ("GemmaConfig", {**SMALL, "head_dim": 16}),
    "phi3": ("Phi3Config", SMALL),
    "falcon": (
        "FalconConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2},
    ),
    "mixtral": ("MixtralConfig", {**EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 64}),
    "gpt_oss": ("GptOssConfig", {**EXPERTS, "head_dim": 16, "num_local_experts": 4, "sliding_window": 64}),
}


def config(kind: str, **settings: Any) -> Any:
    import transformers

    name, usual = KINDS[kind]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, name)(**{"vocab_size": 384, **usual, **ids, **settings})


def make(folder: Path, kind: str, words: Path, dtype: str = "bfloat16", **settings: Any) -> Path:
    """Write a random model of that kind, its norms off from ones and zeros, with the tokenizer of `words`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind, **settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (words / name).is_file():
            shutil.copyfile(words / name, folder / name)
    return folder
