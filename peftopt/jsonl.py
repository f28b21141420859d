r"""JSON lines, as other programs write them: a byte order mark, and line separators of Unicode inside of strings.

Only \n ends a line: U+2028, U+0085 and the like may stand in a JSON string as they are (RFC 8259).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypeVar

TextOrBytes = TypeVar("TextOrBytes", str, bytes)

BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
"""What reading another program's JSON may raise: it is none, is too deep, or not of the shape that is meant."""


def text_of(raw: bytes) -> str:
    """A file's text: UTF-8, or what its byte order mark says. Raises UnicodeDecodeError for other bytes."""
    return raw.decode(json.detect_encoding(raw))


def lines(text: TextOrBytes) -> Iterator[tuple[int, TextOrBytes]]:
    """(number, line) of each line that is not blank, counted from 1."""
    end = "\n" if isinstance(text, str) else b"\n"
    return ((number, line) for number, line in enumerate(text.split(end), 1) if line.strip())
