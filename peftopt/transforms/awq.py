"""Scale up the channels that matter most to the activations, then round the weights to 4 bits (AWQ)."""

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
    texts, cut at `max_tokens`; the scales are searched on a grid of `n_grid` points, which is what takes the time:
    it grows with samples, tokens and points alike."""

    bits: int = 4
    group_size: int = 64
    samples: int = 16
    max_tokens: int = 256
    n_grid: int = 8


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """AWQ (arXiv:2306.00978) by llm-compressor, in compressed-tensors format, which vLLM and transformers read.

    Raises BadInput for weights already quantized, a group size that does not fit, and no calibration texts.
    """

    def recipe(scheme: dict[str, Any]) -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        _spare_pinning()
        return [AWQModifier(n_grid=params.n_grid), QuantizationModifier(**scheme)]

    return _calibration.calibrate(
        model,
        out,
        texts,
        seed,
        bits=params.bits,
        group_size=params.group_size,
        symmetric=False,
        samples=params.samples,
        max_tokens=params.max_tokens,
        recipe=recipe,
    )


def _spare_pinning() -> None:
    """Let AWQ run without an accelerator: llm-compressor 0.14 pins its activations in memory all the same, and torch
    refuses. Pinning only speeds up copies to an accelerator, so without one there is nothing to lose."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available() and hasattr(IntermediatesCache, "pin_memory"):
        IntermediatesCache.pin_memory = lambda *_, **__: None
