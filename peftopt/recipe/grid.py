"""Grid text -> Grid -> cells: one recipe for each model, adapter, group of variants and class of machines. Pure.

A *cell* is one recipe on one class of machines: a run of its own, with its baseline, its race and its decision. So no
block of measurements has two classes of machines in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from peftopt import identity
from peftopt.errors import BadRecipe
from peftopt.recipe import rewriting
from peftopt.recipe.reader import Reader, Reading, Schema, Wrong, nearest, show
from peftopt.recipe.values import PRICE, TEXT, text_as, whole
from peftopt.records import Recipe, Step

ALL = "all"
"""The group of all variants, in a grid without groups."""

ANY = "any"
"""The class of machines, in a grid without classes."""

MOST = 50_000
"""Cap on the values in a grid: each adapter has two."""

READABLE = 50
"""Most letters of a cell's name before its hash."""


@dataclass(frozen=True)
class MachineClass:
    """A class of machines, and what a cell needs there. Blocks of two classes are never in one race."""

    name: str
    gpus: int = 0
    """The least number of GPUs of a machine of this class."""
    memory: float | None = None
    """Its least memory in bytes: 24 GB."""
    price_per_hour: str = ""
    """Its price per hour, in place of the recipe's: 2.10 USD."""
    variants: tuple[str, ...] = ()
    """The groups of variants to measure there; by default all."""


@dataclass(frozen=True)
class ServedModel:
    """A base model and the adapters that were trained on it."""

    base: str
    """The folder of the base model."""
    adapters: Mapping[str, str]
    """Name -> the folder of an adapter."""


@dataclass(frozen=True)
class Template:
    """The recipe of every cell, before the cell's model and variants are put in: its text, and as it was read."""

    path: str
    text: str
    recipe: Recipe


@dataclass(frozen=True)
class Grid:
    """The models, variants and machines of a sweep."""

    name: str
    path: str
    recipe: Template
    """The path of a recipe; each cell replaces the recipe's model by its own."""
    models: Mapping[str, ServedModel]
    """Name -> a base model and its adapters."""
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> variants of the recipe that race together; the baseline is in every race. By default, all race
    together."""
    machines: Mapping[str, MachineClass] = field(default_factory=dict)
    """Name -> a class of machines."""

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The variants that race together, by group."""
        return self.variants or {ALL: tuple(self.recipe.recipe.variants)}

    @property
    def classes(self) -> Mapping[str, MachineClass]:
        """The classes of machines by name."""
        return self.machines or {ANY: MachineClass(ANY)}


@dataclass(frozen=True)
class Cell:
    """A recipe on a class of machines. `name` is its recipe's name: words for people, and the hash of what it measures.
    `recipe` is its text, with absolute paths."""

    name: str
    model: str
    adapter: str
    group: str
    machine: MachineClass
    recipe: str
    price: str = ""
    """The machine's price per hour, "" if it is not known."""


def parse(
    text: str, path: str, read: Callable[[str], tuple[Recipe, str]], is_folder: Callable[[str], bool] = lambda _: True
) -> Grid:
    """The grid in `text`; raises BadRecipe with all its mistakes.

    Touches no files: `read` reads the recipe of a path, `is_folder` says whether there is a folder.
    """
    reading = _Reading(path, read, is_folder)
    grid = reading.document(text, reading.grid)
    if grid is None or reading.problems:
        raise BadRecipe(path, sorted(dict.fromkeys(reading.problems), key=lambda problem: problem[0]))
    return grid


def schema() -> Schema:
    """The JSON Schema of a grid, for editors. It checks keys and types. Only `parse` checks values against each
    other."""

    def nothing(path: str) -> tuple[Recipe, str]:
        raise Wrong(f"{path} is not read for a schema")

    written = _Reading("grid.yaml", nothing, bool).grid.schema()
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A grid of peftopt", **written}


_BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
_MEMORY = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(MB|GB|TB)")


def _bytes(written: str) -> float:
    match = _MEMORY.fullmatch(written)
    if match is None:
        raise Wrong(f"must be a size, such as 24 GB, found {show(written)}", f"units: {', '.join(_BYTES)}")
    return float(match[1]) * _BYTES[match[2]]


class _Reading(Reading):
    """One pass over one grid."""

    most = MOST

    def __init__(self, path: str, read: Callable[[str], tuple[Recipe, str]], is_folder: Callable[[str], bool]) -> None:
        super().__init__(path)
        self.read = read
        self.is_folder = is_folder

    @property
    def grid(self) -> Reader[Grid]:
        """The whole grid. Raises Wrong when a mistake was noted."""
        readers: Mapping[str, Reader[object]] = {
            "recipe": Reader(self.template, TEXT.schema),
            "models": self.named(lambda _: self.model),
            "variants": self.named(lambda _: self.list_of(TEXT)),
            "machines": self.named(self.machine),
        }
        record = self.record(Grid, readers, name=Path(self.path).stem, path=self.path)

        def read(node: yaml.Node, at: str) -> Grid:
            grid = record(node, at)
            self.check(grid)
            return grid

        return Reader(read, record.schema)

    def template(self, node: yaml.Node, at: str) -> Template:
        """The recipe at a path that is relative to the grid's folder; its mistakes are noted where the grid names
        it."""
        path = self.beside(TEXT(node, at))
        try:
            recipe, text = self.read(path)
        except BadRecipe as error:
            for line, message, hint in error.problems:
                self.note(at, f"{path}:{line}: {message}", hint)
            raise Wrong from error
        return Template(path, text, recipe)

    @property
    def model(self) -> Reader[ServedModel]:
        return self.record(ServedModel, {"base": self.folder, "adapters": self.named(lambda _: self.folder)})

    def machine(self, name: str) -> Reader[MachineClass]:
        readers: Mapping[str, Reader[object]] = {
            "gpus": whole(0, 1024),
            "memory": text_as(_bytes, {"pattern": f"^{_MEMORY.pattern}$"}),
            "price_per_hour": PRICE,
            "variants": self.list_of(TEXT),
        }
        return self.record(MachineClass, readers, name=name)

    @property
    def folder(self) -> Reader[str]:
        return text_as(self.beside, {"minLength": 1})

    def beside(self, written: str) -> str:
        """A path that is relative to the grid's folder."""
        return os.path.normpath(Path(self.path).parent / written)

    def check(self, grid: Grid) -> None:
        """Note contradictions between sections, and missing folders."""
        known = grid.recipe.recipe.variants
        for group, names in grid.variants.items():
            self.check_names(f"variants.{group}", names, known, "variant")
        for machine in grid.machines.values():
            self.check_names(f"machines.{machine.name}.variants", machine.variants, grid.groups, "group of variants")
        for name, model in grid.models.items():
            for at, folder in [("base", model.base), *((f"adapters.{a}", f) for a, f in model.adapters.items())]:
                if not self.is_folder(folder):
                    self.note(f"models.{name}.{at}", f"there is no folder {folder}", "paths are relative to the grid")

    def check_names(self, at: str, names: Iterable[str], known: Iterable[str], what: str) -> None:
        """Note each unknown name."""
        known = list(known)
        for name in names:
            if name not in known:
                self.note(at, f"no {what} named {show(name)}", nearest(name, known))


# ---- the cells ---------------------------------------------------------------------------------


def cells(grid: Grid) -> list[Cell]:
    """The cells of the grid, in its order. A change that affects no measurement, such as a comment or a price, changes
    no cell's name."""
    bodies = {group: _body(grid.recipe, names) for group, names in grid.groups.items()}
    return [
        _cell(grid, (model, adapter, group), machine, bodies[group])
        for model, served in grid.models.items()
        for adapter in served.adapters
        for group in grid.groups
        for machine in grid.classes.values()
        if group in (machine.variants or grid.groups)
    ]


def _cell(grid: Grid, names: tuple[str, str, str], machine: MachineClass, body: str) -> Cell:
    model, adapter, group = names
    served = grid.models[model]
    base, folder = (json.dumps(path, ensure_ascii=False) for path in (served.base, served.adapters[adapter]))
    text = f"model: {{base: {base}, adapter: {folder}}}\n{body}"
    words = [model, adapter, *([group] if grid.variants else []), *([machine.name] if grid.machines else [])]
    name = f"{'-'.join(words)[:READABLE]}-{identity.of_value([text, machine.name])[:8]}"
    price = machine.price_per_hour or grid.recipe.recipe.price_per_hour
    text += f"price_per_hour: {price}\n" if price else ""
    return Cell(name, model, adapter, group, machine, text, price)


def _body(template: Template, names: tuple[str, ...]) -> str:
    """The recipe's text with only these variants and the baseline, without its model and its price."""
    root = yaml.compose(template.text, Loader=yaml.SafeLoader)
    assert root is not None, "it was read as a recipe before"
    rewriting.drop(root, "model", "price_per_hour")
    rewriting.make_absolute(root, Path(template.path).parent)
    variants = rewriting.get(root, "variants")
    kept = {*names, template.recipe.baseline}
    assert variants is not None, "a recipe without variants is refused"
    rewriting.drop(variants, *(name for name in template.recipe.variants if name not in kept))
    return rewriting.written(root)


def builds(grid: Grid) -> Mapping[str, int]:
    """Model -> the most artifacts that its cells build: one per step, shared prefixes of chains once per adapter."""
    used = {name for group in grid.groups.values() for name in group} | {grid.recipe.recipe.baseline}
    chains = [grid.recipe.recipe.variants[name].steps for name in used]
    prefixes = {_hash(chain[: n + 1]) for chain in chains for n in range(len(chain))}
    return {name: len(prefixes) * len(served.adapters) for name, served in grid.models.items()}


def _hash(steps: Iterable[Step]) -> str:
    return identity.of_value([[step.plugin, dict(step.params)] for step in steps])
