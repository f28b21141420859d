"""Export to OpenVINO's format through optimum-intel, its weights in 32, 16, 8 or 4 bits (no calibration)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peftopt import plugins
from peftopt.corpus import Row
from peftopt.errors import BadInput
from peftopt.models import hf, provenance
from peftopt.models.openvino import WEIGHTS, refuse_adapters
from peftopt.records import Model, Step
from peftopt.transforms import _layers

TYPES = {"f32": 32, "bf16": 16, "f16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Params:
    """`type`: f32, bf16, f16, int8 or int4 (embeddings and head stay at 8 bits then), for all matrices.
    `group_size`: at 4 bits, weights of a row that share a scale; 0 = the largest that divides the layers' widths."""

    type: str = "int8"
    group_size: int = 0


PLUGIN = plugins.quantizer(Params, environment="openvino", format="openvino", reader="openvino", weights=WEIGHTS)


def check(base: Path, params: Params, before: Sequence[Step], rows: Sequence[Row]) -> None:
    """Raises BadInput for an unknown type, and for a group size that does not divide the layers' widths."""
    _check_type(params)
    if params.type == "int4":
        _layers.check_group_size(base, params.group_size, "")


def _check_type(params: Params) -> None:
    if params.type not in TYPES:
        raise BadInput(f"openvino_ir has no type {params.type!r}", f"use {', '.join(TYPES)}")
    if params.group_size and params.type != "int4":
        raise BadInput(f"group_size is for int4, not {params.type}", "leave it out")


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """Trace the model and compress its weights with NNCF, as `optimum-cli export openvino --weight-format` does.

    Leaves openvino_model.xml and .bin (docs.openvino.ai: OpenVINO IR) beside the tokenizer, and quantization.json.
    Raises BadInput for an unknown type, a group size that does not divide, weights that are already quantized, and
    adapters on top: OpenVINO has no layer for them.
    """
    from transformers import AutoConfig

    _check_type(params)
    refuse_adapters(model)
    hf.unquantized_config(model, "convert")
    notices: list[str] = []
    if params.type == "int4":
        layers, _ = _layers.linear(AutoConfig.from_pretrained(model.path))
        size, notices = _layers.group_size(layers, params.group_size)
        params = replace(params, group_size=size)
    out.mkdir(parents=True, exist_ok=True)
    with hf.quiet():
        _export(model.path, params, out)
    hf.copy_all_but_weights(model.path, out, {"quant_method": "openvino", "type": params.type})
    provenance.write(out, "openvino_ir", ["openvino", "nncf", "optimum-intel"], asdict(params), seed, notices=notices)
    return Model(str(out))


def _export(source: str, params: Params, out: Path) -> None:
    import torch
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    bits = TYPES[params.type]
    plain = {"f32": torch.float32, "f16": torch.float16}
    settings: dict[str, Any] = {"dtype": plain.get(params.type, torch.bfloat16)}
    if bits >= 16:
        settings["load_in_8bit"] = False  # else large models are compressed unasked
    elif bits == 8:
        settings["quantization_config"] = OVWeightQuantizationConfig(bits=8, sym=False)
    else:
        settings["quantization_config"] = OVWeightQuantizationConfig(
            bits=4, sym=False, group_size=params.group_size, ratio=1.0
        )
    try:
        exported = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, **settings)
    except (KeyError, ValueError, NotImplementedError) as error:
        hint = "optimum-intel must know the architecture; run this model on a transformers engine instead"
        raise BadInput(f"optimum-intel cannot export {source}: {error}", hint) from error
    exported.save_pretrained(out)
