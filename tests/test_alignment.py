"""INT8 weights wherever they lie in memory, of whatever width: PyTorch's kernel for them ends the process, or lies."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from peftopt.engines import _traced

torch.manual_seed(0)
for width in (64, 72, 65, 24):
    for start in (0, 1, 4, 8):
        layers = torch.nn.Sequential(torch.nn.Linear(width, 48, bias=False, dtype=torch.bfloat16))
        quantize_(layers, Int8WeightOnlyConfig())
        packed = layers[0].weight
        exact = packed.dequantize().float()
        room = torch.zeros(48 * width + 128, dtype=torch.int8)
        first = -room.data_ptr() % 64 + start
        packed.qdata = room[first : first + 48 * width].view(48, width).copy_(packed.qdata)
        _traced.bind_linears(layers)
        for rows in (1, 2, 4, 9):
            x = torch.randn(rows, width).bfloat16()
            expected = x.float() @ exact.T
            with torch.no_grad():
                found = layers(x).float()
            assert (found - expected).abs().max() < 0.02 * expected.abs().max(), (width, start, rows)
print("all alike")
"""


def test_int8_weights_multiply_alike_wherever_they_begin_and_whatever_their_width() -> None:
    """In a process of its own, which the kernel would end."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "all alike", done.stderr[-2000:]
