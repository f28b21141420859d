"""Store the linear weights as 8-bit integers, outlying activations multiplied apart (bitsandbytes LLM.int8())."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt import plugins
from peftopt.records import Model
from peftopt.transforms import _loading


@dataclass(frozen=True)
class Params:
    """`threshold`: inputs larger than this are multiplied in 16 bits; `keep`: layers left alone, names or patterns
    separated by commas (the output head always is)."""

    threshold: float = 6.0
    keep: str = ""


PLUGIN = plugins.quantizer(Params, needs=("torch", "transformers", "bitsandbytes", "accelerate"))


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """LLM.int8() (arXiv:2208.07339) by bitsandbytes, for those who serve it today.

    Raises BadInput for weights that are already quantized.
    """

    def settings(skip: list[str]) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=params.threshold, llm_int8_skip_modules=skip)

    return _loading.quantize(model, params, out, seed, "bnb8", ["bitsandbytes"], settings)
