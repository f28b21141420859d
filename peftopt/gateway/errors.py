"""Errors over HTTP, as OpenAI's API gives them: {"error": {"message", "type", "param", "code"}}. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


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
        return json.dumps({"error": self.value()}).encode()

    def event(self) -> bytes:
        """The same as the last message of a stream that has begun."""
        return b"data: " + self.body() + b"\n\n"

    def value(self) -> dict[str, str | None]:
        """OpenAI's four fields."""
        kind = TYPES.get(self.status, "server_error")
        return {"message": self.said, "type": kind, "param": self.param or None, "code": self.code}
