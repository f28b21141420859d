"""What a user is answered in place of the engine's answer. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from peftopt.loadtest import protocols


@dataclass
class Problem(Exception):
    """An answer in place of the engine's: an HTTP `status`, what to say, and `code`, a word for programs."""

    status: int
    said: str
    code: str
    param: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "request"
    """What it is in the log: see lines.Line.kind."""

    def body(self) -> bytes:
        """The body of an answer."""
        return json.dumps(protocols.error(self.status, self.said, self.code, self.param)).encode()

    def event(self) -> bytes:
        """The same as the last message of a stream that has begun."""
        return b"data: " + self.body() + b"\n\n"
