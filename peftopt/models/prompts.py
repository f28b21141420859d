"""The virtual tokens that a model's adapter puts before every prompt, live or baked, and which engines can do that."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from peftopt.errors import BadInput
from peftopt.models import hf
from peftopt.models.adapter import PROMPTS, open_adapter
from peftopt.models.baked import is_baked, open_baked
from peftopt.records import Model

AS_WORDS = "bake it as words of its base: peftopt bake --for vllm, or {bake: {target: vllm}} in a recipe"

LORA_ONLY = ("vllm", "llamacpp", "llamacpp_server", "openvino", "tensorrt")
"""Engines that know no adapter but LoRA, or none: virtual tokens reach them as words of the base alone."""

BAKED_ONLY = ("compiled", "continuous")
"""Engines of ours that start from a baked prompt, and cannot run a live one."""


def check_engine(engine: str, folder: Path, baked: bool) -> None:
    """Raises BadInput for an engine that cannot put this adapter's virtual tokens before a prompt, live or `baked`;
    nothing for an adapter without them."""
    baked = baked or is_baked(folder)
    if not baked and open_adapter(folder).kind not in PROMPTS:
        return
    if engine in LORA_ONLY:
        what = "start from a baked prompt" if baked else "run live virtual tokens"
        raise BadInput(f"{engine} cannot {what} ({folder})", AS_WORDS)
    if engine in BAKED_ONLY and not baked:
        hint = f"bake them first: peftopt bake, or [bake, {{engine: {engine}}}] in a recipe; or use the eager engine"
        raise BadInput(f"{engine} cannot run live virtual tokens ({folder})", hint)


class Facts(TypedDict, total=False):
    """`virtual_tokens`: how many. `prompt_kv_bytes`: what their keys and values take of a sequence's cache, None where
    the base's config does not tell. `baked`: whether they are computed beforehand."""

    virtual_tokens: int
    prompt_kv_bytes: int | None
    baked: bool


def facts(model: Model) -> Facts:
    """What is known of a model's virtual tokens; {} for one without."""
    for folder in map(Path, model.adapters):
        if is_baked(folder):
            baked = open_baked(folder)
            return Facts(virtual_tokens=baked.tokens, prompt_kv_bytes=baked.kv_bytes, baked=True)
        adapter = open_adapter(folder)
        if adapter.kind in PROMPTS:
            tokens = int(adapter.config.get("num_virtual_tokens") or 0)
            each = kv_bytes(hf.config(model.path))
            return Facts(virtual_tokens=tokens, prompt_kv_bytes=tokens * each if each else None, baked=False)
    return Facts()


def kv_bytes(config: Any) -> int:
    """Bytes that a token's keys and values take in a cache of transformers: 2 x layers x key-value heads x head size x
    bytes of a number. `config` is a model's of transformers; 0 where it does not tell."""
    import torch

    text = config.get_text_config()
    layers, heads = (getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        return 0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    itemsize = text.dtype.itemsize if isinstance(text.dtype, torch.dtype) else 0
    return int(2 * layers * kv_heads * size * itemsize)
