"""Find plug-ins by file name. Reading what one is costs no heavy import: those sit inside its functions."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from peftopt.records import SAFETENSORS, Plugin

FOLDERS = {"transform": "transforms", "engine": "engines", "policy": "policies"}


@dataclass(frozen=True)
class Other:
    """What has no plug-in of its own: peftopt meets it `through` one, on a machine with `device`; one that is not
    `offered` it does not."""

    name: str
    kind: str
    through: str
    help: str
    device: str = ""
    offered: bool = True


OTHERS = (
    Other(
        "deepspeed-mii",
        "server",
        "endpoint",
        "DeepSpeed-MII: you start it, here or on another machine; peftopt asks it, {engine: {endpoint: {url: "
        "http://HOST:28080/mii/NAME, protocol: mii}}}. It does not stream, so there is no time to first token.",
        "cuda",
    ),
    Other(
        "exllama",
        "kernels",
        "vllm",
        "ExLlama's kernels for GPTQ in float16, in vLLM: [merge, gptq, {engine: {vllm: {args: --dtype float16 "
        "--linear-backend exllama}}}]; by itself vLLM takes Marlin's. GPTQModel has them too, for others' checkpoints.",
        "cuda",
    ),
    Other(
        "aotinductor",
        "compiler",
        "compiled",
        "A package of what `compiled` runs, for programs without Python, with the weights in it a second time; "
        "`compiled` keeps its compiled graph beside the model instead (docs/decisions/compile.md).",
        offered=False,
    ),
)


def module(kind: str, name: str) -> ModuleType:
    """The plug-in's module. Raises ModuleNotFoundError for a name that is no file in its folder."""
    return importlib.import_module(f"peftopt.{FOLDERS[kind]}.{name}")


def catalogue() -> Mapping[str, Plugin]:
    """Every plug-in by name, transforms, engines and policies together: their names never clash."""
    return {plugin.name: plugin for kind in FOLDERS for plugin in _of_kind(kind)}


def missing(plugin: Plugin) -> list[str]:
    """The modules a plug-in needs that this Python does not have."""
    return [name for name in plugin.needs if importlib.util.find_spec(name) is None]


def _of_kind(kind: str) -> list[Plugin]:
    folder = Path(__file__).parent / FOLDERS[kind]
    return [_describe(kind, f.stem) for f in sorted(folder.glob("*.py")) if not f.stem.startswith("_")]


def _describe(kind: str, name: str) -> Plugin:
    source = module(kind, name)
    return Plugin(
        name=name,
        kind=kind,
        help=(source.__doc__ or "").strip().splitlines()[0],
        technique=source.TECHNIQUE,
        params=source.Params,
        needs=getattr(source, "NEEDS", ()),
        environment=getattr(source, "ENVIRONMENT", "main"),
        calibrates=getattr(source, "CALIBRATES", False),
        reader=getattr(source, "READER", "eager"),
        format=getattr(source, "FORMAT", SAFETENSORS),
        weights=getattr(source, "WEIGHTS", "") if kind == "transform" else "",
        serves=getattr(source, "SERVES", False),
        device=getattr(source, "DEVICE", ""),
    )
