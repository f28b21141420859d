"""OpenVINO through optimum-intel: the `openvino_ir` transform and the `openvino` engine, which is fast on CPUs."""

from __future__ import annotations

from pathlib import Path

from peftopt.environments._builder import Builder, Module, locked


def builder() -> Builder:
    """Pins from openvino.lock."""
    return Builder(locked("openvino"), megabytes=1600, build=_build)


def _build(own: Builder, folder: Path, module: Module) -> None:
    """Install torch with whatever it takes on this machine, then exactly what is listed."""
    module("pip", "install", own.pin("torch"))
    module("pip", "install", "--no-deps", *own.pins)
