"""How fast memory is read here, and what one decoded token reads: together the floor under the time per token."""

from __future__ import annotations

import json
import time
from pathlib import Path

from peftopt.measurements import Survey
from peftopt.records import Model

BYTES, SECONDS = 1 << 30, 1.0
"""Read per pass, far more than any cache holds; and for how long."""

KV_BYTES = 2
"""Of one cached number: every engine here keeps 16 bits."""


def measure(device: str = "cpu") -> float:
    """Bytes per second that a plain sum over a large array reads, on a CPU with this process's threads: the best of a
    second's passes, since a neighbour can only slow one down (as in McCalpin's STREAM)."""
    import torch

    numbers = torch.ones(BYTES // 4, dtype=torch.float32, device=device)
    best, until = float("inf"), time.perf_counter() + SECONDS
    while (started := time.perf_counter()) < until:
        numbers.sum().item()  # a GPU is done when the number is here
        best = min(best, time.perf_counter() - started)
    return BYTES / best


def survey() -> Survey:
    """The CPU, and a CUDA GPU where there is one."""
    import torch

    gpu = measure("cuda") if torch.cuda.is_available() else None
    return Survey(read_bytes_per_s=measure(), gpu_read_bytes_per_s=gpu)


def reads(model: Model) -> dict[str, int]:
    """Bytes that a decode step reads: `weight_bytes` once, `kv_bytes` for each token in the cache (keys and values of
    all layers). The weights are counted as they lie on disk, so where an engine unpacks them the floor is the
    format's, not the engine's; input embeddings that are a matrix apart are counted though a step
    reads one row. `kv_bytes` is 0 where the config has other names for its layers and heads."""
    folder = Path(model.path)
    files = [f for suffix in ("*.safetensors", "*.gguf", "openvino_*.bin") for f in folder.glob(suffix)]
    files += [f for adapter in model.adapters for f in Path(adapter).glob("*.safetensors")]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_attention_heads") or 1
    width = config.get("head_dim") or config.get("hidden_size", 0) // heads
    kv_heads = config.get("num_key_value_heads") or heads
    cached = 2 * KV_BYTES * config.get("num_hidden_layers", 0) * kv_heads * width
    return {"weight_bytes": sum(f.stat().st_size for f in files), "kv_bytes": cached}
