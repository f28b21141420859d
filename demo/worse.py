"""Make a worse copy of the demo adapter, to see a gateway or a gate find it out: its change of the base is scaled, made
noisy, or cut to a lower rank.

python demo/worse.py worse --scale 0.6
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
WEIGHTS = "adapter_model.safetensors"


def main() -> None:
    """Command line: copy the adapter, with other weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter")
    parser.add_argument("--scale", type=float, default=0.6, help="1 leaves the adapter as it is, 0 leaves the base")
    parser.add_argument("--noise", type=float, default=0.0, help="noise as a share of each tensor's own deviation")
    parser.add_argument("--rank", type=int, default=0, help="keep so many singular values of each change; 0 = all")
    arguments = parser.parse_args()
    write(arguments.adapter, arguments.out, arguments.scale, arguments.noise, arguments.rank)


def write(adapter: Path, out: Path, scale: float = 1.0, noise: float = 0.0, rank: int = 0) -> None:
    """The copy. It has the shapes of the original, whatever rank is left, so it is as fast."""
    torch.manual_seed(0)
    tensors = load_file(adapter / WEIGHTS)
    for name in [name for name in tensors if "lora_B" in name]:
        pair = name.replace("lora_B", "lora_A")
        if rank:
            tensors[name], tensors[pair] = cut(tensors[name], tensors[pair], rank)
        added = noise * tensors[name].std() * torch.randn_like(tensors[name])
        tensors[name] = scale * tensors[name] + added
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(adapter / "adapter_config.json", out)
    save_file(tensors, out / WEIGHTS, {"format": "pt"})


def cut(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest product of that rank to b (out x r) times a (r x in), by singular values, in the shapes of both."""
    left, values, right = torch.linalg.svd(b.float() @ a.float(), full_matrices=False)
    roots = values[: b.shape[1]].sqrt()
    roots[rank:] = 0
    cut_b = left[:, : b.shape[1]] * roots
    cut_a = roots[:, None] * right[: b.shape[1]]
    return cut_b.to(b.dtype).contiguous(), cut_a.to(a.dtype).contiguous()


if __name__ == "__main__":
    main()
