"""Find plug-ins by file name. Reading what one is costs no heavy import: those sit inside its functions."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from peftopt.records import SAFETENSORS, Plugin

FOLDERS = {"transform": "transforms", "engine": "engines", "policy": "policies"}


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
    )
