"""JSON that somebody has changed: a key that is gone, a value of another type, a number nobody measures."""

from __future__ import annotations

import copy
import random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, 10**400),
    *("", "\ud800", "x" * 1000, "inf"),
    *([], {}, [[]], [None], {"a": 1}),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    paths = [path] if path else []
    for key, each in inside:
        paths += places(each, (*path, key))
    return paths


def mutated(value: Any, chance: random.Random) -> tuple[Any, str]:
    """A copy with one change, and what was changed."""
    changed = copy.deepcopy(value)
    paths = places(changed)
    if not paths:
        return chance.choice(ODD), "all of it"
    *before, last = chance.choice(paths)
    parent = changed
    for key in before:
        parent = parent[key]
    path = ".".join(map(str, (*before, last)))
    if chance.random() < 0.3:
        del parent[last]
        return changed, f"without {path}"
    parent[last] = chance.choice(ODD)
    return changed, f"{path} = {str(parent[last])[:40]!r}"
