"""Readers of single values: text, whole numbers, numbers with a unit, words. Pure."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Callable, Mapping

import yaml

from peftopt.recipe.reader import Reader, Schema, Value, Wrong, show

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_QUANTITY = re.compile(rf"({_NUMBER})\s*([a-z%]*)")


def scalar(node: yaml.Node, expected: str) -> str:
    """The text of a single value. Raises Wrong for nothing, a list or a mapping; `expected` says what it must be."""
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        raise Wrong(f"must be {expected}, found {show(node)}")
    return str(node.value)


def text_of(node: yaml.Node) -> str:
    """The value of printable text that is not blank. Raises Wrong for others, such as a bare number."""
    value = scalar(node, "text")
    if not node.tag.endswith(":str"):
        raise Wrong(f"must be text, found {show(node)}", "put it in quotes if it is meant as text")
    if not value.strip() or not value.isprintable():
        raise Wrong(f"must be text that can be printed, found {show(node)}")
    return value


def text_as(parse: Callable[[str], Value], schema: Schema) -> Reader[Value]:
    """A reader of text that `parse` turns into a value, or refuses with a ValueError. `schema` says what text it
    accepts."""
    return Reader(lambda node, _: parse(text_of(node)), lambda: {"type": "string", **schema})


TEXT = text_as(str, {"minLength": 1})


_PRICE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]{3})?\s*")


def price_of(text: str) -> tuple[float, str] | None:
    """The amount and the currency ("" for none) in "2.10" or "2.10 EUR"; None for anything else, and for 0."""
    match = _PRICE.fullmatch(text)
    if match is None or not 0 < float(match[1]) < math.inf:
        return None
    return float(match[1]), (match[2] or "").upper()


def _read_price(node: yaml.Node, at: str) -> str:
    written = scalar(node, "a price, such as 2.10 USD")
    if price_of(written) is None:
        raise Wrong(f"must be a number above 0 and a currency, found {show(node)}", "write it like 2.10 USD")
    return written


_AMOUNT: Schema = {"type": "number", "exclusiveMinimum": 0}
PRICE = Reader(_read_price, lambda: {"anyOf": [{"type": "string", "pattern": f"^{_PRICE.pattern}$"}, _AMOUNT]})
"""A price: an amount above 0 and its currency, by default USD."""


def whole(low: int, high: int = 1_000_000) -> Reader[int]:
    """A reader of whole numbers from `low` to `high`, in decimal digits."""
    expected = f"a whole number from {low:,} to {high:,}"

    def read(node: yaml.Node, at: str) -> int:
        value = scalar(node, expected)
        plain = node.tag.endswith(":int") and re.fullmatch(r"[+-]?[0-9]{1,18}", value)
        if not plain or not low <= int(value) <= high:
            raise Wrong(f"must be {expected}, found {show(node)}")
        return int(value)

    return Reader(read, lambda: {"type": "integer", "minimum": low, "maximum": high})


def quantity(units: Mapping[str, float], low: float, high: float, expected: str) -> Reader[float]:
    """A reader of a number and its unit: "15 %" with {"": 1, "%": 100}, units per base unit; "" is no unit."""

    def read(node: yaml.Node, at: str) -> float:
        match = _QUANTITY.fullmatch(scalar(node, expected).strip())
        amount = float(match[1]) / units.get(match[2], math.nan) if match else math.nan
        if not low <= amount <= high:
            raise Wrong(f"must be {expected}, found {show(node)}")
        return amount

    def schema() -> Schema:
        bare = units.get("", 1)
        number: Schema = {"type": "number", "minimum": low * bare, "maximum": high * bare}
        named = "|".join(filter(None, units))
        text: Schema = {"type": "string", "pattern": rf"^\s*{_NUMBER}\s*({named})\s*$"}
        return {"description": expected, **({"anyOf": [number, text]} if named else number)}

    return Reader(read, schema)


def words(known: Mapping[str, Value]) -> Reader[Value]:
    """A reader of one of these words. It returns the value of the word."""
    expected = f"one of {', '.join(known)}"

    def read(node: yaml.Node, at: str) -> Value:
        value = scalar(node, expected)
        if value not in known:
            raise Wrong(f"must be {expected}, found {show(node)}")
        return known[value]

    return Reader(read, lambda: {"enum": [*known, *([False] if "off" in known else [])]})


def or_off(reader: Reader[Value]) -> Reader[Value | None]:
    """The reader, which also reads `off`, as None."""
    return Reader(
        lambda node, at: None if node.value == "off" else reader(node, at),
        lambda: {"anyOf": [{"enum": ["off", False]}, reader.schema()]},  # to YAML 1.1 `off` is false
    )


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
        int: Reader(whole(-(10**9), 10**9).read, lambda: {"type": "integer"}),
        float: Reader(quantity({"": 1}, -1e300, 1e300, "a number").read, lambda: {"type": "number"}),
        bool: Reader(words({"true": True, "false": False}).read, lambda: {"type": "boolean"}),
        str: TEXT,
    }
    return simple[annotation]


def share(low: float, high: float) -> Reader[float | None]:
    """A reader of shares from `low` to `high` (1 is 100 %), written `15 %` or `0.15`; `off` is None."""
    expected = f"a share from {low * 100:g} % to {high * 100:g} %, such as 15 %, or off"
    return or_off(quantity({"": 1, "%": 100}, low, high, expected))
