"""Round weights to 4 or 8 bits one column at a time, each correcting the error of the ones before (GPTQ)."""

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
    """`bits` 4 or 8; `group_size` weights share a scale (32, 64 or 128; 0 = the largest that divides every layer's
    input width); `mixed`: the share of the weights that may stay at 8 bits, those that measurably suffer most from 4;
    `keep`: layers left alone, names or patterns separated by commas (the output head always is); the first `samples`
    texts, cut at `max_tokens`; `dampening` is added to the Hessian's diagonal, as a share of its mean."""

    bits: int = 4
    group_size: int = 0
    mixed: float = 0.0
    keep: str = ""
    samples: int = 32
    max_tokens: int = 512
    dampening: float = 0.01

    def __post_init__(self) -> None:
        _compressor.check(self.bits, self.group_size, self.mixed, self.samples, self.max_tokens)


PLUGIN = plugins.quantizer(Params, needs=_compressor.NEEDS, calibrates=True)


check = _compressor.check_inputs


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """GPTQ (arXiv:2210.17323) by llm-compressor, in compressed-tensors format, which vLLM and transformers read.

    Raises BadInput for weights already quantized, a group size that does not fit, and calibration texts too short.
    """

    def recipe(scheme: dict[str, Any], _: Any) -> list[Any]:
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(dampening_frac=params.dampening, **scheme)]

    weights = {"num_bits": params.bits, "type": "int", "symmetric": True}
    return _compressor.quantize(model, params, out, seed, "gptq", recipe, weights, texts=texts)
