"""Recipe text -> Recipe: the sections of a recipe and what each key means. Pure."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections import ChainMap
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from peftopt.errors import BadRecipe
from peftopt.recipe import chains, thresholds
from peftopt.recipe.chains import call, clash
from peftopt.recipe.limits import MEMORY, RULES
from peftopt.recipe.reader import Reader, Reading, Schema, Wrong, filled, nearest, show
from peftopt.recipe.sections import Limit, Rows, Sections, Sources, check, check_formats
from peftopt.recipe.values import PRICE, TEXT, quantity, scalar, text_as, text_of, typed, whole, words
from peftopt.records import (
    GENERIC,
    NAME,
    YAML,
    Invariants,
    Measure,
    Plugin,
    Quality,
    Recipe,
    Rule,
    Step,
    Variant,
    Workload,
    task_name,
)
from peftopt.stats import LOOKS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEFAULT_ENGINE = "eager"


def parse(
    text: str,
    path: str,
    catalogue: Mapping[str, Plugin],
    default_tradeoffs: str,
    read: Callable[[str], str] | None = None,
) -> Recipe:
    """The recipe in `text`; raises BadRecipe with all its mistakes.

    Touches no files: paths are resolved as text against the folder of `path`. `default_tradeoffs` is the text
    of recipes/tradeoffs.yaml; `read` opens the user's own table where `tradeoffs` is a path.
    """
    reading = _Reading(path, catalogue, read)
    recipe = reading.document(text, reading.recipe(default_tradeoffs))
    if recipe is None or reading.problems:
        raise BadRecipe(path, sorted(dict.fromkeys(reading.problems), key=lambda problem: problem[0]))
    return recipe


def schema(catalogue: Mapping[str, Plugin]) -> Schema:
    """The JSON Schema of a recipe, for editors. It checks keys, types and names of plug-ins. Only `parse` checks values
    against each other."""
    written = _Reading("recipe.yaml", catalogue).sections.schema()
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A recipe of peftopt", **written}


def _name_of(path: str) -> str:
    """The name of a recipe: its file's name, in the letters that a name may have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", Path(path).stem).lstrip(".")[:64] or "recipe"


# ---- the keys of sections ----------------------------------------------------------------------

_RATE = quantity({"": 1}, 0.001, 100_000, "requests a second, such as 2.5")
_SECONDS = quantity({"": 1, "s": 1, "min": 1 / 60}, 1, 86_400, "1 s to a day, such as 600 s or 10 min")
_MOST_BLOCKS = 10_000


def _read_blocks(node: yaml.Node, at: str) -> int:
    """A number of blocks: a planned look, or more than the last: such a race is judged by bets after every block."""
    blocks = whole(1, _MOST_BLOCKS)(node, at)
    if blocks in LOOKS or blocks > LOOKS[-1]:
        return blocks
    looks = ", ".join(map(str, LOOKS))
    raise Wrong(f"must be one of {looks}, or more than {LOOKS[-1]}, found {show(node)}", "more is judged by bets")


_LATER: Schema = {"type": "integer", "minimum": LOOKS[-1] + 1, "maximum": _MOST_BLOCKS}
_BLOCKS = Reader(_read_blocks, lambda: {"anyOf": [{"enum": [*LOOKS]}, _LATER]})

_MEASURE: Mapping[str, Reader[object]] = {
    "requests": whole(1),
    "warmup": whole(0),
    "relaunch": whole(1),
    "min_blocks": whole(0),
    "max_blocks": _BLOCKS,
    "race": words({"all": "all", "winner": "winner"}),
    "clock": words({"wall": "wall", "cpu": "cpu", "auto": "auto"}),
    "threads": whole(0),
    "deadline": _SECONDS,
}


def _pattern(written: str) -> str:
    try:
        re.compile(written)
    except re.error as error:
        raise Wrong(f"is not a regular expression: {error}", "the syntax is that of Python's module re") from error
    return written


_LANGUAGE = "kept|[a-z]{2}"


def _language(code: str) -> str:
    if not re.fullmatch(_LANGUAGE, code):
        raise Wrong(f"must be kept or the two letters of a language, found {show(code)}", "write kept, or de")
    return code


_KEPT = words({"kept": "kept"})
_LABEL = Reader(lambda node, _: scalar(node, "a label"), lambda: {"type": ["string", "number", "boolean"]})

_INVARIANTS: Mapping[str, Reader[object]] = {
    "regex": text_as(_pattern, {"minLength": 1}),
    "numbers": _KEPT,
    "language": text_as(_language, {"pattern": f"^({_LANGUAGE})$"}),
    "refusal": text_as(_pattern, {"minLength": 1}),  # kept is a pattern too
}


# ---- a whole recipe ----------------------------------------------------------------------------


class _Reading(Reading):
    """One pass over one recipe. It knows the plug-ins, and can read a trade-off table that the recipe names."""

    def __init__(self, path: str, catalogue: Mapping[str, Plugin], read: Callable[[str], str] | None = None) -> None:
        super().__init__(path)
        self.catalogue = catalogue
        self.read = read

    # -- the sections

    def recipe(self, default_tradeoffs: str) -> Reader[Recipe]:
        """The whole recipe. Raises Wrong when a mistake was noted."""
        sections = self.sections

        def read(node: yaml.Node, at: str) -> Recipe:
            written = sections(node, at)
            check(written, self, self.catalogue)
            default = self.table(default_tradeoffs, "recipes/tradeoffs.yaml")
            rules = self.rules(written.tradeoffs or {}, default)
            return written.recipe(_name_of(self.path), self.path, rules)

        return Reader(read, sections.schema)

    @property
    def sections(self) -> Reader[Sections]:
        """The reader of all sections, each by itself."""
        readers: Mapping[str, Reader[object]] = {
            "model": self.record(Sources, {"base": self.file, "adapter": self.file}),
            "seed": whole(0, 2**32 - 1),
            "calibration": self.calibration,
            "workloads": self.named(self.workload),
            "quality": self.quality,
            "measure": self.record(Measure, _MEASURE, {"deadline": "deadline_s"}),
            "variants": self.named(self.variant),
            "baseline": TEXT,
            "tradeoffs": self.tradeoffs,
            "require": self.list_of(text_as(thresholds.parse, thresholds.SCHEMA)),
            "minimize": text_as(thresholds.parse_metric, thresholds.TIME_SCHEMA),
            "price_per_hour": PRICE,
        }
        keys = self.keys(readers, ["model", "workloads", "variants", "minimize"], Sections)
        return Reader(lambda node, at: filled(Sections, keys(node, at)), keys.schema)

    def workload(self, name: str) -> Reader[Workload]:
        readers: Mapping[str, Reader[object]] = {
            "prompts": self.file,
            "new_tokens": whole(1),
            "batch": whole(1),
            "slice": TEXT,
            "lengths": words({"fixed": "fixed", "natural": "natural"}),
            "users": whole(1, 10_000),
            "rate": _RATE,
            "requests": whole(4),
        }
        return self.record(Workload, readers, name=name)

    @property
    def quality(self) -> Reader[Quality]:
        readers: Mapping[str, Reader[object]] = {
            "prompts": self.file,
            "new_tokens": whole(1),
            "batch": whole(1),
            "slice": TEXT,
            "schema": self.file,
            "rows": whole(0),
            "invariants": self.record(Invariants, {**_INVARIANTS, "labels": self.list_of(_LABEL)}),
            "tasks": self.tasks,
            "task_rows": whole(1),
        }
        return self.record(Quality, readers)

    @property
    def file(self) -> Reader[str]:
        return text_as(self.beside, {"minLength": 1})

    def beside(self, written: str) -> str:
        """A path that is relative to the recipe's folder."""
        return os.path.normpath(Path(self.path).parent / written)

    @property
    def calibration(self) -> Reader[str]:
        return text_as(lambda written: GENERIC if written == GENERIC else self.beside(written), {"minLength": 1})

    @property
    def tasks(self) -> Reader[tuple[str, ...]]:
        """Names of tasks that lm-evaluation-harness knows, or paths of task files."""
        listed = self.list_of(
            text_as(lambda task: self.beside(task) if task.endswith(YAML) else task, {"minLength": 1})
        )

        def read(node: yaml.Node, at: str) -> tuple[str, ...]:
            tasks = tuple(task for task in listed(node, at) if task)
            for name in map(task_name, tasks):
                if not NAME.fullmatch(name):
                    raise Wrong(f"a task cannot be named {show(name)} here", "use letters, digits, - and _")
            return tasks

        return Reader(read, listed.schema)

    def variant(self, name: str) -> Reader[Variant]:
        listed = self.list_of(self.step)

        def read(node: yaml.Node, at: str) -> Variant:
            before = len(self.problems)
            steps = [step for step in listed(node, at) if step]
            clashes = (clash(a, b) for a, b in combinations(steps, 2))
            for message, hint in dict.fromkeys(filter(None, clashes)):
                self.note(at, message, hint)
            policies = tuple(step for step in steps if step.kind == "policy")
            steps = [step for step in steps if step.kind != "policy"]
            if any(step.kind == "engine" for step in steps[:-1]):
                self.note(at, "has steps after its engine", "write one {engine: …}, after the transforms")
            if len(self.problems) > before:
                raise Wrong
            if not steps or steps[-1].kind != "engine":
                steps.append(self.plugged("engine", DEFAULT_ENGINE, None, at))
            check_formats(steps, at, self, self.catalogue)
            return Variant(name, tuple(steps[:-1]), steps[-1], policies)

        return Reader(read, listed.schema)

    @property
    def step(self) -> Reader[Step]:
        return Reader(self.read_step, lambda: chains.schema(self.catalogue, lambda p: self.params(p).schema()))

    def read_step(self, node: yaml.Node, at: str) -> Step:
        name, params = call(node)
        if name == "engine":
            engine, params = call(params)
            return self.plugged("engine", engine, params, at)
        is_policy = name in self.catalogue and self.catalogue[name].kind == "policy"
        return self.plugged("policy" if is_policy else "transform", name, params, at)

    def plugged(self, kind: str, name: str, params: yaml.Node | None, at: str) -> Step:
        """A step of the plug-in `name`, with checked parameters and defaults."""
        plugin = self.catalogue.get(name)
        if plugin is None:
            kinds = ("engine",) if kind == "engine" else ("transform", "policy")
            known = [p.name for p in self.catalogue.values() if p.kind in kinds]
            raise Wrong(f"no {kind} named {show(name)}", nearest(name, known))
        if plugin.kind != kind:
            a_kind = "an engine" if kind == "engine" else f"a {kind}"
            right = f"{{engine: {name}}}" if plugin.kind == "engine" else f"{name}, as a step of its own"
            raise Wrong(f"{name} is not {a_kind}", f"write {right}")
        written = yaml.MappingNode("", []) if params is None else params
        values = self.params(plugin)(written, at if params is None else f"{at}.{name}")
        return Step(name, kind, plugin.technique, dataclasses.asdict(values), plugin.calibrates, plugin.environment)

    def params(self, plugin: Plugin) -> Reader[DataclassInstance]:
        """The reader of a plug-in's parameters. Their record gives types and defaults, and may refuse a value."""
        annotations = typing.get_type_hints(plugin.params)
        readers = {
            field.name: self.file if field.name in plugin.folders else typed(annotations[field.name])
            for field in dataclasses.fields(plugin.params)
        }
        return self.record(plugin.params, readers)

    # -- the trade-off table

    def quantizers(self) -> list[str]:
        return sorted(p.name for p in self.catalogue.values() if p.technique == "quantize")

    @property
    def rows(self) -> Reader[Rows]:
        halves = {**dict.fromkeys(self.quantizers(), RULES["quantize"]), **RULES}
        return self.keys({owner: self.keys(readers) for owner, readers in halves.items()})

    @property
    def tradeoffs(self) -> Reader[Rows]:
        """The reader of `default`, of the user's own rows, or of the path of a file with rows."""
        rows = self.rows

        def read(node: yaml.Node, at: str) -> Rows:
            return self.named_rows(text_of(node)) if isinstance(node, yaml.ScalarNode) else rows(node, at)

        return Reader(read, lambda: {"anyOf": [TEXT.schema(), rows.schema()]})

    def named_rows(self, written: str) -> Rows:
        """The rows for the word `default` or for a path."""
        if written == "default":
            return {}
        if self.read is None:
            raise Wrong("must be default or a mapping", "a file of limits cannot name another file")
        path = self.beside(written)
        try:
            return self.table(self.read(path), path)
        except (OSError, UnicodeError) as error:
            raise Wrong(
                f"cannot read {path}: {error}", "write default, a mapping, or the path of a YAML file"
            ) from error

    def table(self, text: str, path: str) -> Rows:
        """The rows in a file's text. Its mistakes are noted at the recipe's key `tradeoffs`."""
        other = _Reading(path, self.catalogue)
        rows = other.document(text, other.rows)
        for line, message, hint in other.problems:
            self.note("tradeoffs", f"{path}:{line}: {message}", hint)
        return rows or {}

    def rules(self, own: Rows, default: Rows) -> tuple[Rule, ...]:
        """All rules that a verdict may need. Each quantizer has its own: from its own row, else from `quantize`."""
        rules = []
        for technique, halves in RULES.items():
            for owner in self.quantizers() if technique == "quantize" else [technique]:
                rows = (table.get(row) for row in (owner, technique) for table in (own, default))
                written: dict[str, Limit] = dict(ChainMap(*(dict(row or {}) for row in rows)))
                for half in halves:
                    if half not in written:
                        self.note("tradeoffs", f"{technique}.{half} has no limit")
                limits = {half: limit for half, limit in written.items() if not isinstance(limit, str)}
                if technique == "quantize" and written.get("gain") == "memory":
                    limits["not_slower"] = None
                    limits["smaller"] = limits.get("smaller") or 0.0
                rules += [Rule(owner, half, limits.get(half)) for half in halves if (technique, half) != MEMORY]
        return tuple(rules)
