"""How much memory this process has taken at its highest, on the host and on the GPU."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peftopt import machine
from peftopt.measurements import Memory


def peak(serving: Sequence[int] = ()) -> Memory:
    """Bytes: `peak_memory_bytes` resident on the host since the process started, its own or of a process that it
    started, whichever is more; on CUDA also what the caching allocator handed out (`gpu_memory_allocated`) and held
    (`gpu_memory_reserved`) at most. `serving`: processes that hold the model in this one's place; their peaks are
    added up, so what they share counts more than once, and of a GPU the driver tells what they hold now (reserved)."""
    if serving:
        held = machine.gpu_memory(serving)
        return Memory(peak_memory_bytes=sum(map(_host_peak, serving)), gpu_memory_reserved=held)
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return replace(gpu(), peak_memory_bytes=max(_host_peak(), started))


def gpu() -> Memory:
    """The GPU's part of `peak`; nothing without CUDA, and in a process that has no torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return Memory()
    return Memory(
        gpu_memory_allocated=torch.cuda.max_memory_allocated(), gpu_memory_reserved=torch.cuda.max_memory_reserved()
    )


def _host_peak(pid: int = 0) -> int:
    """VmHWM: unlike getrusage's figure it does not start from the parent's size at fork."""
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    try:
        return int(psutil.Process(pid or None).memory_info().rss)
    except psutil.Error:
        return 0  # gone meanwhile
