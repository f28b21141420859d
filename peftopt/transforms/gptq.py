"""Round weights to 4 bits one column at a time, each correcting the error of the ones before (GPTQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt.records import Model
from peftopt.transforms import _calibration

TECHNIQUE = "quantize"
NEEDS = _calibration.NEEDS
CALIBRATES = True


@dataclass(frozen=True)
class Params:
    """`bits` 4 or 8; `group_size` weights share a scale and must divide every layer's input width; the first `samples`
    texts, cut at `max_tokens`; `dampening` is added to the Hessian's diagonal, as a share of its mean."""

    bits: int = 4
    group_size: int = 64
    samples: int = 32
    max_tokens: int = 512
    dampening: float = 0.01


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """GPTQ (arXiv:2210.17323) by llm-compressor, in compressed-tensors format, which vLLM and transformers read.

    Raises BadInput for weights already quantized, a group size that does not fit, and no calibration texts.
    """

    def recipe(scheme: dict[str, Any]) -> list[Any]:
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(dampening_frac=params.dampening, **scheme)]

    return _calibration.calibrate(
        model,
        out,
        texts,
        seed,
        bits=params.bits,
        group_size=params.group_size,
        symmetric=True,
        samples=params.samples,
        max_tokens=params.max_tokens,
        recipe=recipe,
    )
