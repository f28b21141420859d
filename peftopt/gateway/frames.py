"""Reads a streamed answer's messages while its bytes are forwarded. Pure.

A stream is server-sent events (html.spec.whatwg.org/multipage/server-sent-events.html): a blank line ends each message.
JSON has no line breaks, so blank lines can be counted without parsing the text between them. Only the messages up to
the first token and the last few are parsed.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from peftopt.records import Json

ENDS = (b"\n\n", b"\r\n\r\n")
"""What ends a message; which of the two a server uses is seen at its first."""

TAIL_BYTES = 16_384
"""So much of a stream's end is kept: the last choice and the counts are in it."""

HEAD_BYTES = 65_536
"""So much of a stream's start is kept in search of its first token."""

DONE = b"[DONE]"

MOST_COUNT = 2**53
"""No count of tokens and no time in ms is as high: what says so is garbage."""


@dataclass
class Ended:
    """The content of an answer's end: `finish` reason, the server's counts of tokens, an `error` in it, and the
    engine's own `metrics` of the request, if it sends them (vLLM's --enable-per-request-metrics, llama.cpp's
    timings)."""

    finish: str = ""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    error: str = ""
    metrics: dict[str, Json] = field(default_factory=dict)

    def read(self, message: Json) -> None:
        """Read a message, or a whole answer. Anything not of OpenAI's form is ignored."""
        if not isinstance(message, dict):
            return
        if error := message.get("error"):
            self.error = str(error.get("message", error) if isinstance(error, dict) else error)[:200]
        for choice in _choices(message):
            if choice.get("finish_reason"):
                self.finish = str(choice["finish_reason"])
        usage = message.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
            self.new_tokens = _count(usage.get("completion_tokens"), self.new_tokens)
        if isinstance(message.get("metrics"), dict):
            self.metrics = _numbers(message["metrics"])
        timings = message.get("timings")
        if isinstance(timings, dict) and {"prompt_ms", "predicted_ms"} <= timings.keys():
            told = {"time_to_first_token_ms": "prompt_ms", "generation_time_ms": "predicted_ms"}
            self.metrics = _numbers({name: timings[theirs] for name, theirs in told.items()})


def _count(value: Json, before: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_COUNT else before


def _numbers(told: dict[str, Json]) -> dict[str, Json]:
    """What can be times: no nan, no infinity, nothing below zero."""
    return {name: value for name, value in told.items() if isinstance(value, int | float) and 0 <= value < MOST_COUNT}


def _choices(message: Json) -> list[dict[str, Json]]:
    """A message's choices, whatever it is."""
    choices = message.get("choices") if isinstance(message, dict) else None
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


class Frames:
    """A stream so far. `messages` that are whole; `first_token` whether a message with text has come."""

    def __init__(self) -> None:
        self.messages = 0
        self.first_token = False
        self._edge = b""
        self._head = b""
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0

    def add(self, piece: bytes) -> None:
        """The next bytes of the stream."""
        joined = self._edge + piece
        self.messages += sum(joined.count(end) - self._edge.count(end) for end in ENDS)
        self._edge = joined[-3:]
        self._tail.append(piece)
        self._tail_bytes += len(piece)
        while self._tail_bytes - len(self._tail[0]) > TAIL_BYTES:
            self._tail_bytes -= len(self._tail.popleft())
        if not self.first_token:
            self._head = (self._head + piece)[:HEAD_BYTES]
            self.first_token = len(self._head) >= HEAD_BYTES or any(map(_has_text, parsed(self._head)))

    def ended(self) -> Ended:
        """The content of the last messages, whether the stream is whole or not."""
        found = Ended()
        for message in parsed(b"".join(self._tail) + ENDS[0]):
            found.read(message)
        return found

    @property
    def done(self) -> bool:
        """Whether the stream's end message has come."""
        return DONE in b"".join(self._tail)[-64:]


def parsed(text: bytes) -> Iterator[Json]:
    """The parsed messages of a piece of a stream, without one whose start or end is missing."""
    *messages, _ = text.replace(b"\r\n", b"\n").split(b"\n\n")
    for message in messages:
        lines = [line[5:].strip() for line in message.split(b"\n") if line.startswith(b"data:")]
        data = b"\n".join(lines)
        if data and data != DONE:
            try:
                yield json.loads(data)
            except (ValueError, RecursionError):
                continue


def _has_text(message: Json) -> bool:
    """Whether a message brings text, a tool call or a token: a first message of a chat may bring a role alone."""
    for choice in _choices(message):
        delta = choice.get("delta")
        if choice.get("text") or choice.get("finish_reason"):
            return True
        if isinstance(delta, dict) and any(delta.get(key) for key in set(delta) - {"role"}):
            return True
    return isinstance(message, dict) and "error" in message
