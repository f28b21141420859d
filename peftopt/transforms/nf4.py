"""Store the linear weights as 4-bit normal floats in blocks of 64 (bitsandbytes NF4, as QLoRA trains on)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt import plugins
from peftopt.models import hf
from peftopt.records import Model
from peftopt.transforms import _loading


@dataclass(frozen=True)
class Params:
    """`double_quant`: store the blocks' scales in 8 bits too; `keep`: layers left alone, names or patterns separated by
    commas (the output head always is)."""

    double_quant: bool = False
    keep: str = ""


PLUGIN = plugins.quantizer(Params, needs=("torch", "transformers", "bitsandbytes", "accelerate"))


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """NF4 (arXiv:2305.14314) by bitsandbytes, for those who serve it today; computes in the model's own dtype.

    Raises BadInput for weights that are already quantized.
    """

    def settings(skip: list[str]) -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=params.double_quant,
            bnb_4bit_compute_dtype=hf.config(model.path).dtype or torch.bfloat16,
            llm_int8_skip_modules=skip,
        )

    return _loading.quantize(model, params, out, seed, "nf4", ["bitsandbytes"], settings)
