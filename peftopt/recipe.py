"""Recipe text -> Recipe: every mistake at once, each with its line, its key path and the nearest known word.

A *reader* takes a YAML node and its key path and returns a value, or raises ValueError that says what it must
be; tables say which reader belongs to which key. A broken value reads as None with its mistake noted, so that
reading goes on to the next one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from peftopt import thresholds
from peftopt.errors import BadRecipe, PeftoptError
from peftopt.records import Measure, Plugin, Quality, Recipe, Rule, Step, Variant, Workload

LOOKS = (10, 16, 24, 40, 60)
"""The blocks after which a race may be looked at, and so the only values of `max_blocks`."""

MAX_CHARACTERS, MAX_NODES, MAX_DEPTH = 2**20, 2_000, 20
"""Caps on a recipe: far above any real one, far below what would slow this machine down."""

_JUDGED_ON_ANSWERS = ("ratio", "share", "nats")
"""The units of the figures that need a `quality` section."""

NAME = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}")
_QUANTITY = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([a-z%]*)")
DEFAULT_ENGINE, DEFAULT_BASELINE = "eager", "adapter"

Reader = Callable[[yaml.Node, str], Any]
_SectionReader = Callable[[yaml.Node, str], dict[str, Any]]
Rows = Mapping[str, Mapping[str, float | None] | None]
Problem = tuple[int, str, str]


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
    found = reading.document(text, partial(reading.recipe, default_tradeoffs))
    if reading.problems:
        raise BadRecipe(path, sorted(dict.fromkeys(reading.problems), key=lambda problem: problem[0]))
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(path).stem).lstrip(".")[:64] or "recipe"
    return Recipe(name=name, path=path, **found)


# ---- readers of one value ----------------------------------------------------------------------


class _Wrong(ValueError):
    """What a value must be, and a hint; without a message, the mistakes are already noted."""

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def _show(found: yaml.Node | str) -> str:
    """What the user wrote, short enough for a message and safe to print."""
    if isinstance(found, yaml.ScalarNode):
        return "nothing" if found.tag.endswith(":null") else _show(found.value)
    if isinstance(found, yaml.Node):
        return "a list" if isinstance(found, yaml.SequenceNode) else "a mapping"
    return repr(found if len(found) <= 48 else found[:47] + "…")


def _nearest(word: str, known: Iterable[str]) -> str:
    """A hint: the known word that was probably meant, or else all of them."""
    guess = difflib.get_close_matches(word[:64], sorted(known), n=1)
    return f"did you mean {guess[0]!r}?" if guess else f"known: {', '.join(sorted(known))}"


def _scalar(node: yaml.Node, expected: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        raise _Wrong(f"must be {expected}, found {_show(node)}")
    return str(node.value)


def _text(node: yaml.Node, at: str = "") -> str:
    value = _scalar(node, "text")
    if not node.tag.endswith(":str"):
        raise _Wrong(f"must be text, found {_show(node)}", "put it in quotes if it is meant as text")
    if not value.strip() or not value.isprintable():
        raise _Wrong(f"must be text that can be printed, found {_show(node)}")
    return value


def _whole(low: int, high: int = 1_000_000) -> Reader:
    def read(node: yaml.Node, at: str) -> int:
        value = _scalar(node, expected := f"a whole number from {low:,} to {high:,}")
        plain = node.tag.endswith(":int") and re.fullmatch(r"[+-]?[0-9]{1,18}", value)
        if not plain or not low <= int(value) <= high:
            raise _Wrong(f"must be {expected}, found {_show(node)}")
        return int(value)

    return read


def _quantity(units: Mapping[str, float], low: float, high: float, expected: str) -> Reader:
    """A number and its unit, "" being the bare number: "15 %" with {"": 1, "%": 100}, units per base unit."""

    def read(node: yaml.Node, at: str) -> float:
        match = _QUANTITY.fullmatch(_scalar(node, expected).strip())
        amount = float(match[1]) / units.get(match[2], math.nan) if match else math.nan
        if not low <= amount <= high:
            raise _Wrong(f"must be {expected}, found {_show(node)}")
        return amount

    return read


def _words(known: Mapping[str, Any]) -> Reader:
    def read(node: yaml.Node, at: str) -> Any:
        if (value := _scalar(node, expected := f"one of {', '.join(known)}")) not in known:
            raise _Wrong(f"must be {expected}, found {_show(node)}")
        return known[value]

    return read


def _call(node: yaml.Node | None) -> tuple[str, yaml.Node | None]:
    """`gptq` or `{gptq: {bits: 4}}` as the name and the node of its parameters."""
    if isinstance(node, yaml.ScalarNode):
        return _text(node), None
    if not isinstance(node, yaml.MappingNode) or len(node.value) != 1:
        raise _Wrong("must be one name", "write merge, {gptq: {bits: 4}} or {engine: compiled}")
    ((name, params),) = node.value
    return _text(name), params


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _or_off(reader: Reader) -> Reader:
    return lambda node, at: None if node.value == "off" else reader(node, at)


def _typed(annotation: Any) -> Reader:
    """The reader for a field of a plug-in's `Params`. For `X | None`, None is the key left out."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return _words({str(a): a for a in arguments})
    if origin in (typing.Union, types.UnionType):
        (annotation,) = (a for a in arguments if a is not types.NoneType)
        return _typed(annotation)
    simple: Mapping[Any, Reader] = {
        int: _whole(-(10**9), 10**9),
        float: _quantity({"": 1}, -1e300, 1e300, "a number"),
        bool: _words({"true": True, "false": False}),
        str: _text,
    }
    return simple[annotation]


def _share(low: float, high: float) -> Reader:
    expected = f"a share from {low * 100:g} % to {high * 100:g} %, such as 15 %, or off"
    return _or_off(_quantity({"": 1, "%": 100}, low, high, expected))


# ---- the tables --------------------------------------------------------------------------------

_TOKENS = _or_off(_quantity({"": 1, "tokens": 1}, 1, 1e9, "a number such as 2048 tokens, or off"))
_SECONDS = _quantity({"": 1, "s": 1, "min": 1 / 60}, 1, 86_400, "1 s to a day, such as 600 s or 10 min")

RULES: Mapping[str, Mapping[str, Reader]] = {
    "merge": {"gain": _share(0, 0.99), "parity": _share(0, 1)},
    "quantize": {
        "critical_errors": _share(0.0001, 0.99),  # no sample shows a rate of 0
        "not_slower": _share(0, 1),
        "smaller": _share(0, 0.99),
    },
    "compile": {"gain": _share(0, 0.99), "parity": _share(0, 1)},
    "truncate": {"over": _TOKENS},
    "shorten": {"by": _words({"max_new_tokens": 1.0, "off": None})},
}
"""The shape of the trade-off table: technique -> the halves of its rule -> how each limit is read."""

_MEASURE: Mapping[str, Reader] = {
    "requests": _whole(1),
    "warmup": _whole(0),
    "relaunch": _whole(1),
    "max_blocks": _words({str(look): look for look in LOOKS}),
    "clock": _words({"wall": "wall", "cpu": "cpu"}),
    "threads": _whole(0),
    "deadline": _SECONDS,
}

_CLASHES: Mapping[tuple[str, str], tuple[str, str]] = {
    ("merge", "merge"): ("merges the adapter twice", "remove the second merge"),
    ("quantize", "quantize"): ("quantizes twice", "keep one quantizer per variant"),
    ("quantize", "merge"): (
        "merges into weights that are already quantized",
        "put merge before the quantizer, or leave it out to keep the adapter apart",
    ),
}
"""Chains that make no sense, by the technique of an earlier and of a later step."""


# ---- a whole recipe ----------------------------------------------------------------------------


class _Reading:
    """One pass over one YAML text: `problems` are its mistakes, `lines` tells where a key path is written."""

    def __init__(self, path: str, catalogue: Mapping[str, Plugin], read: Callable[[str], str] | None = None) -> None:
        self.path, self.catalogue, self.read = path, catalogue, read
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []

    # -- walking

    def note(self, at: str, message: str, hint: str = "", line: int | None = None) -> None:
        where = self.lines.get(at, 0) if line is None else line
        self.problems.append((where, f"{at}: {message}" if at else message, hint))

    def document(self, text: str, reader: Reader) -> Any:
        """What `reader` makes of the one YAML document in `text`."""
        try:
            root = _compose(text)
        except _Unreadable as error:
            self.problems.append(error.problem)
            return None
        self.lines[""] = root.start_mark.line + 1
        return self.value(reader, root, "")

    def value(self, reader: Reader, node: yaml.Node, at: str) -> Any:
        try:
            return reader(node, at)
        except (ValueError, PeftoptError) as error:
            if str(error):
                self.note(at, str(error), getattr(error, "hint", ""))
            return None

    def items(self, node: yaml.Node, at: str) -> Iterator[tuple[str, str, yaml.Node]]:
        """The keys of a mapping, the key path of each, and its value; duplicates and odd keys are noted."""
        if not isinstance(node, yaml.MappingNode):
            raise _Wrong(f"must be a mapping (key: value), found {_show(node)}")
        seen: dict[str, int] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
                self.note(at, f"keys must be text, found {_show(key_node)}", "put the key in quotes", line)
            elif key in seen:
                self.note(at, f"{_show(key)} is written twice, first on line {seen[key]}", "remove one", line)
            else:
                seen[key] = line
                path = f"{at}.{key}" if at else key
                self.lines[path] = line
                yield key, path, child

    def keys(self, readers: Mapping[str, Reader], required: Iterable[str] = ()) -> _SectionReader:
        """A reader of a mapping that has these keys."""

        def read(node: yaml.Node, at: str) -> dict[str, Any]:
            values: dict[str, Any] = {}
            meant = set()
            for key, path, child in self.items(node, at):
                meant.add(key)
                if key in readers:
                    values[key] = self.value(readers[key], child, path)
                else:
                    meant.update(difflib.get_close_matches(key[:64], readers, n=1))
                    self.note(at, f"unknown key {_show(key)}", _nearest(key, readers), self.lines[path])
            for key in required:
                if key not in meant:
                    self.note(at, f"{key!r} is missing", f"add {key}: …")
            return values

        return read

    def record(self, cls: type, readers: Mapping[str, Reader], **given: Any) -> Reader:
        """A reader of a mapping into a dataclass, which says which keys are required."""
        needed = [f.name for f in dataclasses.fields(cls) if f.name in readers and _has_no_default(f)]

        def read(node: yaml.Node, at: str) -> Any:
            before = len(self.problems)
            values = self.keys(readers, needed)(node, at)
            if len(self.problems) > before:
                raise _Wrong
            return cls(**values, **given)

        return read

    def named(self, reader: Callable[[str], Reader]) -> Reader:
        """A reader of name -> value, where `reader(name)` reads the value."""

        def read(node: yaml.Node, at: str) -> dict[str, Any]:
            values = {}
            for name, path, child in self.items(node, at):
                if not NAME.fullmatch(name):
                    hint = "1 to 64 letters, digits, '_', '-' or '.', and no '.' in front"
                    self.note(at, f"{_show(name)} cannot be a name", hint, self.lines[path])
                else:
                    values[name] = self.value(reader(name), child, path)
            if not node.value:
                raise _Wrong("must name at least one")
            return values

        return read

    def list_of(self, reader: Reader) -> Reader:
        def read(node: yaml.Node, at: str) -> tuple[Any, ...]:
            if not isinstance(node, yaml.SequenceNode):
                raise _Wrong(f"must be a list, found {_show(node)}", "write it in brackets: […]")
            values = []
            for number, child in enumerate(node.value, 1):
                path = f"{at}[{number}]"
                self.lines[path] = child.start_mark.line + 1
                values.append(self.value(reader, child, path))
            return tuple(values)

        return read

    # -- the sections

    def recipe(self, default_tradeoffs: str, node: yaml.Node, at: str) -> dict[str, Any]:
        """Everything a Recipe holds, by field name; complete when no problem was noted."""
        requests = {"prompts": self.file, "new_tokens": _whole(1), "batch": _whole(1)}
        sections: Mapping[str, Reader] = {
            "model": self.keys({"base": self.file, "adapter": self.file}, ["base", "adapter"]),
            "seed": _whole(0, 2**32 - 1),
            "calibration": self.file,
            "workloads": self.named(lambda name: self.record(Workload, {**requests, "slice": _text}, name=name)),
            "quality": self.record(Quality, {**requests, "schema": self.file, "rows": _whole(0)}),
            "measure": self.measure,
            "variants": self.named(self.variant),
            "baseline": _text,
            "tradeoffs": self.tradeoffs,
            "require": self.list_of(lambda n, _: thresholds.parse(_text(n))),
            "minimize": lambda n, _: thresholds.parse_metric(_text(n)),
        }
        found: dict[str, Any] = {
            "baseline": DEFAULT_BASELINE,
            "quality": None,
            "require": (),
            "measure": Measure(),
        }
        found |= self.keys(sections, ["model", "workloads", "variants", "minimize"])(node, at)
        self.check_variants(found)
        self.check_metrics(found)
        model, own = found.pop("model", None) or {}, found.pop("tradeoffs", None) or {}
        default = self.table(default_tradeoffs, "recipes/tradeoffs.yaml")
        return {"calibration": None} | found | model | {"rules": self.rules(own, default)}

    def file(self, node: yaml.Node, at: str) -> str:
        return os.path.normpath(Path(self.path).parent / _text(node))

    def measure(self, node: yaml.Node, at: str) -> Measure:
        values = self.keys(_MEASURE)(node, at)
        if "deadline" in values:
            values["deadline_s"] = values.pop("deadline")
        return Measure(**values)

    def variant(self, name: str) -> Reader:
        def read(node: yaml.Node, at: str) -> Variant:
            before = len(self.problems)
            steps = [step for step in self.list_of(self.step)(node, at) if step]
            clashes = (_CLASHES.get((a.technique, b.technique)) for a, b in combinations(steps, 2))
            for clash in dict.fromkeys(filter(None, clashes)):
                self.note(at, *clash)
            if any(step.kind == "engine" for step in steps[:-1]):
                self.note(at, "has steps after its engine", "one {engine: …}, at the end of the list")
            if len(self.problems) > before:
                raise _Wrong
            if not steps or steps[-1].kind != "engine":
                steps.append(self.plugged("engine", DEFAULT_ENGINE, None, at))
            return Variant(name, tuple(steps[:-1]), steps[-1])

        return read

    def step(self, node: yaml.Node, at: str) -> Step:
        kind, (name, params) = "transform", _call(node)
        if name == "engine":
            kind, (name, params) = "engine", _call(params)
        return self.plugged(kind, name, params, at)

    def plugged(self, kind: str, name: str, params: yaml.Node | None, at: str) -> Step:
        """A step of the plug-in `name`, its parameters checked and its defaults filled in."""
        plugin = self.catalogue.get(name)
        if plugin is None:
            known = [p.name for p in self.catalogue.values() if p.kind == kind]
            raise _Wrong(f"no {kind} named {_show(name)}", _nearest(name, known))
        if plugin.kind != kind:
            right = f"{{engine: {name}}}" if plugin.kind == "engine" else f"{name}, as a step of its own"
            raise _Wrong(f"{name} is not a{'n' * (kind == 'engine')} {kind}", f"write {right}")
        annotations = typing.get_type_hints(plugin.params)
        readers = {f.name: _typed(annotations[f.name]) for f in dataclasses.fields(plugin.params)}
        node = yaml.MappingNode("", []) if params is None else params
        values = self.record(plugin.params, readers)(node, at if params is None else f"{at}.{name}")
        return Step(name, kind, plugin.technique, dataclasses.asdict(values), plugin.calibrates)

    # -- the trade-off table

    def quantizers(self) -> list[str]:
        return sorted(p.name for p in self.catalogue.values() if p.technique == "quantize")

    def rows(self, node: yaml.Node, at: str) -> Rows:
        halves = {**dict.fromkeys(self.quantizers(), RULES["quantize"]), **RULES}
        return self.keys({owner: self.keys(readers) for owner, readers in halves.items()})(node, at)

    def tradeoffs(self, node: yaml.Node, at: str) -> Rows:
        """`default`, rows of the user's own, or the path of a file that holds them."""
        if not isinstance(node, yaml.ScalarNode):
            return self.rows(node, at)
        if _text(node) == "default":
            return {}
        if self.read is None:
            raise _Wrong("must be default or a mapping", "a file cannot be read here")
        path = self.file(node, at)
        try:
            return self.table(self.read(path), path)
        except (OSError, UnicodeError) as error:
            raise _Wrong(f"cannot read {path}: {error}", "default, a mapping, or a YAML file") from error

    def table(self, text: str, path: str) -> Rows:
        """The rows of another file; its mistakes are noted where the recipe names it."""
        other = _Reading(path, self.catalogue)
        rows: Rows | None = other.document(text, other.rows)
        for line, message, hint in other.problems:
            self.note("tradeoffs", f"{path}:{line}: {message}", hint)
        return rows or {}

    def rules(self, own: Rows, default: Rows) -> tuple[Rule, ...]:
        """Every half-row that a verdict may need: each quantizer under its own name, its own row first."""
        rules = []
        for technique, halves in RULES.items():
            for owner in self.quantizers() if technique == "quantize" else [technique]:
                rows = (table.get(row) for row in (owner, technique) for table in (own, default))
                limits = ChainMap(*(dict(row or {}) for row in rows))
                for half in halves:
                    if half not in limits:
                        self.note("tradeoffs", f"{technique}.{half} has no limit")
                    rules.append(Rule(owner, half, limits.get(half)))
        return tuple(rules)

    # -- what must hold between sections

    def check_variants(self, found: Mapping[str, Any]) -> None:
        variants: Mapping[str, Variant | None] = found.get("variants") or {}
        baseline, at = found["baseline"], "baseline" if "baseline" in self.lines else "variants"
        if variants and baseline and baseline not in variants:
            self.note(at, f"no variant named {_show(baseline)} as baseline", _nearest(baseline, variants))
        if (variant := variants.get(baseline)) and variant.steps:
            self.note(at, f"{baseline} has transforms", "name the adapter as it is served today: []")
        whole = [variant for variant in variants.values() if variant]
        first: dict[str, str] = {}
        for variant in whole:
            twin = first.setdefault(repr((variant.steps, variant.engine)), variant.name)
            if twin != variant.name:
                self.note(f"variants.{variant.name}", f"is the same chain as {twin}", "remove one of them")
        for variant in whole if "calibration" not in found else ():
            for step in variant.steps:
                if step.calibrates:
                    hint = "add calibration: the path of a JSONL file of prompts and answers"
                    self.note(f"variants.{variant.name}", f"{step.plugin} needs calibration texts", hint)

    def check_metrics(self, found: Mapping[str, Any]) -> None:
        minimize, known = found.get("minimize"), found.get("workloads")
        limits = [limit and limit.metric for limit in found["require"] or ()]
        if minimize and not (minimize.workload and thresholds.METRICS[minimize.name].better == "lower"):
            self.note("minimize", f"{minimize.name} cannot be raced", "a time such as latency.p50@chat")
        for at, metric in [("minimize", minimize), *((f"require[{n}]", m) for n, m in enumerate(limits, 1))]:
            if metric and metric.workload and known and metric.workload not in known:
                self.note(at, f"no workload named {_show(metric.workload)}", _nearest(metric.workload, known))
            if metric and thresholds.METRICS[metric.name].unit in _JUDGED_ON_ANSWERS and not self.lines.get("quality"):
                self.note(at, f"{metric.name} is measured on checked answers", "add quality: {prompts: …}")


# ---- YAML, with the parts of it that a recipe does without -------------------------------------


class _Unreadable(Exception):
    def __init__(self, line: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.problem: Problem = (line, message, hint)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without tags and aliases, and with a cap on depth and size."""

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        refused = {
            "an anchor or an alias: write the value out": getattr(event, "anchor", None),
            "a YAML tag: remove it": getattr(event, "tag", None),
            f"nested more than {MAX_DEPTH} levels deep": self.depth > MAX_DEPTH,
            f"more than {MAX_NODES} values": self.nodes > MAX_NODES,
        }
        for message in (message for message, seen in refused.items() if seen):
            raise _Unreadable(event.start_mark.line + 1, message)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str) -> yaml.Node:
    """The root node of the one document in `text`; raises _Unreadable."""
    if len(text) > MAX_CHARACTERS:
        raise _Unreadable(0, f"more than {MAX_CHARACTERS:,} characters", "is it the right file?")
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _Unreadable(line, "a character that cannot be printed", "save it as UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        if any(written.lstrip(" ").startswith("\t") for written in text.splitlines()[line : line + 1]):
            raise _Unreadable(line + 1, "indented with a tab", "YAML is indented with spaces") from error
        raise _Unreadable(line + 1, f"not YAML: {error.problem}") from error
    except (ValueError, OverflowError) as error:  # an escape that is no character, such as "\UFFFFFFFF"
        raise _Unreadable(loader.get_mark().line + 1 if loader else 0, f"not YAML: {error}") from error
    if root is None:
        raise _Unreadable(1, "the file is empty", "docs/recipes.md shows what a recipe holds")
    return root
