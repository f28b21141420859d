"""The first layers of a model, and what an adapter has for them: a small checkpoint that every library opens.

A config says how many layers there are, and the names of tensors which layer each is of ("model.layers.7.…"). A model
that is cut keeps its embeddings, its last norm and its head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from peftopt.errors import BadInput
from peftopt.models.adapter import CONFIG, WEIGHTS, open_adapter
from peftopt.models.checkpoint import ITEM_BYTES, SINGLE, Checkpoint, Draft, Entry, open_model
from peftopt.models.hf import copy_extras
from peftopt.records import Json

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of layers."""

IN_LAYER = re.compile(r"(.*?\.)?(?:layers|h|blocks)\.(\d+)\.(.+)")
"""A tensor of a layer: what stands before, the layer's number, and the tensor's name in it."""

IN_PAIR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.|$)")
"""A tensor of a LoRA's pair, and its side."""


def layers_of(folder: Path) -> int:
    """How many layers a model has. Raises BadInput where that cannot be told, or where its layers are not alike: the
    first ones then say nothing of the others."""
    key, config = _counted(folder)
    shapes: dict[int, set[tuple[str, tuple[int, ...], str]]] = {}
    for entry in open_model(folder).entries.values():
        match = IN_LAYER.fullmatch(entry.name)
        if match:
            shapes.setdefault(int(match[2]), set()).add((match[3], entry.shape, entry.dtype))
    layers = int(config[key])
    if sorted(shapes) != list(range(layers)):
        raise BadInput(f"the weights of {folder} do not name {layers} layers", "it cannot be cut to its first layers")
    if any(shape != shapes[0] for shape in shapes.values()):
        raise BadInput(f"the layers of {folder} are not alike", "it cannot be told by its first layers")
    return layers


def cut_model(source: Path, out: Path, layers: int) -> Path:
    """Write a model of the first `layers` of `source`, in its own dtype, with its tokenizer and generation config.
    Raises BadInput for one that has fewer, or whose config does not count them."""
    key, config = _counted(source)
    before = int(config[key])
    if layers > before:
        raise BadInput(f"{source} has {before} layers, not {layers}", "cut it to fewer")
    out.mkdir(parents=True)
    copy_extras(str(source), out)
    whole = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _cut_config(_text(whole), key, before, layers)
    (out / "config.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    with open_model(source) as checkpoint:
        _copy(checkpoint, out, SINGLE, layers)
    return out


def cut_adapter(source: Path, out: Path, layers: int, rank: int = 0) -> Path:
    """Write an adapter with what `source` has for the first `layers`, its pairs padded with zeros to `rank` as servers
    pad them (0: as they are). Raises BadInput for one that has nothing there, and for one that is not LoRA: of others
    not every tensor names its layer."""
    adapter = open_adapter(source)
    if adapter.kind != "LORA":
        raise BadInput(f"{source} is {adapter.kind}, not LoRA", "only LoRA is cut to the first layers")
    out.mkdir(parents=True)
    copy_extras(str(source), out)
    config = dict(adapter.config)
    if isinstance(config.get("layers_to_transform"), list):
        config["layers_to_transform"] = [n for n in config["layers_to_transform"] if n < layers]
    if rank:
        config |= {"r": rank, "rank_pattern": {}}
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with adapter.weights as checkpoint:
        if not any(layer_of(name) < layers for name in checkpoint.entries if IN_LAYER.fullmatch(name)):
            raise BadInput(f"{source} adapts none of the first {layers} layers", "cut it to more")
        _copy(checkpoint, out, WEIGHTS, layers, rank)
    return out


def _counted(folder: Path) -> tuple[str, Mapping[str, Json]]:
    """The key that counts the layers, and the config that has it. Raises BadInput where none does."""
    config = _text(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    key = next((name for name in COUNTS if isinstance(config.get(name), int)), None)
    if key is None:
        raise BadInput(f"{folder}/config.json does not count its layers", f"known are {', '.join(COUNTS)}")
    return key, config


def _text(config: dict[str, Json]) -> dict[str, Json]:
    """The part of a config that is of the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _cut_config(config: dict[str, Json], key: str, before: int, layers: int) -> None:
    """Count fewer layers, and keep of every list with a value for each layer the first ones."""
    for name, value in config.items():
        if isinstance(value, list) and len(value) == before:
            config[name] = value[:layers]
    config[key] = layers
    if isinstance(config.get("max_window_layers"), int):
        config["max_window_layers"] = min(config["max_window_layers"], layers)


def _copy(checkpoint: Checkpoint, out: Path, name: str, layers: int, rank: int = 0) -> None:
    kept = [entry for entry in checkpoint.entries.values() if layer_of(entry.name) < layers]
    shapes = {entry.name: _padded_shape(entry, rank) for entry in kept}
    entries = [replace(entry, shape=shapes[entry.name]) for entry in kept]
    with Draft(out, {name: entries}, checkpoint) as draft:
        for entry in kept:
            data = bytearray(entry.nbytes)
            checkpoint.read(entry, 0, memoryview(data))
            padded = _padded(data, entry, shapes[entry.name])
            draft.write(draft.entries[entry.name], 0, memoryview(padded))


def _padded_shape(entry: Entry, rank: int) -> tuple[int, ...]:
    """The shape of a LoRA's A [rank, in] or B [out, rank] at that rank; any other tensor's, and for 0, its own."""
    side = IN_PAIR.search(entry.name)
    if not rank or not side or len(entry.shape) != 2:
        return entry.shape
    first, second = entry.shape
    return (max(rank, first), second) if side[1] == "A" else (first, max(rank, second))


def _padded(data: bytearray, entry: Entry, shape: tuple[int, ...]) -> bytearray:
    """A tensor's bytes with zeros for the rows and columns that it lacks of a shape."""
    if shape == entry.shape:
        return data
    item = ITEM_BYTES[entry.dtype]
    width, wanted = entry.shape[1] * item, shape[1] * item
    rows = [data[start : start + width] + bytes(wanted - width) for start in range(0, len(data), width)]
    return bytearray().join(rows) + bytes((shape[0] - entry.shape[0]) * wanted)


def layer_of(name: str) -> int:
    """Which layer a tensor is of by its name, -1 for those outside them."""
    match = IN_LAYER.fullmatch(name)
    return int(match[2]) if match else -1
