"""Which layers a quantizer works on, which it keeps in high precision, and what group size fits them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peftopt.errors import BadInput
from peftopt.metrics import percent
from peftopt.models.adapter import EMBEDDINGS
from peftopt.models.checkpoint import open_model

GROUP_SIZES = (32, 64, 128)
"""What 4-bit kernels read: Marlin and ExLlama in vLLM, and transformers' reader."""

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
)
"""Siblings that vLLM runs as one matrix, so that they need one scheme (the list is llm-compressor's)."""

WIDE = ("F64", "F32", "F16", "BF16")
"""The format's words for types of 16 or more bits."""

WORTH_SAYING, NEARLY_ALL = 0.01, 0.95
"""Shares of the weights that a quantizer does not reach: what is said of, and what is refused."""

Shapes = Mapping[str, tuple[int, int]]
"""Layer name -> (output width, input width)."""


@dataclass(frozen=True)
class Found:
    """What there is to quantize in a model: `layers` its linear layers but the output head, `heads` the head's names.

    `odd` are layers of a class derived from Linear (Falcon's), which quantizers skip or fail on; `others` the elements
    of all further matrices but the embeddings (experts that are one tensor, convolutions). `experts`: those of the
    layers that are parts of a fused tensor, taken apart. `empty`: the model on `meta`.
    """

    layers: dict[str, tuple[int, int]]
    heads: list[str]
    odd: dict[str, tuple[int, int]]
    others: dict[str, int]
    experts: frozenset[str]
    empty: Any


def find(config: Any, split: bool = False) -> Found:
    """Build the model on `meta`, so that no weight is read, and look at it. `split`: take fused experts apart.

    Raises BadInput for a model without linear layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from peftopt.models import hf
    from peftopt.transforms import _experts

    with torch.device("meta"), hf.building(config.name_or_path):
        empty = AutoModelForCausalLM.from_config(config)
        apart = tuple(f"{name}." for name in _experts.split(empty)) if split else ()
    linears = {name: m for name, m in empty.named_modules() if isinstance(m, torch.nn.Linear)}
    heads = [name for name, m in linears.items() if m is empty.get_output_embeddings()]
    shapes = {name: (m.out_features, m.in_features) for name, m in linears.items() if name not in heads}
    if not shapes:
        hint = "its layers are of a kind that is not quantized here; use gguf or openvino_ir"
        raise BadInput(f"{type(empty).__name__} has no linear layers", hint)
    odd = {name: shape for name, shape in shapes.items() if type(linears[name]) is not torch.nn.Linear}
    layers = {name: shape for name, shape in shapes.items() if name not in odd}
    known = {f"{name}.weight" for name in linears}
    known |= {f"{name}.weight" for name, m in empty.named_modules() if isinstance(m, torch.nn.Embedding)}
    others = {n: p.numel() for n, p in empty.named_parameters() if p.dim() > 1 and n not in known}
    experts = frozenset(name for name in layers if name.startswith(apart)) if apart else frozenset()
    return Found(layers, heads, odd, others, experts, empty)


def linear(config: Any) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The linear layers but the output head, and the head's names. Raises BadInput for a model without any."""
    parts = find(config)
    return {**parts.layers, **parts.odd}, parts.heads


def left_alone(parts: Found, method: str) -> list[str]:
    """A notice of the matrices that are no plain linear layers and so keep their dtype, where they count.

    Raises BadInput where they are nearly all that there is, as the experts of a large model are.
    """
    left = {**{name: math.prod(shape) for name, shape in parts.odd.items()}, **parts.others}
    rounded = sum(map(math.prod, parts.layers.values()))
    share = sum(left.values()) / (sum(left.values()) + rounded)
    if share < WORTH_SAYING:
        return []
    names = sorted(left, key=lambda name: -left[name])
    more = f" and {len(names) - 1} more like it" if len(names) > 1 else ""
    kept = f"{percent(share)} of the weights stay as they are: {method} cannot round {names[0]}{more}"
    instead = "gptq" if "experts" in names[0] else "gguf or openvino_ir"
    if share > NEARLY_ALL:
        raise BadInput(f"{method} would quantize almost nothing of this model: {kept}", f"use {instead}")
    return [f"{kept}; {instead} can"]


def unrounded(source: Path, out: Path) -> float:
    """Elements of matrices in 16 or more bits that a folder holds, as a share of those of the folder it was made from.

    Read from headers. Embeddings and output head, which have a row for each token, are left out of both.
    """
    words = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tokens = words.get("vocab_size") or (words.get("text_config") or {}).get("vocab_size")

    def wide(folder: Path) -> int:
        entries = open_model(folder).entries.values()
        matrices = (e for e in entries if len(e.shape) > 1 and e.dtype in WIDE and tokens not in e.shape)
        return sum(e.items for e in matrices)

    return wide(out) / max(1, wide(source))


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
    by_parent: dict[tuple[str, object], list[str]] = {}
    for name in layers:
        parent, _, own = name.rpartition(".")
        family = next((f for f in FUSED if own in f and all(f"{parent}.{o}" in layers for o in f)), own)
        by_parent.setdefault((parent, family), []).append(name)
    return list(by_parent.values())


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
    names, notices = [], []
    for unit in units(layers):
        if hit := wanted & set(unit):
            names += unit
            if others := [name for name in unit if name not in hit]:
                notices.append(f"{', '.join(others)} kept too: vLLM runs them as one with {', '.join(sorted(hit))}")
    if len(names) == len(layers):
        raise BadInput(f"keep: {keep} keeps every layer", "nothing would be quantized: name fewer")
    return names, notices[:1] + [f"and {len(notices) - 1} more such layers kept"] * (len(notices) > 1)


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
