"""Answers to users in place of the engine's answer. Pure.

They do not contain the engine's address or folders: those are in the log.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from peftopt.loadtest import protocols

PLACES = re.compile(
    rb"(?:[a-z][a-z0-9+.-]{1,9}://|\b(?:\d{1,3}\.){3}\d{1,3}:|\b(?:localhost|0\.0\.0\.0):)[^\s\"'\\<>,)]*"
    rb"|(?<![\w.~/])~?(?:/[\w.@+-]+){2,}/?"
)
"""An address or a path in what an engine says of its own fault."""


def without_places(body: bytes) -> bytes:
    """The body of an engine's error without addresses and paths."""
    return PLACES.sub(b"(hidden)", body)


@dataclass
class Problem(Exception):
    """An answer in place of the engine's: an HTTP `status`, a message, and `code`, a word for programs. `detail` is for
    the log alone."""

    status: int
    said: str
    code: str
    param: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "request"
    """What it is in the log: see lines.Line.kind."""
    detail: str = ""

    @property
    def logged(self) -> str:
        """The text for the log."""
        return f"{self.said}: {self.detail}" if self.detail else self.said

    def body(self) -> bytes:
        """The body of an answer."""
        return json.dumps(protocols.error(self.status, self.said, self.code, self.param)).encode()

    def event(self) -> bytes:
        """The same as the last message of a stream that has begun."""
        return b"data: " + self.body() + b"\n\n"
