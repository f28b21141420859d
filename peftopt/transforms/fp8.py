"""Store weights as 8-bit floats and round activations to them as they come (FP8, needs no calibration)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt import plugins
from peftopt.records import Model
from peftopt.transforms import _compressor

FIRST_WITH_KERNELS = (8, 9)
"""CUDA compute capability from which there are FP8 matrix units (Ada, Hopper)."""


@dataclass(frozen=True)
class Params:
    """`keep`: layers left alone, names or patterns separated by commas (the output head always is)."""

    keep: str = ""


PLUGIN = plugins.quantizer(Params, needs=_compressor.NEEDS)


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """FP8 E4M3 (arXiv:2209.05433) by llm-compressor: a scale per output channel of the weights, one per token of the
    activations. In compressed-tensors format. Making it takes no special device; its speed does, and a notice says so.

    Raises BadInput for weights already quantized.
    """

    def recipe(scheme: dict[str, Any], _: Any) -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return [QuantizationModifier(**scheme)]

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return _compressor.quantize(model, params, out, seed, "fp8", recipe, weights, activations, notices=_notices())


def _notices() -> list[str]:
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= FIRST_WITH_KERNELS:
        return []
    needed = ".".join(map(str, FIRST_WITH_KERNELS))
    return [
        f"no FP8 kernels here (CUDA compute capability {needed} or newer has them): judge its quality, not its speed"
    ]
