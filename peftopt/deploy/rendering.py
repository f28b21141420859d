"""Text from a template; the templates come with the package. Pure but for reading them."""

from __future__ import annotations

import json
import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def rendered(name: str, **values: Any) -> str:
    """The template `NAME.j2` with these values."""
    return _templates().get_template(f"{name}.j2").render(values)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(  # nosec B701 # shell scripts and YAML, whose filters quote; no HTML
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = {"json": json.dumps, "shell": shlex.join, "quote": shlex.quote, "unit": unit_word, "comment": _comment}
    templates.filters |= filters
    return templates


def unit_word(word: str) -> str:
    """A word of ExecStart= that systemd takes as it is: % and $ stand for something there (systemd.service(5))."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    plain = escaped and not any(c.isspace() or c in "\"';\\" for c in word)
    return escaped if plain else f'"{escaped}"'


def _comment(text: str) -> str:
    """Words that end no comment."""
    return " ".join(text.split())
