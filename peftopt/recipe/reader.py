"""YAML text -> values, and all mistakes at once, each with its line, its key path and the nearest known word. Pure.

A *reader* takes a YAML node and its key path. It returns a value, or raises a ValueError that says what the value must
be. `Reader[int]` returns whole numbers. A wrong value reads as None and its mistake is noted, so that reading continues
with the next value. Each reader also has a JSON Schema of its values, for editors. A schema may accept more than its
reader: only the reader checks values against each other.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeGuard, TypeVar

import yaml

from peftopt import docstrings
from peftopt.errors import PeftoptError
from peftopt.recipe.document import MAX_NODES, Problem, Unreadable, compose
from peftopt.records import NAME, JsonValue

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Value = TypeVar("Value")
Kept = TypeVar("Kept", covariant=True)
Record = TypeVar("Record", bound="DataclassInstance")

Schema = dict[str, JsonValue]
"""A JSON Schema (draft 7, which editors know)."""


@dataclass(frozen=True)
class Reader(Generic[Kept]):
    """Reads one kind of value. `schema` returns the JSON Schema of the values that it accepts."""

    read: Callable[[yaml.Node, str], Kept]
    schema: Callable[[], Schema]

    def __call__(self, node: yaml.Node, at: str) -> Kept:
        """The value of the node at this key path. Raises Wrong or another ValueError."""
        return self.read(node, at)


# ---- readers of one value ----------------------------------------------------------------------


class Wrong(ValueError):
    """A wrong value: the message says what it must be. Without a message, the mistakes are noted already."""

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def show(written: yaml.Node | str) -> str:
    """The user's text, short enough for a message and safe to print."""
    if isinstance(written, yaml.SequenceNode):
        return "a list"
    if isinstance(written, yaml.MappingNode):
        return "a mapping"
    if isinstance(written, yaml.Node):
        return "nothing" if written.tag.endswith(":null") else show(str(written.value))
    return repr(written if len(written) <= 48 else written[:47] + "…")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: the most similar known word, else all known words."""
    guess = difflib.get_close_matches(word[:64], sorted(known), n=1)
    return f"did you mean {guess[0]!r}?" if guess else f"known: {', '.join(sorted(known))}"


# ---- walking a document ------------------------------------------------------------------------


class Reading:
    """One pass over one YAML text. `problems` are its mistakes; `lines` has the line of each key path. The text may
    have `most` values."""

    most = MAX_NODES

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []

    def note(self, at: str, message: str, hint: str = "", line: int | None = None) -> None:
        """Note a mistake at the line of the key path `at`, or at `line`."""
        where = self.lines.get(at, 0) if line is None else line
        self.problems.append((where, f"{at}: {message}" if at else message, hint))

    def document(self, text: str, reader: Reader[Value]) -> Value | None:
        """The value that `reader` reads from the YAML document in `text`; None, with a noted mistake, if it cannot."""
        try:
            root = compose(text, self.most)
        except Unreadable as error:
            self.problems.append(error.problem)
            return None
        self.lines[""] = root.start_mark.line + 1
        return self.value(reader, root, "")

    def value(self, reader: Reader[Value], node: yaml.Node, at: str) -> Value | None:
        """The value that `reader` reads from a node; None, with a noted mistake, if it raises."""
        try:
            return reader(node, at)
        except (ValueError, PeftoptError) as error:
            if str(error):
                self.note(at, str(error), getattr(error, "hint", ""))
            return None

    def items(self, node: yaml.Node, at: str) -> Iterator[tuple[str, str, yaml.Node]]:
        """The keys of a mapping, with key paths and values. Duplicates and keys that are not text are noted."""
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
        self,
        readers: Mapping[str, Reader[Value]],
        required: Sequence[str] = (),
        meaning: type[DataclassInstance] | None = None,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> Reader[dict[str, Value | None]]:
        """A reader of a mapping with these keys. Its value has only the keys that are written. `meaning`: the record
        whose fields' docstrings explain the keys; `names`: key -> field, where their names differ."""

        def read(node: yaml.Node, at: str) -> dict[str, Value | None]:
            values: dict[str, Value | None] = {}
            written: set[str] = set()  # with the keys that misspelled ones probably stand for
            for key, path, child in self.items(node, at):
                written.add(key)
                if key in readers:
                    values[key] = self.value(readers[key], child, path)
                else:
                    written.update(difflib.get_close_matches(key[:64], readers, n=1))
                    self.note(at, f"unknown key {show(key)}", nearest(key, readers), self.lines[path])
            for key in required:
                if key not in written:
                    self.note(at, f"{key!r} is missing", f"add {key}: …")
            return values

        def schema() -> Schema:
            properties = {key: reader.schema() for key, reader in readers.items()}
            if meaning is None:
                return _object(properties, required)
            described = {key: _described(part, meaning, names.get(key, key)) for key, part in properties.items()}
            return {"description": docstrings.of_class(meaning), **_object(described, required)}

        return Reader(read, schema)

    def record(
        self,
        cls: type[Record],
        readers: Mapping[str, Reader[object]],
        names: Mapping[str, str] = MappingProxyType({}),
        **given: object,
    ) -> Reader[Record]:
        """A reader of a mapping into a dataclass, whose fields without a default are required keys. `names`: key ->
        field, where their names differ."""
        needed = {field.name for field in dataclasses.fields(cls) if _has_no_default(field)}
        keys = self.keys(readers, [key for key in readers if names.get(key, key) in needed], cls, names)

        def read(node: yaml.Node, at: str) -> Record:
            before = len(self.problems)
            values = {names.get(key, key): value for key, value in keys(node, at).items()}
            if len(self.problems) > before:
                raise Wrong
            return filled(cls, {**values, **given})

        return Reader(read, keys.schema)

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

        def schema() -> Schema:
            names: Schema = {"pattern": f"^{NAME.pattern}$"}
            values = reader("NAME").schema()
            return {"type": "object", "propertyNames": names, "additionalProperties": values, "minProperties": 1}

        return Reader(read, schema)

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

        return Reader(read, lambda: {"type": "array", "items": reader.schema()})


def filled(cls: type[Record], values: Mapping[str, object]) -> Record:
    """A record of these values. Their readers return the right types: no type checker verifies it."""
    build: type = cls
    record: Record = build(**values)
    return record


def _has_no_default(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _object(properties: Mapping[str, Schema], required: Sequence[str]) -> Schema:
    """The schema of a mapping with these keys and no others."""
    needed: Schema = {"required": [*required]} if required else {}
    return {"type": "object", "properties": {**properties}, **needed, "additionalProperties": False}


def one_of(properties: Mapping[str, Schema]) -> Schema:
    """The schema of a mapping with one of these keys."""
    return {**_object(properties, ()), "minProperties": 1, "maxProperties": 1}


def _described(schema: Schema, record: type[DataclassInstance], name: str) -> Schema:
    """The schema of a field's value, with its docstring and its default, if it has them."""
    (field,) = (field for field in dataclasses.fields(record) if field.name == name)
    text = docstrings.of_fields(record).get(name)
    described: Schema = {**schema, "description": text} if text else {**schema}
    if _may_be_written(field.default, schema):
        described["default"] = field.default
    return described


def _may_be_written(default: object, schema: Schema) -> TypeGuard[bool | int | float | str]:
    """Whether a user could write this default: others only mark a key that was left out."""
    low = schema.get("minimum", -math.inf)
    if isinstance(default, int | float) and isinstance(low, int | float):
        return default >= low
    return isinstance(default, str) and bool(default)
