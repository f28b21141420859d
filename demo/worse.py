"""Make a worse copy of the demo adapter, to see a gateway find it out: its change of the base is scaled, or made noisy.

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
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tensors = load_file(arguments.adapter / WEIGHTS)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            noise = arguments.noise * tensor.std() * torch.randn_like(tensor)
            tensors[name] = arguments.scale * tensor + noise
    arguments.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(arguments.adapter / "adapter_config.json", arguments.out)
    save_file(tensors, arguments.out / WEIGHTS, {"format": "pt"})


if __name__ == "__main__":
    main()
