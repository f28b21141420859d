"""A baked prompt: the keys and values of an adapter's virtual tokens, computed once, in a folder of their own.

It sits on top of its base as an adapter's folder does (`Model.adapters`); the base's files stay as they are.

    prefix.safetensors   "{layer}.keys" and "{layer}.values", each [key-value heads, virtual tokens, head size]
    baked.json           what it was baked from
    parity.json          its certificate
    tokenizer files      where the adapter brought a tokenizer

Keys are stored as a cache holds them: with their positions already applied (rotary embeddings, arXiv:2104.09864), for
the positions 0 to n - 1. A request's own tokens start at position n.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt import __version__, identity
from peftopt.errors import BadInput
from peftopt.models import hf
from peftopt.models.checkpoint import open_model
from peftopt.records import FORMAT, Json, Model

CONFIG = "baked.json"
WEIGHTS = "prefix.safetensors"
SIDES = ("keys", "values")

CACHES = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of transformers' caches that hold keys and values, and nothing else."""

NOTES = ("_name_or_path", "transformers_version")
"""What a model's config says that changes no prediction."""

SAMPLE_BYTES = 256
"""Of each tensor of a base, that `base_of` takes into its hash."""


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


@dataclass(frozen=True)
class Prefix:
    """A baked prompt in memory, ready for one model: `layers` holds keys and values [1, key-value heads, virtual
    tokens, head size] in the dtype and on the device of the model, whose config is `settings`."""

    tokens: int
    layers: Sequence[tuple[Any, Any]]
    settings: Any

    def start(self, rows: int) -> Any:
        """A fresh cache for `rows` sequences that already holds the virtual tokens. Nothing of it is shared."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.settings)
        for layer, (keys, values) in zip(cache.layers, self.layers, strict=True):
            layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))  # which copies
        return cache

    def inputs(self, mask: Any) -> dict[str, Any]:
        """What a forward pass of new sequences takes besides their ids. `mask` [rows, tokens] is 0 for padding on the
        left, which stands between the virtual tokens and a sequence's own, and takes no position. A sliding window does
        count it: there, sequences of several lengths are exact only up to `smallest_window` columns."""
        import torch

        rows = mask.shape[0]
        whole = torch.cat([mask.new_ones(rows, self.tokens), mask], dim=1)
        positions = (whole.cumsum(1) - 1)[:, self.tokens :]
        return {"past_key_values": self.start(rows), "attention_mask": whole, "position_ids": positions}


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


def of_model(model: Model) -> Baked | None:
    """The baked prompt that a model starts from; None for one without, or with adapters of PEFT's.

    Raises BadInput for one that was baked from another base, and for one beside other adapters.
    """
    folders = [folder for folder in model.adapters if is_baked(folder)]
    if not folders:
        return None
    if len(model.adapters) > 1:
        raise BadInput(
            f"the baked prompt {folders[0]} cannot be used with other adapters", "name it alone: it is a whole prompt"
        )
    baked = open_baked(folders[0])
    check_base(baked, Path(model.path))
    return baked


def base_of(folder: Path) -> dict[str, Json]:
    """What tells a base from others: its name, and hashes (SHA-256) of its config and of its weights.

    Of the weights, names, dtypes, shapes and the middle bytes of every tensor are hashed: sampled, not proven.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in config.items() if key not in NOTES}
    samples = []
    with open_model(folder) as weights:
        for name, entry in sorted(weights.entries.items()):
            sample = bytearray(min(SAMPLE_BYTES, entry.nbytes))
            weights.read(entry, (entry.nbytes - len(sample)) // 2, memoryview(sample))
            samples.append([name, entry.dtype, list(entry.shape), sample.hex()])
    return {
        "name": folder.resolve().name,
        "config": identity.of_value(settings),
        "weights": identity.of_value(samples),
    }


def check_base(baked: Baked, folder: Path) -> None:
    """Raises BadInput for a base that is not the one it was baked from: another config, shapes or weights."""
    known = baked.config.get("base") or {}
    base = base_of(folder)
    for what, other in (("config", "another config"), ("weights", "other weights")):
        if base[what] != known.get(what):
            raise BadInput(
                f"{baked.folder} was baked from {known.get('name', '?')}, and {folder} has {other}",
                "give the base that it was baked from, or bake the adapter on this one: peftopt bake",
            )


def check_cache(settings: Any, tokens: int) -> list[Any]:
    """The layers of a cache for a model of this config. Raises BadInput for one that cannot begin with so many virtual
    tokens: layers that keep something else than keys and values, and windows that the tokens would fill."""
    from transformers import DynamicCache

    layers = list(DynamicCache(config=settings).layers)
    for layer in layers:
        kind = type(layer).__name__
        if kind not in CACHES:
            raise BadInput(
                f"a {settings.model_type} keeps {kind}, not only keys and values: a prompt cannot be baked for it",
                "serve the adapter live",
            )
        window = getattr(layer, "sliding_window", None)
        if window is not None and tokens >= window:
            raise BadInput(
                f"{tokens} virtual tokens do not fit the sliding window of {window} tokens of this model",
                "serve the adapter live, or train one with fewer virtual tokens",
            )
    return layers


def smallest_window(settings: Any) -> int:
    """The tokens of the smallest sliding window of a model of this config; 0 where no layer has one."""
    from transformers import DynamicCache

    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=settings).layers]
    return min((window for window in windows if window), default=0)


def load(baked: Baked, model: Any) -> Prefix:
    """Hold its keys and values for `model`, the causal model that goes on from them, in its dtype and on its device.

    Raises BadInput where the model's cache has other layers.
    """
    kept = len(check_cache(model.config, baked.tokens))
    layers = tensors(baked)
    if len(layers) != kept:
        raise BadInput(
            f"{baked.folder} has keys and values of {len(layers)} layers, and the model keeps those of {kept}",
            "give the base that it was baked from",
        )

    def placed(one: Any) -> Any:
        return one[None].to(device=model.device, dtype=model.dtype)

    return Prefix(baked.tokens, [(placed(keys), placed(values)) for keys, values in layers], model.config)


def start_cache(baked: Baked, model: Any, rows: int) -> Any:
    """A fresh cache of transformers' for `rows` sequences that already holds the virtual tokens.

    `model` is the causal model that goes on from it; keys and values get its dtype and device. Each call's cache is its
    own: a request may write to it. It reads the file each time: an engine keeps what `load` gives, and starts from
    that. Raises BadInput where the model's cache has other layers.
    """
    return load(baked, model).start(rows)


def tensors(baked: Baked) -> list[tuple[Any, Any]]:
    """Keys and values, layer by layer: torch tensors [key-value heads, virtual tokens, head size] on the CPU.

    Raises BadInput for a file that is broken, or is not of this baked.json.
    """
    from safetensors import SafetensorError

    try:
        by_name = hf.read_tensors(baked.folder / WEIGHTS)
        layers = [(by_name[f"{n}.keys"], by_name[f"{n}.values"]) for n in range(baked.layers)]
        if any(one.dim() != 3 or one.shape[1] != baked.tokens for pair in layers for one in pair):
            raise ValueError(f"its tensors are not of {baked.tokens} virtual tokens")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadInput(f"{baked.folder / WEIGHTS} is not whole: {error}", "bake it again: peftopt bake") from error
    return layers


def named(layers: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Keys and values by the names that they have in WEIGHTS."""
    pairs = enumerate(layers)
    return {f"{n}.{side}": one.contiguous() for n, pair in pairs for side, one in zip(SIDES, pair, strict=True)}


def write(out: Path, layers: Sequence[tuple[Any, Any]], base: Mapping[str, Json], about: Mapping[str, Json]) -> Baked:
    """Leave WEIGHTS and CONFIG in the folder `out`: keys and values as `tensors` gives them, the `base` as `base_of`
    names it, and what else to say of it (`about`: peft_type, adapter, …)."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    by_name = named(layers)
    save_file(by_name, out / WEIGHTS)
    config = {
        "format": FORMAT,
        "made_by": f"peftopt {__version__}",
        **about,
        "virtual_tokens": layers[0][0].shape[1],
        "layers": len(layers),
        "kv_bytes": sum(one.numel() * one.element_size() for one in by_name.values()),
        "dtype": str(layers[0][0].dtype).removeprefix("torch."),
        "base": dict(base),
    }
    (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return open_baked(out)
