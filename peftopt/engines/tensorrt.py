"""The compiled decode loop with its step built by TensorRT (torch-tensorrt): NVIDIA GPUs only."""

from __future__ import annotations

from dataclasses import dataclass

from peftopt import plugins
from peftopt.engines import compiled
from peftopt.errors import MissingEnvironment
from peftopt.records import Model


@dataclass(frozen=True)
class Params:
    """`cache_len` and `graphs` as in `compiled`."""

    cache_len: int = 0
    graphs: int = 4


PLUGIN = plugins.engine(Params, technique="compile", needs=(*compiled.PLUGIN.needs, "torch_tensorrt"), device="cuda")


prepare = compiled.prepare


def open(model: Model, params: Params) -> compiled.Compiled:
    """Load the model. Raises MissingEnvironment where there is no NVIDIA GPU."""
    import torch

    if not torch.cuda.is_available():
        raise MissingEnvironment("TensorRT builds for NVIDIA GPUs, and PyTorch sees none", "use engine: compiled here")
    import torch_tensorrt  # noqa: F401 (importing it registers the backend)

    settings = compiled.Params(
        fullgraph=False, cache_len=params.cache_len, graphs=params.graphs, prompt_buckets=compiled.EAGERLY
    )
    return compiled.Compiled(model, settings, backend="torch_tensorrt")
