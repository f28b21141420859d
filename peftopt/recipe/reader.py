"""YAML text -> values: every mistake at once, each with its line, its key path and the nearest known word. Pure.

A *reader* takes a YAML node and its key path and returns a value, or raises ValueError that says what it must
be. `Reader[int]` returns whole numbers. A broken value reads as None with its mistake noted, so that reading goes on to
the next one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import yaml
from yaml.reader import ReaderError

from peftopt.errors import PeftoptError
from peftopt.records import NAME

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_CHARACTERS = 2**20
"""Cap on a document's text. As the two below: far above any real one, far below what would slow this machine down."""

MAX_NODES = 2_000
"""Cap on a document's values."""

MAX_DEPTH = 20
"""Cap on how deep a document's values are nested."""

_QUANTITY = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([a-z%]*)")

Value = TypeVar("Value")
Record = TypeVar("Record", bound="DataclassInstance")
Reader = Callable[[yaml.Node, str], Value]

Problem = tuple[int, str, str]
"""A mistake: its line, what is wrong, and a hint."""


# ---- readers of one value ----------------------------------------------------------------------


class Wrong(ValueError):
    """What a value must be, and a hint; without a message, the mistakes are already noted."""

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def show(written: yaml.Node | str) -> str:
    """What the user wrote, short enough for a message and safe to print."""
    if isinstance(written, yaml.SequenceNode):
        return "a list"
    if isinstance(written, yaml.MappingNode):
        return "a mapping"
    if isinstance(written, yaml.Node):
        return "nothing" if written.tag.endswith(":null") else show(str(written.value))
    return repr(written if len(written) <= 48 else written[:47] + "…")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: the known word that was probably meant, or else all of them."""
    guess = difflib.get_close_matches(word[:64], sorted(known), n=1)
    return f"did you mean {guess[0]!r}?" if guess else f"known: {', '.join(sorted(known))}"


def scalar(node: yaml.Node, expected: str) -> str:
    """The text of a single value. Raises Wrong for nothing, a list or a mapping; `expected` is what it must be."""
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        raise Wrong(f"must be {expected}, found {show(node)}")
    return str(node.value)


def text_of(node: yaml.Node, at: str = "") -> str:
    """A value that is text, not blank, and can be printed. Raises Wrong for others, such as a bare number."""
    value = scalar(node, "text")
    if not node.tag.endswith(":str"):
        raise Wrong(f"must be text, found {show(node)}", "put it in quotes if it is meant as text")
    if not value.strip() or not value.isprintable():
        raise Wrong(f"must be text that can be printed, found {show(node)}")
    return value


def whole(low: int, high: int = 1_000_000) -> Reader[int]:
    """A reader of whole numbers from `low` to `high`, in decimal digits."""
    expected = f"a whole number from {low:,} to {high:,}"

    def read(node: yaml.Node, at: str) -> int:
        value = scalar(node, expected)
        plain = node.tag.endswith(":int") and re.fullmatch(r"[+-]?[0-9]{1,18}", value)
        if not plain or not low <= int(value) <= high:
            raise Wrong(f"must be {expected}, found {show(node)}")
        return int(value)

    return read


def quantity(units: Mapping[str, float], low: float, high: float, expected: str) -> Reader[float]:
    """A number and its unit, "" being the bare number: "15 %" with {"": 1, "%": 100}, units per base unit."""

    def read(node: yaml.Node, at: str) -> float:
        match = _QUANTITY.fullmatch(scalar(node, expected).strip())
        amount = float(match[1]) / units.get(match[2], math.nan) if match else math.nan
        if not low <= amount <= high:
            raise Wrong(f"must be {expected}, found {show(node)}")
        return amount

    return read


def words(known: Mapping[str, Value]) -> Reader[Value]:
    """A reader of one of these words; it returns what the word stands for."""
    expected = f"one of {', '.join(known)}"

    def read(node: yaml.Node, at: str) -> Value:
        value = scalar(node, expected)
        if value not in known:
            raise Wrong(f"must be {expected}, found {show(node)}")
        return known[value]

    return read


def or_off(reader: Reader[Value]) -> Reader[Value | None]:
    """The reader, which now also reads `off`, as None."""
    return lambda node, at: None if node.value == "off" else reader(node, at)


def typed(annotation: object) -> Reader[object]:
    """The reader for a field of a plug-in's `Params`. For `X | None`, None is the key left out."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Literal:
        return words({str(word): word for word in arguments})
    if origin in (typing.Union, types.UnionType):
        (kind,) = (each for each in arguments if each is not types.NoneType)
        return typed(kind)
    simple: Mapping[object, Reader[object]] = {
        int: whole(-(10**9), 10**9),
        float: quantity({"": 1}, -1e300, 1e300, "a number"),
        bool: words({"true": True, "false": False}),
        str: text_of,
    }
    return simple[annotation]


def share(low: float, high: float) -> Reader[float | None]:
    """A reader of shares from `low` to `high` (1 is 100 %), written `15 %` or `0.15`; `off` is None."""
    expected = f"a share from {low * 100:g} % to {high * 100:g} %, such as 15 %, or off"
    return or_off(quantity({"": 1, "%": 100}, low, high, expected))


# ---- walking a document ------------------------------------------------------------------------


class Reading:
    """One pass over one YAML text: `problems` are its mistakes, `lines` tells where a key path is written."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []

    def note(self, at: str, message: str, hint: str = "", line: int | None = None) -> None:
        """Keep a mistake, with the line on which `at` is written; `line` where another one is meant."""
        where = self.lines.get(at, 0) if line is None else line
        self.problems.append((where, f"{at}: {message}" if at else message, hint))

    def document(self, text: str, reader: Reader[Value]) -> Value | None:
        """What `reader` makes of the one YAML document in `text`; None where it cannot be read, and why is noted."""
        try:
            root = _compose(text)
        except _Unreadable as error:
            self.problems.append(error.problem)
            return None
        self.lines[""] = root.start_mark.line + 1
        return self.value(reader, root, "")

    def value(self, reader: Reader[Value], node: yaml.Node, at: str) -> Value | None:
        """What `reader` makes of a node; None where it raises, and the mistake is noted."""
        try:
            return reader(node, at)
        except (ValueError, PeftoptError) as error:
            if str(error):
                self.note(at, str(error), getattr(error, "hint", ""))
            return None

    def items(self, node: yaml.Node, at: str) -> Iterator[tuple[str, str, yaml.Node]]:
        """The keys of a mapping, the key path of each, and its value; duplicates and odd keys are noted."""
        if not isinstance(node, yaml.MappingNode):
            raise Wrong(f"must be a mapping (key: value), found {show(node)}")
        first_lines: dict[str, int] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
                self.note(at, f"keys must be text, found {show(key_node)}", "put the key in quotes", line)
            elif key in first_lines:
                self.note(at, f"{show(key)} is written twice, first on line {first_lines[key]}", "remove one", line)
            else:
                first_lines[key] = line
                path = f"{at}.{key}" if at else key
                self.lines[path] = line
                yield key, path, child

    def keys(
        self, readers: Mapping[str, Reader[Value]], required: Iterable[str] = ()
    ) -> Reader[dict[str, Value | None]]:
        """A reader of a mapping that has these keys. Keys that are not written are left out."""

        def read(node: yaml.Node, at: str) -> dict[str, Value | None]:
            values: dict[str, Value | None] = {}
            meant: set[str] = set()
            for key, path, child in self.items(node, at):
                meant.add(key)
                if key in readers:
                    values[key] = self.value(readers[key], child, path)
                else:
                    meant.update(difflib.get_close_matches(key[:64], readers, n=1))
                    self.note(at, f"unknown key {show(key)}", nearest(key, readers), self.lines[path])
            for key in required:
                if key not in meant:
                    self.note(at, f"{key!r} is missing", f"add {key}: …")
            return values

        return read

    def record(self, cls: type[Record], readers: Mapping[str, Reader[object]], **given: object) -> Reader[Record]:
        """A reader of a mapping into a dataclass, which says which keys are required."""
        needed = [field.name for field in dataclasses.fields(cls) if field.name in readers and _has_no_default(field)]

        def read(node: yaml.Node, at: str) -> Record:
            before = len(self.problems)
            values = self.keys(readers, needed)(node, at)
            if len(self.problems) > before:
                raise Wrong
            return filled(cls, {**values, **given})

        return read

    def named(self, reader: Callable[[str], Reader[Value]]) -> Reader[dict[str, Value | None]]:
        """A reader of name -> value, where `reader(name)` reads the value."""

        def read(node: yaml.Node, at: str) -> dict[str, Value | None]:
            values: dict[str, Value | None] = {}
            for name, path, child in self.items(node, at):
                if not NAME.fullmatch(name):
                    hint = "1 to 64 letters, digits, '_', '-' or '.', and no '.' in front"
                    self.note(at, f"{show(name)} cannot be a name", hint, self.lines[path])
                else:
                    values[name] = self.value(reader(name), child, path)
            if not node.value:
                raise Wrong("must name at least one")
            return values

        return read

    def list_of(self, reader: Reader[Value]) -> Reader[tuple[Value | None, ...]]:
        """A reader of a list whose items `reader` reads; the values as a tuple."""

        def read(node: yaml.Node, at: str) -> tuple[Value | None, ...]:
            if not isinstance(node, yaml.SequenceNode):
                raise Wrong(f"must be a list, found {show(node)}", "write it in brackets: […]")
            values: list[Value | None] = []
            for number, child in enumerate(node.value, 1):
                path = f"{at}[{number}]"
                self.lines[path] = child.start_mark.line + 1
                values.append(self.value(reader, child, path))
            return tuple(values)

        return read


def filled(cls: type[Record], values: Mapping[str, object]) -> Record:
    """A record of these values. Their types are what their readers return: no type checker compares the two."""
    build: type = cls
    record: Record = build(**values)
    return record


def _has_no_default(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


# ---- YAML, with the parts of it that a recipe does without -------------------------------------


class _Unreadable(Exception):
    def __init__(self, line: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.problem: Problem = (line, message, hint)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without tags and aliases, and with a cap on depth and size."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        self.depth += 1
        self.nodes += 1
        refused = {
            "an anchor or an alias: write the value out": getattr(event, "anchor", None),
            "a YAML tag: remove it": getattr(event, "tag", None),
            f"nested more than {MAX_DEPTH} levels deep": self.depth > MAX_DEPTH,
            f"more than {MAX_NODES} values": self.nodes > MAX_NODES,
        }
        for message, is_there in refused.items():
            if is_there:
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
