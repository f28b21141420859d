"""A baked prompt: the keys and values of an adapter's virtual tokens, computed once, in a folder of their own.

It sits on top of its base as an adapter's folder does (`Model.adapters`); the base's files stay as they are.

    prefix.safetensors   "{layer}.keys" and "{layer}.values", each [key-value heads, virtual tokens, head size]
    baked.json           what it was baked from
    parity.json          its certificate

Keys are stored as a cache holds them: with their positions already applied (rotary embeddings, arXiv:2104.09864), for
the positions 0 to n - 1. A request's own tokens start at position n.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt.errors import BadInput
from peftopt.records import Json

CONFIG = "baked.json"
WEIGHTS = "prefix.safetensors"


@dataclass(frozen=True)
class Baked:
    """A baked prompt on disk: `kind` is PEFT's name of what it was ("P_TUNING"), `tokens` how many virtual tokens it
    has, `layers` the number of layers, `kv_bytes` what their keys and values take of a sequence's cache."""

    folder: Path
    kind: str
    tokens: int
    layers: int
    kv_bytes: int
    config: Mapping[str, Json]


def is_baked(folder: str | Path) -> bool:
    """Whether this is a folder of `peftopt bake`, and no adapter of PEFT's."""
    return (Path(folder) / CONFIG).is_file()


def open_baked(folder: str | Path) -> Baked:
    """Read what it says of itself. Raises BadInput for a folder that `peftopt bake` did not write whole."""
    home = Path(folder)
    try:
        config = json.loads((home / CONFIG).read_text(encoding="utf-8"))
        known = config["peft_type"], config["virtual_tokens"], config["layers"], config["kv_bytes"]
        return Baked(home, str(known[0]), int(known[1]), int(known[2]), int(known[3]), config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{home} is not a baked prompt: {error}", "bake it again: peftopt bake") from error


def start_cache(baked: Baked, model: Any, rows: int) -> Any:
    """A fresh cache of transformers' for `rows` sequences that already holds the virtual tokens.

    `model` is the causal model that goes on from it; keys and values get its dtype and device. Each call's cache is its
    own: a request may write to it. Raises BadInput where the model's cache has other layers.
    """
    raise NotImplementedError


def tensors(baked: Baked) -> list[tuple[Any, Any]]:
    """Keys and values, layer by layer: torch tensors [key-value heads, virtual tokens, head size] on the CPU."""
    raise NotImplementedError
