"""What this machine is, what it is doing right now, and which versions are on it. Never imports torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

from peftopt.records import Json

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "torchao", "llmcompressor", "compressed-tensors")


def versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Installed versions by distribution name; a missing one is left out."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """Processors this process may run on (cgroup and affinity respected where the kernel tells)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Json]:
    """The machine in words and numbers, for the report."""
    import psutil

    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpus(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs, driver's view; empty without a driver."""
    if not (tool := shutil.which("nvidia-smi")):
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def moment() -> dict[str, float]:
    """What may disturb a measurement: load average, CPU time stolen by neighbours (s since boot), clock (MHz)."""
    import psutil

    now = {"load": os.getloadavg()[0], "steal_s": getattr(psutil.cpu_times(), "steal", 0.0)}
    if frequency := psutil.cpu_freq():
        now["mhz"] = frequency.current
    return now


def free_memory() -> int:
    """Bytes that new processes can take without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def processor() -> str:
    """The processor's name and the instructions it has: code built for one may not run on another."""
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")] if info.exists() else []
    return f"{_cpu_name()} {flags[0] if flags else platform.machine()}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
