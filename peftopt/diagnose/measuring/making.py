"""Adapters that a diagnosis makes: the user's with another rank, and soft prompts of any length."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peftopt.errors import BadInput
from peftopt.models.adapter import CONFIG, WEIGHTS, Pair, open_adapter, plain_pairs
from peftopt.models.checkpoint import ITEM_BYTES, Checkpoint, Entry
from peftopt.records import Json

SPREAD = 0.02
"""Standard deviation of a random soft prompt's numbers: about that of embeddings."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: its dtype in the format's words, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def write(folder: Path, config: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> Path:
    """An adapter's folder. Format: github.com/huggingface/safetensors#format."""
    folder.mkdir(parents=True)
    header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(tensor.data)],
        }
        at += len(tensor.data)
    head = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as out:
        out.write(struct.pack("<Q", len(head)))
        out.write(head)
        out.writelines(tensor.data for tensor in tensors.values())
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


# ---- LoRA of another rank ------------------------------------------------------------------------


def of_rank(adapter: Path, rank: int, into: Path) -> Path:
    """The same adapter with another rank: padded with zeros, or with zeros cut off. Its delta does not change.

    Raises BadInput for an adapter that is not plain LoRA of one rank, and if a cut would change it.
    """
    opened = open_adapter(adapter)
    pairs = plain_pairs(opened)
    if not pairs or opened.config.get("rank_pattern") or opened.config.get("alpha_pattern"):
        raise BadInput(f"{adapter} is not plain LoRA of one rank", "its rank is left as it is")
    before = int(opened.config["r"])
    tensors = {}
    with opened.weights as weights:
        for pair in pairs.values():
            tensors[pair.a.name] = _rows(weights, pair.a, rank)
            tensors[pair.b.name] = _columns(weights, pair.b, rank)
    scale = math.sqrt(rank / before) if opened.config.get("use_rslora") else rank / before
    alpha = float(opened.config["lora_alpha"]) * scale
    config = {**opened.config, "r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha}
    return write(into, config, tensors)


def used_rank(adapter: Path) -> tuple[int, int]:
    """(the highest rank that any of its pairs uses, its own rank): all pairs are zero beyond the first. (0, 0) for an
    adapter that is not plain LoRA."""
    opened = open_adapter(adapter)
    pairs = plain_pairs(opened)
    if not pairs:
        return 0, 0
    with opened.weights as weights:
        used = max(_used(weights, pair) for pair in pairs.values())
    return used, max(pair.a.shape[0] for pair in pairs.values())


def _used(weights: Checkpoint, pair: Pair) -> int:
    """How many first rows of A and columns of B hold all that is not zero in both."""
    import numpy as np

    rows = _items(weights, pair.a).any(axis=1)
    columns = _items(weights, pair.b).any(axis=0)
    places = np.flatnonzero(rows & columns)
    return int(places[-1]) + 1 if len(places) else 0


def _items(weights: Checkpoint, entry: Entry) -> Json:
    """A matrix as an array of whole numbers, one for each item: its bits."""
    import numpy as np

    data = bytearray(entry.nbytes)
    weights.read(entry, 0, memoryview(data))
    return np.frombuffer(data, dtype=f"u{ITEM_BYTES[entry.dtype]}").reshape(entry.shape)


def _rows(weights: Checkpoint, entry: Entry, rank: int) -> Tensor:
    """A [r, in] with `rank` rows."""
    import numpy as np

    items = _items(weights, entry)
    resized = np.zeros((rank, items.shape[1]), dtype=items.dtype)
    kept = min(rank, items.shape[0])
    resized[:kept] = items[:kept]
    return Tensor(entry.dtype, resized.shape, resized.tobytes())


def _columns(weights: Checkpoint, entry: Entry, rank: int) -> Tensor:
    """B [out, r] with `rank` columns."""
    import numpy as np

    items = _items(weights, entry)
    resized = np.zeros((items.shape[0], rank), dtype=items.dtype)
    kept = min(rank, items.shape[1])
    resized[:, :kept] = items[:, :kept]
    return Tensor(entry.dtype, resized.shape, resized.tobytes())


# ---- soft prompts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a model's cache and of its soft prompts, from its config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    item_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.item_bytes


DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


def shape_of(base: Path) -> Shape:
    """The sizes in a config. Raises BadInput for one without them: only the names of Llama's family are known."""
    try:
        whole = json.loads((base / "config.json").read_text(encoding="utf-8"))
        config = {**whole, **whole.get("text_config", {})}
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Shape(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            item_bytes=DTYPES[config.get("dtype") or config.get("torch_dtype") or "float32"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{base / 'config.json'} does not say how large a cache is: {error!r}") from error


def soft_prompt(base: Path, tokens: int, into: Path, seed: int = 0) -> Path:
    """Prompt tuning (arXiv:2104.08691) with random numbers: its cost does not depend on them."""
    shape = shape_of(base)
    dice = random.Random(seed)
    numbers = [dice.gauss(0.0, SPREAD) for _ in range(tokens * shape.hidden)]
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "num_virtual_tokens": tokens,
        "token_dim": shape.hidden,
        "num_transformer_submodules": 1,
        "num_attention_heads": shape.heads,
        "num_layers": shape.layers,
        "prompt_tuning_init": "RANDOM",
    }
    data = struct.pack(f"<{len(numbers)}f", *numbers)
    return write(into, config, {"prompt_embeddings": Tensor("F32", (tokens, shape.hidden), data)})
