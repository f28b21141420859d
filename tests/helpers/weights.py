"""Folders of models with a handful of weights, for engines that read none of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYER = "model.layers.0.self_attn.q_proj"


def plain_model(folder: Path, scale: float, adapter: Path | None = None) -> Path:
    """A whole model of one layer; with the certificate of a merge of that adapter."""
    folder.mkdir()
    save_file({f"{LAYER}.weight": np.full((8, 8), scale, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    if adapter:
        digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
        told = {"base": {"config": "0"}, "adapters": [{"sha256": digest}], "passed": True, "checks": []}
        (folder / "parity.json").write_text(json.dumps(told))
    return folder
