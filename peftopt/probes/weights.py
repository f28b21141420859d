"""Tier 0 on the files themselves: weights that no training leaves behind, words that are not the adapter's. Logits can
look fine while a weight is NaN."""

from __future__ import annotations

import json
from pathlib import Path

from peftopt.models.baked import is_baked
from peftopt.models.checkpoint import Checkpoint
from peftopt.models.hf import TEMPLATE, template_home, tokenizer_home
from peftopt.models.values import damaged
from peftopt.records import Json, Model


def scan(folder: Path) -> list[str]:
    """What is wrong with the weight files of a model folder, one sentence each; empty when nothing is."""
    if packed := sorted(folder.glob("*.gguf")):
        return [line for file in packed for line in _scan_gguf(file)]
    if graphs := sorted(folder.glob("openvino_*model.xml")):
        return [line for file in graphs for line in _scan_openvino(file)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return [f"{folder.name} holds no safetensors file"]
    with Checkpoint(files) as weights:
        return list(damaged(weights))


def _scan_gguf(file: Path) -> list[str]:
    """llama.cpp checks every block, its scales included, while it loads."""
    from peftopt.models.gguf import library

    llama_cpp = library()
    settings = llama_cpp.llama_model_default_params()
    settings.check_tensors, settings.use_extra_bufts, settings.n_gpu_layers = True, False, 0
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
    if model is None:
        return [f"{file.name} holds a value that is not finite, or cannot be loaded"]
    llama_cpp.llama_model_free(model)
    return []


def _scan_openvino(file: Path) -> list[str]:
    """Constants of a graph: weights, scales, and single numbers, of which an infinity may be meant."""
    import numpy as np
    import openvino

    wrong = []
    for node in openvino.Core().read_model(file).get_ordered_ops():
        if node.get_type_name() != "Constant" or not node.get_element_type().is_real():
            continue
        values = node.get_data(dtype=np.float32)
        if values.size > 1 and not np.isfinite([values.min(), values.max()]).all():
            wrong.append(f"{file.name}: {node.get_friendly_name()} holds a value that is not finite")
    return wrong


WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
"""Files that say what a model's tokens mean and how a chat is written: they must be the adapter's own."""


def foreign_words(folder: Path, model: Model) -> list[str]:
    """What of a folder's tokenizer, chat template and end of sequence is not that of the model it was made from. A
    baked prompt holds none of the base's words: only those that its adapter brought."""
    if is_baked(folder):
        home = Path(tokenizer_home(model))
        brought = WORDS if home != Path(model.path) else ()
        return [f"{name} is not the adapter's" for name in brought if _bytes(folder / name) != _bytes(home / name)]
    homes = dict.fromkeys(WORDS, Path(tokenizer_home(model))) | {TEMPLATE: Path(template_home(model))}
    wrong = [
        f"{name} is not the adapter's" for name, home in homes.items() if _bytes(folder / name) != _bytes(home / name)
    ]
    for name in ("config.json", "generation_config.json"):
        was, is_ = (_json(path / name).get("eos_token_id") for path in (Path(model.path), folder))
        if was != is_:
            wrong.append(f"{name}: the end of sequence is {is_}, the base's is {was}")
    return wrong


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _json(path: Path) -> dict[str, Json]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
