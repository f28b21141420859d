"""Change a recipe's YAML nodes and write them again: paths, keys and values. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from peftopt import plugins
from peftopt.records import GENERIC, YAML


def make_absolute(root: yaml.Node, folder: Path) -> None:
    """Make every path of a recipe absolute, so that the recipe may lie elsewhere."""
    for node in _paths(root):
        node.value = os.path.normpath(folder / node.value)


def _paths(root: yaml.Node) -> Iterator[yaml.ScalarNode]:
    model, quality = get(root, "model"), get(root, "quality")
    nodes = [get(model, "base"), get(model, "adapter"), get(quality, "prompts"), get(quality, "schema")]
    nodes += [get(workload, "prompts") for _, workload in items(get(root, "workloads"))]
    tasks = get(quality, "tasks")
    if isinstance(tasks, yaml.SequenceNode):
        nodes += [task for task in tasks.value if str(task.value).endswith(YAML)]
    for key, word in (("calibration", GENERIC), ("tradeoffs", "default")):
        node = get(root, key)
        nodes += [node] if node is not None and node.value != word else []
    nodes += [folder for _, variant in items(get(root, "variants")) for folder in _folders(variant)]
    return (node for node in nodes if isinstance(node, yaml.ScalarNode))


def _folders(variant: yaml.Node) -> Iterator[yaml.Node | None]:
    """The parameters of a variant's steps that are folders."""
    for step in variant.value if isinstance(variant, yaml.SequenceNode) else ():
        for name, params in items(get(step, "engine")) or items(step):
            plugin = plugins.catalogue().get(name.value)
            yield from (get(params, folder) for folder in plugin.folders) if plugin else ()


def items(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    """The keys and values of a mapping; empty for other nodes."""
    return list(node.value) if isinstance(node, yaml.MappingNode) else []


def get(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """The value of a key of a mapping; None without the key."""
    return next((value for name, value in items(node) if name.value == key), None)


def put(node: yaml.Node, key: str, value: str) -> None:
    """Set a key of a mapping to a word, a path or a number."""
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, value, (True, False))
    old = get(node, key)
    if old is None:
        node.value.append((yaml.ScalarNode("tag:yaml.org,2002:str", key), yaml.ScalarNode(tag, value)))
    else:
        old.tag, old.value = tag, value


def drop(node: yaml.Node, *keys: str) -> None:
    """Take keys out of a mapping."""
    node.value[:] = [(name, value) for name, value in node.value if name.value not in keys]


def written(root: yaml.Node) -> str:
    """The text of a document."""
    return str(yaml.serialize(root, width=120, allow_unicode=True))
