"""Round weights and activations to 8 bits, for INT8 matrix kernels (SmoothQuant, then GPTQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt import plugins
from peftopt.records import Model
from peftopt.transforms import _compressor


@dataclass(frozen=True)
class Params:
    """`smoothing` 0..1: how much of the activations' outliers moves into the weights; `keep`, `samples`, `max_tokens`
    and `dampening` as for gptq. Weights have a scale per output channel, activations one per token, made as they come.
    """

    smoothing: float = 0.8
    keep: str = ""
    samples: int = 32
    max_tokens: int = 512
    dampening: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be between 0 (none) and 1, not {self.smoothing}")
        _compressor.check(samples=self.samples, max_tokens=self.max_tokens)


PLUGIN = plugins.quantizer(Params, needs=_compressor.NEEDS, calibrates=True)


check = _compressor.check_inputs


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """SmoothQuant (arXiv:2211.10438; see _smoothing.py), and GPTQ (arXiv:2210.17323) by llm-compressor, in
    compressed-tensors format. vLLM multiplies in INT8; transformers only rounds the activations as INT8 would, which is
    slow but shows the quality.

    Raises BadInput for weights already quantized and calibration texts too short.
    """

    def recipe(scheme: dict[str, Any], _: Any) -> list[Any]:
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(dampening_frac=params.dampening, **scheme)]

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    smoothing = params.smoothing
    return _compressor.quantize(
        model, params, out, seed, "w8a8", recipe, weights, activations, texts, smoothing=smoothing
    )
