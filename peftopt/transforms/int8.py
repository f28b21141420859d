"""Store the linear weights as 8-bit integers, one scale per output channel (torchao, weight-only)."""

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
    """`keep`: layers left alone, names or patterns separated by commas (the output head always is). Nothing else to
    choose: symmetric, per output channel, activations untouched, so it needs no calibration."""

    keep: str = ""


PLUGIN = plugins.quantizer(Params, needs=("torch", "transformers", "torchao", "accelerate"))


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """Round each linear weight W[out, in] to int8 with one scale per row (as in arXiv:2208.07339, without outliers).

    Raises BadInput for weights that are already quantized.
    """

    def settings(skip: list[str]) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip)

    return _loading.quantize(model, params, out, seed, "int8", ["torchao"], settings)
