"""What the docstrings of the code say of a record's fields, for schemas and for the documentation."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from functools import cache


@cache
def of_fields(record: type) -> Mapping[str, str]:
    """The docstring below each field of a dataclass, its bases' included, as one line. A field without one is left out.

    Python keeps no docstring of a field, so they are read from the source.
    """
    texts: dict[str, str] = {}
    for each in reversed(record.__mro__):
        if each.__module__ != "builtins":
            texts |= _own(each)
    return texts


def of_class(record: type) -> str:
    """The docstring of a class, as one line; "" where it has none of its own."""
    return _line(record.__dict__.get("__doc__") or "")


def _own(record: type) -> Mapping[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(record))
    except (OSError, TypeError):  # a class that was typed in, or made by a program, has no source
        return {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: _line(text.value.value)
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _line(text: str) -> str:
    return " ".join(text.split())
