"""Store the linear weights as 8-bit integers, one scale per output channel (torchao, weight-only)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt import hf
from peftopt.records import Model

TECHNIQUE = "quantize"
NEEDS = ("torch", "transformers", "torchao", "accelerate")


@dataclass(frozen=True)
class Params:
    """Nothing to choose: symmetric, per output channel, activations untouched, so it needs no calibration."""


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """Round each linear weight W[out, in] to int8 with one scale per row (as in arXiv:2208.07339, without outliers).

    Embeddings and the output head keep their dtype: they are often one shared tensor, and the most sensitive.
    Adapters are carried along, unchanged, on the quantized base. Read back by plain `from_pretrained`.
    Raises BadInput for weights that are already quantized.
    """
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    hf.unquantized_config(model, "quantize")
    settings = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    quantized = hf.load(model.path, quantization_config=settings)
    with hf.quiet():
        quantized.save_pretrained(out)
    hf.copy_extras(model.path, out)
    return Model(str(out), model.adapters)
