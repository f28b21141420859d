"""The engines' memory and load: a sample every few seconds, for the log and the metrics.

Each number has its source: the engine itself, NVIDIA's driver (NVML), or a formula ("derived"). An unknown one is None.
`combined` is pure; `Sampler` asks.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peftopt.gateway.metrics import Metrics
from peftopt.loadtest import prometheus

ALLOCATED, RESERVED = "peftopt_server_memory_allocated_bytes", "peftopt_server_memory_reserved_bytes"
"""What our own engines tell of their memory at /metrics."""


@dataclass(frozen=True)
class Known:
    """Sizes of an engine that are known from its start: the bytes of its weights and of its KV cache; 0 if not
    known."""

    weights_bytes: int = 0
    kv_bytes: int = 0


@dataclass(frozen=True)
class Reading:
    """A driver's values: `utilization` of the busiest GPU, 0..1, and bytes `reserved` by the engine's processes."""

    utilization: float | None = None
    reserved: int | None = None


class Gpus(Protocol):
    """GPUs, as their driver reports them."""

    def read(self, pids: Collection[int]) -> Reading:
        """The use of the GPUs by these processes; if the driver names none of them, by all."""


@dataclass(frozen=True)
class Sample:
    """An engine at one moment. `at`: seconds on the clock of perf_counter; bytes `allocated` to tensors and `reserved`
    of the device; shares `kv_usage` and `utilization`, 0..1. `sources` by the field's name."""

    at: float
    kv_usage: float | None = None
    allocated: int | None = None
    reserved: int | None = None
    utilization: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def fragmentation(self) -> float | None:
        """The share of reserved memory without tensors; None if it would be a guess."""
        exact = self.sources.get("allocated") == "engine" == self.sources.get("reserved")
        if not exact or not self.reserved or self.allocated is None:
            return None
        return max(0.0, 1 - self.allocated / self.reserved)


NO_SAMPLE = Sample(at=0.0)


def combined(at: float, totals: Mapping[str, float], reading: Reading | None, known: Known) -> Sample:
    """A sample from the engine's metrics and the driver's numbers. The engine takes precedence over the driver."""
    can_be = {name: value for name, value in totals.items() if math.isfinite(value) and value >= 0}
    kv_usage = prometheus.moment(can_be).get("kv_cache")
    if kv_usage is not None and kv_usage > 1:
        kv_usage = None
    allocated, reserved = (_bytes(can_be.get(name)) for name in (ALLOCATED, RESERVED))
    told = (("allocated", allocated), ("reserved", reserved))
    sources = {name: "engine" for name, value in told if value is not None}
    if allocated is None and known.weights_bytes and known.kv_bytes and kv_usage is not None:
        allocated = round(known.weights_bytes + kv_usage * known.kv_bytes)
        sources["allocated"] = "derived"
    if reserved is None and reading and reading.reserved is not None:
        reserved = reading.reserved
        sources["reserved"] = "nvml"
    return Sample(at, kv_usage, allocated, reserved, reading.utilization if reading else None, sources)


def _bytes(value: float | None) -> int | None:
    return None if value is None else int(value)


@dataclass(frozen=True)
class Engine:
    """An engine to sample. `name` of the version that it runs for, "" for the gateway's own; `get` fetches a path of
    it: (status, body); `processes`: those of an engine that was started here, for the GPUs' driver."""

    name: str
    get: Callable[[str], Awaitable[tuple[int, bytes]]]
    known: Known = Known()
    processes: Callable[[], Collection[int]] = tuple


class Sampler:
    """Asks engines, and the GPUs if there are any."""

    def __init__(
        self, metrics: Metrics, gpus: Gpus | None = None, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self._metrics, self._gpus, self._tell = metrics, gpus, tell

    async def sample(self, engines: Sequence[Engine]) -> dict[str, Sample]:
        """The engines now, by name, noted in the metrics."""
        answers = await asyncio.gather(*(engine.get("/metrics") for engine in engines))
        samples = {}
        for engine, (status, text) in zip(engines, answers, strict=True):
            totals = prometheus.totals(text.decode(errors="replace")) if status == 200 else {}
            reading = await asyncio.to_thread(self._read, engine.processes)
            samples[engine.name] = combined(time.perf_counter(), totals, reading, engine.known)
        self._show(samples)
        return samples

    def _read(self, processes: Callable[[], Collection[int]]) -> Reading | None:
        """What the driver tells; one that fails is not asked again."""
        try:
            pids = processes() if self._gpus else ()
            return self._gpus.read(pids) if self._gpus and pids else None
        except Exception as error:  # noqa: BLE001 (a driver may fail in any way, and requests go on)
            self._gpus = None
            self._tell(f"the GPU is not sampled any more: {type(error).__name__}: {error}")
            return None

    def _show(self, samples: Mapping[str, Sample]) -> None:
        metrics = self._metrics
        gauges = (metrics.gpu_allocated, metrics.gpu_reserved, metrics.gpu_utilization, metrics.gpu_fragmentation)
        for gauge in (metrics.kv_usage, *gauges):
            gauge.clear()  # what is not known any more is not told as it was
        for name, sample in samples.items():
            if sample.kv_usage is not None:
                metrics.kv_usage.labels(name).set(sample.kv_usage)
            for gauge, source, value in (
                (metrics.gpu_allocated, sample.sources.get("allocated"), sample.allocated),
                (metrics.gpu_reserved, sample.sources.get("reserved"), sample.reserved),
                (metrics.gpu_utilization, "nvml", sample.utilization),
                (metrics.gpu_fragmentation, "engine", sample.fragmentation),
            ):
                if value is not None:
                    gauge.labels(name, source).set(value)


class Nvml:
    """NVIDIA's GPUs, by nvidia-ml-py."""

    def __init__(self, nvml: Any) -> None:
        """`nvml`: the module pynvml, begun."""
        self._nvml = nvml
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

    def read(self, pids: Collection[int]) -> Reading:
        """The use of the GPUs by these processes; in a container, where the driver has other process ids, by all."""
        mine = {i: held for i in range(len(self._devices)) if (held := self._held(i, pids)) is not None}
        devices = [self._devices[i] for i in mine] or self._devices
        busy = [self._nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100 for device in devices]
        if mine:
            reserved = sum(mine.values())
        else:
            reserved = sum(int(self._nvml.nvmlDeviceGetMemoryInfo(device).used) for device in devices)
        return Reading(max(busy, default=None), reserved)

    def _held(self, index: int, pids: Collection[int]) -> int | None:
        """Bytes that these processes hold of a GPU; None where none of them is there, or the driver does not tell."""
        processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._devices[index])
        held = [p.usedGpuMemory for p in processes if p.pid in pids and p.usedGpuMemory is not None]
        return sum(held) if held else None


def gpus() -> Gpus | None:
    """NVIDIA's GPUs of this machine; None without a GPU, a driver or nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        found = Nvml(pynvml)
    except pynvml.NVMLError:
        return None
    return found


def weights_bytes(folder: Path) -> int:
    """The size of a model's weights on disk, about their size in memory."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
