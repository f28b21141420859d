"""Experts that transformers holds as one tensor: taken apart to be quantized, and written as transformers reads them.

transformers puts quantized experts back together while it loads (integrations/compressed_tensors.py): packed integers
with a scale and nothing else, or 8-bit floats, one scheme for all experts of a model, under the names that its table of
conversions has for the architecture. Whatever else is written, it makes up at random.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from peftopt.errors import BadInput
from peftopt.records import Json

OURS = ("gate_proj", "up_proj", "down_proj")
"""What llm-compressor calls the layers of an expert."""

_NAMED = re.compile(r"experts\.\*\.(\w+)\.weight$")


def split(model: Any) -> list[str]:
    """Turn the experts of a model into linear layers, in place; the names of the modules that hold them. Of a model on
    `meta`, which has no weights, only the layers."""
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
    from llmcompressor.modeling.moe.linearize import get_non_linearized_moes, linearize_moe

    from peftopt.models import hf

    experts = get_non_linearized_moes(model)
    with hf.quiet():
        if model.device.type != "meta":
            linearize_moe(model)
            return [name for name, _ in experts]
        for name, module in experts:
            apart = LinearExperts2D.get_linear_experts_cls(type(module))
            model.set_submodule(name, apart(getattr(module, "config", model.config)))
    return [name for name, _ in experts]


def check(
    kind: str,
    method: str,
    weights: Mapping[str, Json],
    activations: Mapping[str, Json] | None,
    kept: Collection[str],
) -> None:
    """Raises BadInput for what transformers could not read back: of a model type whose experts it does not put
    together, weights with zero points, integers with rounded activations, and experts `kept` as they are."""
    if _theirs(kind) is None:
        what = f"transformers cannot read quantized experts of {kind}"
        raise BadInput(f"{method} cannot quantize this model: {what}", "use gguf, whose llama.cpp has kernels for them")
    whole = weights["type"] == "int"
    if whole and (activations or not weights["symmetric"]):
        what = "zero points" if not weights["symmetric"] else "integers that are multiplied as integers"
        raise BadInput(
            f"{method} does not know this architecture: transformers reads no experts with {what}", "use gptq"
        )
    if kept:
        one = next(iter(kept))
        raise BadInput(f"keep: {one} is one of the experts, which are quantized all or none", "keep other layers")


def name_as_read(model: Any) -> None:
    """Have a model whose experts were taken apart save them under the names that transformers reads."""
    from transformers.core_model_loading import WeightRenaming

    theirs = _theirs(model.config.model_type) or OURS
    renamed = [
        WeightRenaming(rf"\.experts\.(\d+)\.{their}\.", rf".experts.\1.{our}.")
        for our, their in zip(OURS, theirs, strict=True)
        if our != their
    ]
    if renamed:
        model._weight_conversions = [*(getattr(model, "_weight_conversions", None) or []), *renamed]


def _theirs(kind: str) -> tuple[str, ...] | None:
    """What a checkpoint of this model type calls gate, up and down of an expert; None where they are no layers there,
    or transformers does not say."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names: dict[str, list[str]] = {}
    for conversion in get_checkpoint_conversion_mapping(kind) or ():
        targets, sources = conversion.target_patterns, conversion.source_patterns
        matches = [_NAMED.search(source) for source in sources]
        if len(targets) == 1 and all(matches):
            names[targets[0].rpartition(".")[2]] = [match[1] for match in matches if match]
    together, down = names.get("gate_up_proj", []), names.get("down_proj", [])
    return (*together, *down) if len(together) == 2 and len(down) == 1 else None
