"""Tier 0 on the files themselves: weights that are not finite. Logits can look fine while a weight is NaN."""

from __future__ import annotations

from pathlib import Path


def scan(folder: Path) -> list[str]:
    """What is wrong with the safetensors files of a model folder, one sentence each; empty when nothing is."""
    import torch
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    wrong = [] if files else [f"{folder.name} holds no safetensors file"]
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_tensor(name)
                if not tensor.is_floating_point() or not tensor.numel():
                    continue
                # aminmax sees NaN and infinities in one pass, far cheaper than isfinite().all()
                low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
                if not (torch.isfinite(low) and torch.isfinite(high)):
                    wrong.append(f"{file.name}: {name} holds a value that is not finite")
    return wrong
