"""A GGUF model's folder: where its files lie, how llama.cpp applies an adapter, and llama.cpp's Python bindings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peftopt.errors import BadInput
from peftopt.models.adapter import open_adapter, plain_pairs
from peftopt.models.prompts import check_engine

WEIGHTS = "model.gguf"


def lora_file(folder: Path, adapter: Path) -> Path:
    """Where the GGUF form of a PEFT adapter lies in a GGUF model's folder."""
    return folder / "adapters" / f"{open_adapter(adapter).sha256[:16]}.gguf"


def lora_scale(adapter: Path) -> float:
    """What llama.cpp has to multiply its own alpha / rank with. It has one scale for a whole adapter; PEFT's is one a
    module, and with rsLoRA alpha / sqrt(rank) (arXiv:2312.03732). Raises BadInput where one does not do, and for
    adapters that are not a plain LoRA on linear layers."""
    check_engine("llamacpp", adapter, baked=False)
    opened = open_adapter(adapter)
    pairs = plain_pairs(opened)
    if not pairs:
        raise BadInput(
            f"llama.cpp cannot apply adapter {adapter} ({opened.kind}): it is not a plain LoRA on linear layers",
            "merge it first: [merge, gguf, {engine: llamacpp}]",
        )
    alpha = float(opened.config["lora_alpha"])
    factors = [pair.scale * pair.a.shape[0] / alpha for pair in pairs.values()]
    if not math.isclose(min(factors), max(factors), rel_tol=1e-6):
        raise BadInput(
            f"llama.cpp cannot apply adapter {adapter}: its modules have different scales (alpha_pattern)",
            "merge it first: [merge, gguf, {engine: llamacpp}]",
        )
    return factors[0]


def library() -> Any:
    """llama.cpp's Python bindings, initialised; only its warnings go to the log."""
    import logging

    import llama_cpp

    # the bindings' levels are one off: they take llama.cpp's information for warnings, and its warnings for errors
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    llama_cpp.llama_backend_init()
    return llama_cpp
