"""Plug-ins: what each says of itself, and where they are found. Heavy imports sit inside their functions.

A plug-in is a file in its folder here, or a module that another package names as an entry point. It declares itself
by one value, PLUGIN.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import cast

from peftopt.errors import BadInput
from peftopt.records import SAFETENSORS, Plugin, Step

FOLDERS = {"transform": "transforms", "engine": "engines", "policy": "policies"}
MAKERS = {"transform": "quantizer", "engine": "engine", "policy": "policy"}


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


# ---- what a plug-in says of itself -------------------------------------------------------------


def quantizer(
    params: type,
    *,
    needs: tuple[str, ...] = (),
    environment: str = "main",
    calibrates: bool = False,
    reader: str = "eager",
    format: str = SAFETENSORS,
    weights: str = "",
) -> Plugin:
    """A transform that writes the model's weights in fewer bits; the fields are those of `Plugin`."""
    return Plugin("", "transform", "", "quantize", params, needs, environment, calibrates, reader, format, weights)


def merger(params: type, *, needs: tuple[str, ...] = ()) -> Plugin:
    """A transform that adds the adapter to the weights."""
    return Plugin("", "transform", "", "merge", params, needs)


def baker(params: type, *, needs: tuple[str, ...] = ()) -> Plugin:
    """A transform that computes an adapter's virtual tokens once."""
    return Plugin("", "transform", "", "bake", params, needs)


def engine(
    params: type,
    *,
    technique: str = "",
    needs: tuple[str, ...] = (),
    environment: str = "main",
    format: str = SAFETENSORS,
    serves: bool = False,
    device: str = "",
    speculates: tuple[str, ...] = (),
    reuses: bool = False,
    pads: bool = False,
) -> Plugin:
    """What answers prompts; `technique` is "compile" for one that the row "compile" of the table judges."""
    return Plugin(
        "",
        "engine",
        "",
        technique,
        params,
        needs,
        environment,
        format=format,
        serves=serves,
        device=device,
        speculates=speculates,
        reuses=reuses,
        pads=pads,
    )


def policy(params: type, *, technique: str) -> Plugin:
    """What changes requests: inputs ("truncate"), the length of answers ("shorten"), or how an engine gives them
    ("speculate", "prefix", "pack")."""
    return Plugin("", "policy", "", technique, params)


# ---- where plug-ins are found ------------------------------------------------------------------


def module(kind: str, name: str) -> ModuleType:
    """The plug-in's module: a file in its folder, or what another package has declared as an entry point. Raises
    ModuleNotFoundError for a name that is neither."""
    if name in _own(kind):
        return importlib.import_module(f"peftopt.{FOLDERS[kind]}.{name}")
    declared = _declared(kind).get(name)
    if declared:
        return cast(ModuleType, declared.load())
    raise ModuleNotFoundError(f"no {kind} named {name!r}")


@functools.cache
def catalogue() -> Mapping[str, Plugin]:
    """Every plug-in by name, transforms, engines and policies together, read once. A name of another package's never
    replaces one of peftopt's own."""
    by_name: dict[str, Plugin] = {}
    for kind in FOLDERS:
        for name in (*_own(kind), *_declared(kind)):
            by_name.setdefault(name, _described(kind, name))
    return MappingProxyType(by_name)


def folders(step: Step) -> dict[str, Path]:
    """The folders that a step's parameters name, by parameter."""
    plugin = catalogue().get(step.plugin)
    named = {name: step.params.get(name) for name in plugin.folders} if plugin else {}
    return {name: Path(folder) for name, folder in named.items() if folder}


def missing(plugin: Plugin) -> list[str]:
    """The modules a plug-in needs that this Python does not have."""
    return [name for name in plugin.needs if importlib.util.find_spec(name) is None]


def _own(kind: str) -> list[str]:
    folder = Path(__file__).parent / FOLDERS[kind]
    return sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_"))


@functools.cache
def _declared(kind: str) -> Mapping[str, EntryPoint]:
    """Entry points of other packages, of the group "peftopt.transforms", "peftopt.engines" or "peftopt.policies"."""
    return {entry.name: entry for entry in entry_points(group=f"peftopt.{FOLDERS[kind]}")}


def _described(kind: str, name: str) -> Plugin:
    source = module(kind, name)
    plugin = getattr(source, "PLUGIN", None)
    if not isinstance(plugin, Plugin) or plugin.kind != kind:
        raise BadInput(
            f"{source.__name__} declares no {kind}", f"it needs PLUGIN = peftopt.plugins.{MAKERS[kind]}(Params, …)"
        )
    return replace(plugin, name=name, help=(source.__doc__ or "").strip().partition("\n")[0])
