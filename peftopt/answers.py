"""One answer against what it should be: right, valid, or broken in a way no user may see (Tier 1). Pure."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftopt.records import Json

LOOP_TOKENS = 64
"""A tail at least this long that repeats with some period, and no end of sequence, is a loop."""


@dataclass(frozen=True)
class Judged:
    """`score` in 0..1 (share of right fields for JSON), `correct` = all of it, `valid` = keeps the schema,
    `flags` = the Tier 1 errors seen: "empty", "invalid utf-8", "special token", "loop", "invalid output"."""

    score: float
    correct: bool
    valid: bool
    flags: tuple[str, ...]


def judge(
    text: str,
    expected: str,
    schema: Mapping[str, Json] | None = None,
    tokens: Sequence[int] = (),
    stopped: bool = True,
    special: frozenset[int] = frozenset(),
) -> Judged:
    """Judge one answer. `tokens` are its ids without the end-of-sequence token that closed it."""
    value = _parse(text)
    valid = schema is None or (value is not _NOT_JSON and _keeps(value, schema))
    seen = {
        "empty": not text.strip(),
        "invalid utf-8": "\ufffd" in text and "\ufffd" not in expected,
        "special token": any(token in special for token in tokens),
        "loop": not stopped and loops(tokens, text),
        "invalid output": not valid,
    }
    score = _score(text, value, expected)
    return Judged(score, score == 1.0 and valid, valid, tuple(flag for flag, is_so in seen.items() if is_so))


def loops(tokens: Sequence[int], text: str) -> bool:
    """Whether the tail repeats: the last 64 tokens are periodic, or few distinct 3-grams in very squeezable text."""
    tail = list(tokens[-LOOP_TOKENS:])
    if len(tail) == LOOP_TOKENS and any(tail[p:] == tail[:-p] for p in range(1, LOOP_TOKENS // 2 + 1)):
        return True
    grams = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
    raw = text.encode()
    return bool(grams) and len(set(grams)) / len(grams) < 0.2 and len(raw) / len(zlib.compress(raw)) > 4


_NOT_JSON = object()


def _parse(text: str) -> Json:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _keeps(value: Json, schema: Mapping[str, Json]) -> bool:
    import jsonschema

    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def _score(text: str, value: Json, expected: str) -> float:
    """Exact text, or for JSON objects the share of the expected fields that are right."""
    wanted = _parse(expected)
    if not isinstance(wanted, dict) or not isinstance(value, dict) or not wanted:
        same = value == wanted if value is not _NOT_JSON else text.strip() == expected.strip()
        return float(same)
    right = sum(key in value and value[key] == wanted[key] for key in wanted)
    return float(right / max(len(wanted), len(value)))
