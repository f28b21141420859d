"""Scale up the channels that matter most to the activations, then round the weights to 4 bits (AWQ)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt import plugins
from peftopt.errors import BadInput
from peftopt.records import Model
from peftopt.transforms import _compressor, _smoothing


@dataclass(frozen=True)
class Params:
    """`bits`: 4, for which its kernels are made; `group_size`, `mixed`, `keep`, `samples` and `max_tokens` as for gptq;
    the scales are searched on a grid of `n_grid` points, which is what takes the time: it grows with samples, tokens
    and points alike."""

    bits: int = 4
    group_size: int = 0
    mixed: float = 0.0
    keep: str = ""
    samples: int = 16
    max_tokens: int = 256
    n_grid: int = 8

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ValueError(f"bits must be 4 for awq, not {self.bits}; gptq and int8 have 8")
        _compressor.check(self.bits, self.group_size, self.mixed, self.samples, self.max_tokens)


PLUGIN = plugins.quantizer(Params, needs=_compressor.NEEDS, calibrates=True)


check = _compressor.check_inputs


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """AWQ (arXiv:2306.00978) by llm-compressor, in compressed-tensors format, which vLLM and transformers read.

    Raises BadInput for weights already quantized, a group size that does not fit, and calibration texts too short.
    """

    def recipe(scheme: dict[str, Any], rows: list[dict[str, Any]]) -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        _spare_pinning()
        return [_modifier(rows)(n_grid=params.n_grid), QuantizationModifier(**scheme)]

    weights = {"num_bits": params.bits, "type": "int", "symmetric": False}
    return _compressor.quantize(
        model, params, out, seed, "awq", recipe, weights, texts=texts, suits=_check_known, scales_norms=True
    )


def _check_known(empty: Any) -> None:
    """Raises BadInput for a model in which llm-compressor does not find what AWQ would scale: where it has no mappings
    for an architecture it takes Llama's, and fails half way."""
    from compressed_tensors.utils import match_modules_set
    from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model

    try:
        found = [
            sources
            for mapping in get_layer_mappings_from_model(empty)
            for sources, *_ in match_modules_set(empty, (mapping.smooth_layer, *mapping.balance_layers))
        ]
    except (ValueError, AttributeError):
        found = []
    if not found or any(len(some) != 1 or not hasattr(some[0], "weight") for some in found):
        raise BadInput(f"awq does not know this architecture ({type(empty).__name__})", "use gptq")


def _modifier(rows: Sequence[Mapping[str, Any]]) -> Any:
    """AWQModifier that scales only where that leaves the model what it is, tried on the rows, and nothing for layers
    that are kept: llm-compressor 0.14 does where the layer before them is quantized, and then divides by the number of
    weights to quantize, which is none."""
    from llmcompressor.modifiers.transform import awq

    class AWQModifier(awq.AWQModifier):  # type: ignore[misc]
        def _set_resolved_mappings(self, model: Any) -> None:
            super()._set_resolved_mappings(model)
            mappings = self._resolved_mappings  # type: ignore[has-type]
            mappings = [m for m in mappings if any(hasattr(b, "quantization_scheme") for b in m.balance_layers)]
            groups = [_smoothing.Group(m.smooth_name, tuple(m.balance_names)) for m in mappings]
            sound = _smoothing.unchanged(model, _smoothing.first_tokens(rows), groups)
            self._resolved_mappings = [m for m, group in zip(mappings, groups, strict=True) if group in sound]

    return AWQModifier


def _spare_pinning() -> None:
    """Let AWQ run without an accelerator: llm-compressor 0.14 pins its activations in memory all the same, and torch
    refuses. Pinning only speeds up copies to an accelerator, so without one there is nothing to lose."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available() and hasattr(IntermediatesCache, "pin_memory"):
        IntermediatesCache.pin_memory = lambda *_, **__: None
