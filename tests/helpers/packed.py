"""Checkpoints as AutoGPTQ and AutoAWQ wrote them, and what their weights stand for, made from a model folder.

The layouts are those of AutoGPTQ's `QuantLinear` (version 1: zeros are stored one too small) and of AutoAWQ's
`WQLinear_GEMM` (columns of eight in the order that its kernel wants). The weights are only rounded to the nearest: a
reader is tested here, not a quantizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

BITS, GROUP, MIDDLE = 4, 64, 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def autogptq(model: Path, out: Path) -> tuple[Path, Path]:
    """The packed checkpoint, and the same weights in bf16."""
    config = {"quant_method": "gptq", "bits": BITS, "group_size": GROUP, "desc_act": False, "sym": True}
    return _written(model, out, {**config, "true_sequential": True, "damp_percent": 0.01}, _gptq)


def autoawq(model: Path, out: Path) -> tuple[Path, Path]:
    config = {"quant_method": "awq", "bits": BITS, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _written(model, out, config, _awq)


def _written(
    model: Path, out: Path, config: dict[str, Any], pack: Callable[[Any, Any], dict[str, Any]]
) -> tuple[Path, Path]:
    import torch
    from safetensors.torch import load_file, save_file

    packed, plain = out / "packed", out / "plain"
    for folder in (packed, plain):
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    settings = json.loads((model / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    weights, same = {}, {}
    for name, value in load_file(model / "model.safetensors").items():
        weights[name] = same[name] = value
        if name.endswith("_proj.weight"):
            rounded, scales = _rounded(value.float())
            same[name] = ((rounded - MIDDLE) * scales).reshape(value.shape).to(torch.bfloat16)
            codes = rounded.reshape(value.shape).to(torch.int32)
            layer = name.removesuffix(".weight")
            weights |= {f"{layer}.{part}": t.contiguous() for part, t in pack(codes, scales[..., 0]).items()}
            del weights[name]
    save_file(weights, packed / "model.safetensors", {"format": "pt"})
    save_file(same, plain / "model.safetensors", {"format": "pt"})
    return packed, plain


def _rounded(weight: Any) -> tuple[Any, Any]:
    """Codes from 0 to 15 and fp16 scales, [out, groups, group] and [out, groups, 1]."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / (MIDDLE - 1)).half().float()
    return (groups / scales).round().clamp(-MIDDLE, MIDDLE - 1) + MIDDLE, scales


def _gptq(codes: Any, scales: Any) -> dict[str, Any]:
    import torch

    across = codes.T.reshape(codes.shape[1] // 8, 8, len(codes))
    zeros = torch.full((scales.shape[1], len(codes) // 8, 8), MIDDLE - 1, dtype=torch.int32)
    return {
        "qweight": _packed(across, 1, range(8)),
        "qzeros": _packed(zeros, 2, range(8)),
        "scales": scales.T.half(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // GROUP,
    }


def _awq(codes: Any, scales: Any) -> dict[str, Any]:
    import torch

    across = codes.T.reshape(codes.shape[1], len(codes) // 8, 8)
    zeros = torch.full((scales.shape[1], len(codes) // 8, 8), MIDDLE, dtype=torch.int32)
    return {
        "qweight": _packed(across, 2, AWQ_ORDER),
        "qzeros": _packed(zeros, 2, AWQ_ORDER),
        "scales": scales.T.half(),
    }


def _packed(codes: Any, along: int, order: Any) -> Any:
    """Eight codes to an int32, the first of `order` in its lowest bits."""
    import torch

    words = torch.zeros_like(codes.select(along, 0))
    for place, index in enumerate(order):
        words |= codes.select(along, index) << (BITS * place)
    return words
