"""The steps of a variant: their syntax, combinations that make no sense in one chain, and their schema. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import yaml

from peftopt.recipe.reader import Schema, Wrong, one_of
from peftopt.recipe.values import text_of
from peftopt.records import Plugin, Step


def call(node: yaml.Node | None) -> tuple[str, yaml.Node | None]:
    """`gptq` or `{gptq: {bits: 4}}` as the name and the node of its parameters."""
    if isinstance(node, yaml.ScalarNode):
        return text_of(node), None
    if not isinstance(node, yaml.MappingNode) or len(node.value) != 1:
        raise Wrong("must be one name", "write merge, {gptq: {bits: 4}} or {engine: compiled}")
    ((name, params),) = node.value
    return text_of(name), params


_MERGED_AND_BAKED = (
    "merges and bakes the adapter",
    "keep one: bake for virtual tokens (prompt tuning, p-tuning, prefix tuning, …), merge for adapters of weights",
)

_CLASHES: Mapping[tuple[str, str], tuple[str, str]] = {
    ("merge", "merge"): ("merges the adapter twice", "remove the second merge"),
    ("quantize", "quantize"): ("quantizes twice", "keep one quantizer per variant"),
    ("truncate", "truncate"): ("truncates twice", "keep one"),
    ("shorten", "shorten"): ("caps its answers twice", "keep one"),
    ("speculate", "speculate"): ("speculates twice", "keep one"),
    ("prefix", "prefix"): ("reuses prefixes twice", "keep one"),
    ("pack", "pack"): ("packs its batches twice", "keep one"),
    ("quantize", "merge"): (
        "merges into weights that are already quantized",
        "put merge before the quantizer, or leave it out to keep the adapter apart",
    ),
    ("bake", "bake"): ("bakes the adapter twice", "remove the second bake"),
    ("bake", "quantize"): (
        "bakes before it quantizes",
        "put bake after the quantizer: keys and values belong to the weights that compute them",
    ),
    ("bake", "merge"): _MERGED_AND_BAKED,
    ("merge", "bake"): _MERGED_AND_BAKED,
}
"""Chains that make no sense, by the technique of an earlier and of a later step."""


def clash(earlier: Step, later: Step) -> tuple[str, str] | None:
    """What is wrong with two steps in one chain, and a hint; None if nothing is. A quantizer may follow a bake for
    vLLM: its virtual tokens are words of the base, so they are weights."""
    as_words = earlier.technique == "bake" and earlier.params.get("target", "ours") != "ours"
    if as_words and later.technique == "quantize":
        return None
    return _CLASHES.get((earlier.technique, later.technique))


def schema(catalogue: Mapping[str, Plugin], params: Callable[[Plugin], Schema]) -> Schema:
    """The schema of a step: the name of a transform or a policy, a name with its parameters, or an engine."""
    engines = [plugin for plugin in catalogue.values() if plugin.kind == "engine"]
    others = [plugin for plugin in catalogue.values() if plugin.kind != "engine"]
    engine: Schema = {**_named(engines, params), "description": "What runs the model; the last step."}
    return _named(others, params, {"engine": engine})


def _named(
    plugins: Sequence[Plugin], params: Callable[[Plugin], Schema], beside: Mapping[str, Schema] = MappingProxyType({})
) -> Schema:
    """The schema of a plug-in's name, a mapping from one name to its parameters, or one of the keys in `beside`."""
    called = {plugin.name: _helped(plugin, params(plugin)) for plugin in plugins}
    return {"anyOf": [{"enum": [*called]}, one_of({**called, **beside})]}


def _helped(plugin: Plugin, params: Schema) -> Schema:
    return {**params, "description": f"{plugin.help} {params.get('description', '')}".strip()}
