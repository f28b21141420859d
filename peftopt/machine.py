"""Facts on this machine, its current load, and its installed versions. Never imports torch."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peftopt import __version__
from peftopt.records import Json

LIBRARIES = (
    *("torch", "transformers", "peft", "safetensors"),
    *("torchao", "bitsandbytes", "llmcompressor", "compressed-tensors"),
)


def versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Installed versions by distribution name, without missing ones."""
    installed = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def cores() -> int:
    """Processors this process may run on (cgroup and affinity respected where the kernel tells)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """The number of threads for this process, from OMP_NUM_THREADS; by default all cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or 0) or cores()


def describe() -> dict[str, Json]:
    """The machine in words and numbers, for the report."""
    import psutil

    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "openmp": waiting(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpus(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {"peftopt": __version__, **versions()},
    }


def waiting() -> dict[str, str]:
    """Environment variables for how torch's threads (GNU OpenMP) wait at a barrier: the user's own, else spinning for
    some microseconds, then sleeping.

    If threads sleep at once, each token takes 1.4 to 1.8 times as long; an unmerged adapter loses more than a merged
    model. OpenMP's default is as fast, but collapses when another process needs a core (docs/decisions/processes.md).
    """
    own = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ}
    return own or {"GOMP_SPINCOUNT": "2000"}


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs, as the driver lists them; empty without a driver."""
    return _nvidia_smi("--query-gpu=name,memory.total")


def lacks(device: str) -> str:
    """The missing device of a plug-in that computes on it, "" for none. Asks the driver, not torch."""
    return "an NVIDIA GPU" if device == "cuda" and not gpus() else ""


def _nvidia_smi(query: str) -> list[str]:
    """The lines of one query; none without a driver."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    command = [tool, query, "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:  # the driver hangs
        return []
    if answer.returncode != 0:
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def moment() -> dict[str, float]:
    """Counters of possible disturbances, each since a start of its own: seconds of CPU time that were `busy`, taken by
    the host (`steal`), or withheld by our cgroup's quota (`throttled`); heat `events`; and the `clock` in seconds."""
    import psutil

    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "steal", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice already
    return {
        "clock": time.perf_counter(),
        "busy": sum(times) - idle - guests,
        "steal": getattr(times, "steal", 0.0),
        "throttled": _throttled_s(),
        "events": _heat_events(),
    }


def disturbance(before: dict[str, float], after: dict[str, float], own_s: float, pids: set[int]) -> dict[str, Json]:
    """The disturbances of a measurement between two moments. Our own process took `own_s` of CPU time between them.

    `foreign_cores`: processors that other processes kept busy. `steal` and `throttled`: shares of our processors that
    the host or a quota withheld. `heat_events`: how often a processor slowed down for heat. On an NVIDIA GPU also
    `gpu_foreign` (processes outside `pids`), `gpu_slowed` (by heat or power) and its temperature.
    """
    import psutil

    change = {key: after[key] - before[key] for key in before}
    seconds = max(change["clock"], 1e-9)
    values: dict[str, Json] = {
        "load": os.getloadavg()[0],
        "cores": cores(),
        "openmp": waiting(),
        "seconds": round(seconds, 4),
        "foreign_cores": round(max(0.0, change["busy"] - own_s) / seconds, 3),
        "steal": round(change["steal"] / seconds / cores(), 4),
        "throttled": round(change["throttled"] / seconds / cores(), 4),
        "heat_events": change["events"],
    }
    frequency = psutil.cpu_freq()
    if frequency:
        values["mhz"] = frequency.current
    heat: dict[str, list[Any]] = getattr(psutil, "sensors_temperatures", dict)()
    degrees = [sensor.current for sensors in heat.values() for sensor in sensors]
    if degrees:
        values["temperature_c"] = max(degrees)
    return values | _gpu_disturbance(pids)


def _throttled_s() -> float:
    """CPU time in seconds that a quota has withheld from our cgroup; 0 without a quota."""
    for file, key, unit in (
        ("/sys/fs/cgroup/cpu.stat", "throttled_usec", 1e6),
        ("/sys/fs/cgroup/cpu/cpu.stat", "throttled_time", 1e9),
    ):
        if Path(file).exists():
            values = dict(line.split() for line in Path(file).read_text().splitlines() if len(line.split()) == 2)
            return int(values.get(key, 0)) / unit
    return 0.0


CGROUPS = Path("/sys/fs/cgroup")


def oom_kills() -> int:
    """The number of processes that the kernel has ended for lack of memory: in the cgroup of this process if the kernel
    counts there, else on this machine; 0 without a count."""
    for file in (*_memory_events(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError):
            values = dict(line.split() for line in file.read_text().splitlines() if len(line.split()) == 2)
            if "oom_kill" in values:
                return int(values["oom_kill"])
    return 0


def _memory_events() -> Iterator[Path]:
    """The files with that count: of cgroups version 2 and 1, as seen from inside and from outside a container."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for below in (path.lstrip("/"), ""):
                if not controllers:
                    yield CGROUPS / below / "memory.events"
                elif "memory" in controllers.split(","):
                    yield CGROUPS / "memory" / below / "memory.oom_control"


def _heat_events() -> float:
    counts = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    return float(sum(int(file.read_text()) for file in counts))


SLOWED = 0x08 | 0x20 | 0x40 | 0x80
"""Bits of NVML's clock event reasons: hardware slowdown, software and hardware thermal slowdown, power brake."""


def _gpu_disturbance(pids: set[int]) -> dict[str, Json]:
    states = _nvidia_smi("--query-gpu=temperature.gpu,clocks_throttle_reasons.active")
    if not states:
        return {}
    on_gpu = {int(line) for line in _nvidia_smi("--query-compute-apps=pid") if line.isdigit()}
    return gpu_state(states, on_gpu, pids)


def gpu_state(states: list[str], on_gpu: set[int], pids: set[int]) -> dict[str, Json]:
    """The GPU's disturbances, from nvidia-smi's lines "61, 0x0000000000000004" and the processes it lists. Inside a
    container, it may list our processes under other ids. If no id is ours, as many processes as we have count as
    ours."""
    fields = [parts for line in states if len(parts := [part.strip() for part in line.split(",")]) == 2]
    masks = [int(mask, 16) for _, mask in fields if mask.startswith("0x")]
    foreign = len(on_gpu - pids) if on_gpu & pids else max(0, len(on_gpu) - len(pids))
    heat = [int(degrees) for degrees, _ in fields if degrees.isdigit()]
    values: dict[str, Json] = {"gpu_foreign": foreign, "gpu_slowed": any(mask & SLOWED for mask in masks)}
    if heat:
        values["gpu_temperature_c"] = max(heat)
    return values


def cpu_s(pids: Iterable[int]) -> float:
    """Seconds of CPU time that these processes have taken so far, without processes that have ended."""
    import psutil

    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


REST_S = 3.0
"""Most seconds to wait until processes rest."""

REST_LOOK_S = 0.05
"""Seconds over which their CPU time is measured to see that they rest."""


def rest(pids: Iterable[int], limit_s: float = REST_S) -> bool:
    """Wait until these processes compute nothing, for at most `limit_s` seconds. Returns whether they rest."""
    family = list(pids)
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        before = cpu_s(family)
        time.sleep(REST_LOOK_S)
        if cpu_s(family) - before <= REST_LOOK_S * 0.2:
            return True
    return False


def gpu_memory(pids: Iterable[int]) -> int | None:
    """Bytes that these processes hold on NVIDIA GPUs now; None without a GPU, or without an answer of the driver."""
    return gpu_held(_nvidia_smi("--query-compute-apps=pid,used_memory"), set(pids))


def gpu_held(lines: list[str], pids: set[int]) -> int | None:
    """Bytes of these processes, from nvidia-smi's lines "4711, 512 MiB", "4712, [N/A]"; None if it lists none."""
    matches = [re.fullmatch(r"(\d+), *(\d+) MiB", line) for line in lines]
    mib = [int(match[2]) for match in matches if match and int(match[1]) in pids]
    return sum(mib) * 2**20 if mib else None


FREED_S = 30.0
"""Most seconds to wait until the driver has freed the GPU memory of ended processes."""


def await_gpu(pids: Iterable[int]) -> bool:
    """Wait until the driver lists none of these ended processes any more, for at most FREED_S. Returns whether that is
    so. Their remains would take memory and time from the next process."""
    ended = set(pids)
    until = time.monotonic() + FREED_S
    while gpu_memory(ended) is not None:
        if time.monotonic() > until:
            return False
        time.sleep(REST_LOOK_S)
    return True


def give_back() -> None:
    """Return unused memory to the system and to the GPU: memory that an allocator keeps looks like a leak from outside.
    Collects objects in cycles only if the objects from the start are frozen (gc.freeze): otherwise it takes a
    second."""
    if gc.get_freeze_count():
        gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library that is not glibc
            ctypes.CDLL(None).malloc_trim(0)


def free_memory() -> int:
    """Bytes that new processes can take without swapping; with NVIDIA GPUs, at most the free memory of the fullest
    GPU."""
    import psutil

    mib = [int(line.split()[0]) for line in _nvidia_smi("--query-gpu=memory.free") if line.split()[0].isdigit()]
    return min([int(psutil.virtual_memory().available), *(free * 2**20 for free in mib)])


def processor() -> str:
    """The processor's name and its instruction sets: code that was built for one processor may not run on another."""
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")] if info.exists() else []
    return f"{_cpu_name()} {flags[0] if flags else platform.machine()}"


HALF_PRECISION = {"BF16": {"avx512_bf16", "amx_bf16", "bf16"}, "F16": {"avx512_fp16", "amx_fp16", "fphp"}}
"""The instruction sets of x86 and ARM that multiply numbers of 16 bits, by safetensors' name of the dtype."""


def multiplies(dtype: str) -> bool:
    """Whether this processor has instructions for products of a dtype, by safetensors' name. Without them PyTorch
    converts every number first, so a model of BF16 or F16 takes several times longer than one of F32. True where the
    system does not tell."""
    info = Path("/proc/cpuinfo")
    return can_multiply(dtype, info.read_text() if info.exists() else "")


def can_multiply(dtype: str, cpuinfo: str) -> bool:
    """The same, from the text of /proc/cpuinfo. Pure."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    sets = [set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")]
    return not sets or dtype not in HALF_PRECISION or not HALF_PRECISION[dtype].isdisjoint(sets[0])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def die_with_parent(number: int) -> None:
    """Let Linux send this process a signal when its parent dies, so that a killed run leaves no process behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)
