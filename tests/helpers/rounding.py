"""What a merge's sum is rounded to."""

from __future__ import annotations

from typing import Any

from peftopt.merging import blocks


def round_once(exact: Any, dtype: Any) -> Any:
    """fp64 to the nearest of a half precision."""
    import torch

    name = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    return torch.from_numpy(blocks.narrowed(exact.numpy(), name).view("int16")).view(dtype)
