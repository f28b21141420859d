"""Bake an adapter's virtual tokens: their keys and values, computed once, in front of the same base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt import plugins, store
from peftopt.corpus import Row
from peftopt.errors import BadInput
from peftopt.merging import baking, words
from peftopt.models.adapter import Adapter, check_trained_on, open_adapter, task_of
from peftopt.models.baked import is_baked
from peftopt.records import SAFETENSORS, Model, Step

CERTIFY = ("auto", "full", "own")
TARGETS = ("ours", "vllm")
ONE_GB = 10**9


@dataclass(frozen=True)
class Params:
    """`task`: which task of a multitask adapter, -1 for none. `certify`: compare predictions in fp32 ("full"), in the
    base's own dtype ("own"), or "auto", which is "full" for a base of up to 1 GB that is not quantized.
    `allow_base_mismatch`: bake though names or revisions say that the adapter's base is another one. `target`: "ours"
    leaves keys and values in a folder of their own; "vllm" a copy of the base that has the virtual tokens as words."""

    task: int = -1
    certify: str = "auto"
    allow_base_mismatch: bool = False
    target: str = "ours"


PLUGIN = plugins.baker(Params, needs=("torch", "transformers", "peft", "safetensors"))


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """Run the virtual tokens through the base once, and keep their keys and values in a folder of their own.

    The folder stands where the adapter stood; the base's files stay as they are, and are not copied. Its certificate,
    parity.json, compares predictions with the live adapter's. Raises BadInput without an adapter, for several, for one
    that is not virtual tokens before every sequence, that does not fit the base or names another, and for a base whose
    cache holds something else than keys and values.
    """
    adapter = _opened(model, params)
    task = task_of(adapter.config, params.task)
    if params.target == "vllm":
        words.write(model, adapter, task, _depth(Path(model.path), params), out, texts)
        return Model(str(out))
    baking.bake(model, adapter, task, _depth(Path(model.path), params), out, texts)
    return Model(model.path, (str(out),))


def check(base: Path, params: Params, before: Sequence[Step], rows: Sequence[Row]) -> None:
    """Raises BadInput after a step that writes other weights than PyTorch reads."""
    for step in before:
        if (format_ := plugins.catalogue()[step.plugin].format) != SAFETENSORS:
            what = f"it computes with PyTorch, and {step.plugin} writes {format_}"
            raise BadInput(what, "bake on the base itself, or on one of another quantizer")


def _opened(model: Model, params: Params) -> Adapter:
    """The adapter. Everything that can be refused before a weight is read is refused here."""
    if not model.adapters:
        raise BadInput(f"nothing to bake: {model.path} has no adapter", "name one as model.adapter, or drop `bake`")
    if len(model.adapters) > 1:
        raise BadInput(f"{len(model.adapters)} adapters cannot be baked together", "bake each by itself")
    for name, value, known in (("certify", params.certify, CERTIFY), ("target", params.target, TARGETS)):
        if value not in known:
            raise BadInput(f"bake has no {name}: {value}", f"use {', '.join(known)}")
    folder, base = Path(model.adapters[0]), Path(model.path)
    if is_baked(folder):
        raise BadInput(f"{folder} is baked already", "use it as it is")
    adapter = open_adapter(folder)
    baking.check_bakeable(adapter)
    if params.target == "vllm":
        words.check_words(adapter)
    if not params.allow_base_mismatch:
        check_trained_on(adapter, base, json.loads((base / "config.json").read_text(encoding="utf-8")))
    return adapter


def _depth(base: Path, params: Params) -> str:
    """How predictions are compared: fp32 takes twice the memory of a 16-bit base, and a quantized one has none."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    quantized = bool(config.get("quantization_config"))
    if params.certify == "auto":
        return "own" if quantized or store.size(base) > ONE_GB else "full"
    if quantized and params.certify == "full":
        raise BadInput(f"{base} is quantized, and has no predictions in fp32", "use --certify own")
    return params.certify
