"""Which layers a quantizer works on, which it keeps in high precision, and what group size fits them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peftopt.adapter import EMBEDDINGS
from peftopt.checkpoint import open_model
from peftopt.errors import BadInput

GROUP_SIZES = (32, 64, 128)
"""What 4-bit kernels read: Marlin and ExLlama in vLLM, and transformers' reader."""

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
)
"""Siblings that vLLM runs as one matrix, so that they need one scheme (the list is llm-compressor's)."""

Shapes = Mapping[str, tuple[int, int]]
"""Layer name -> (output width, input width)."""


def linear(config: Any) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The linear layers but the output head, and the head's names; built on `meta`, so no weight is read.

    Raises BadInput for a model without linear layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    found = {name: m for name, m in empty.named_modules() if isinstance(m, torch.nn.Linear)}
    heads = [name for name, m in found.items() if m is empty.get_output_embeddings()]
    layers = {name: (m.out_features, m.in_features) for name, m in found.items() if name not in heads}
    if not layers:
        raise BadInput(f"{type(empty).__name__} has no linear layers", "its layers are of a kind that is not quantized")
    return layers, heads


def check_group_size(folder: Path, wanted: int, keep: str) -> None:
    """Raises BadInput where `group_size` would, from the headers of the weights alone: of a model whose layers are all
    named as projections. Others are looked at once they are built."""
    matrices = {n: e.shape for n, e in open_model(folder).entries.items() if len(e.shape) == 2}
    names = {name.removesuffix(".weight"): shape for name, shape in matrices.items()}
    layers = {n: (shape[0], shape[1]) for n, shape in names.items() if n.rpartition(".")[2] not in EMBEDDINGS}
    if layers and all(name.endswith("_proj") for name in layers):
        spared, _ = kept(layers, keep)
        group_size({name: shape for name, shape in layers.items() if name not in spared}, wanted)


def units(layers: Shapes) -> list[list[str]]:
    """The layers in groups that share one scheme, each in the model's order."""
    found: dict[tuple[str, object], list[str]] = {}
    for name in layers:
        parent, _, own = name.rpartition(".")
        family = next((f for f in FUSED if own in f and all(f"{parent}.{o}" in layers for o in f)), own)
        found.setdefault((parent, family), []).append(name)
    return list(found.values())


def kept(layers: Shapes, keep: str) -> tuple[list[str], list[str]]:
    """The layers that `keep` names and those fused with them, and notices.

    `keep` is separated by commas: whole names, ends of names ("down_proj"), beginnings ("model.layers.0"), or
    patterns ("model.layers.*.mlp.down_proj"). Raises BadInput for one that names no layer, and when all are kept.
    """
    wanted: set[str] = set()
    for pattern in filter(None, map(str.strip, keep.split(","))):
        hits = {name for name in layers if _named(name, pattern)}
        if not hits:
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise BadInput(f"keep: no layer is named {pattern}", f"ends of names here: {', '.join(ends)}")
        wanted |= hits
    found, notices = [], []
    for unit in units(layers):
        if hit := wanted & set(unit):
            found += unit
            if others := [name for name in unit if name not in hit]:
                notices.append(f"{', '.join(others)} kept too: vLLM runs them as one with {', '.join(sorted(hit))}")
    if len(found) == len(layers):
        raise BadInput(f"keep: {keep} keeps every layer", "nothing would be quantized: name fewer")
    return found, notices[:1] + [f"and {len(notices) - 1} more such layers kept"] * (len(notices) > 1)


def _named(name: str, pattern: str) -> bool:
    same_end, below = name.endswith(f".{pattern}"), name.startswith(f"{pattern}.")
    return name == pattern or same_end or below or fnmatchcase(name, pattern)


def group_size(layers: Shapes, wanted: int) -> tuple[int, list[str]]:
    """The group size to use, and notices: `wanted`, or for 0 the largest that divides every layer's input width.

    Raises BadInput where it divides not every width, saying which do.
    """
    common = math.gcd(*(width for _, width in layers.values()))
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    advice = f"use {' or '.join(map(str, fitting))}" if fitting else "no size fits this model: use int8"
    if wanted in fitting:
        return wanted, []
    usual = GROUP_SIZES[-1] if wanted == 0 else wanted
    name, width = next(((n, w) for n, (_, w) in layers.items() if w % usual), ("", 0))
    if wanted == 0 and fitting:
        size = fitting[-1]
        return size, [f"{width} is not a multiple of {usual}: group size {size}"] if width else []
    if not width:
        raise BadInput(f"group_size: {wanted} is not one of {', '.join(map(str, GROUP_SIZES))}", advice)
    misfit = f"group_size: {wanted} does not divide" if wanted else "no group size divides"
    raise BadInput(f"{misfit} the input width of {name} ({width})", advice)


def costs(layers: Shapes, unit: Sequence[str]) -> int:
    """Weights in a unit."""
    return sum(math.prod(layers[name]) for name in unit)
