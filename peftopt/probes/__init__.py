"""Probes, one file each: a loaded engine and a workload in, raw samples out. They run inside a worker."""

from __future__ import annotations

import sys
from typing import Any

from peftopt.engines import Engine


def cuda_of(engine: Engine) -> Any:
    """The torch with which this very process computes on CUDA; None where another process does, or no GPU."""
    served = engine.remote or engine.processes()
    return sys.modules.get("torch") if engine.device == "cuda" and not served else None
