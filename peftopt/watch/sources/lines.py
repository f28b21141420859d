"""What is read of a line of the log of `peftopt serve`. Needs msgspec, so it is imported only where a log is read.

Only the fields that a span is made of are decoded, each into its type; see gateway.lines.Line for what they mean. What
an older peftopt did not write has a default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from peftopt.errors import BROKEN
from peftopt.loadtest.arrivals import SERVE_CHECK, SERVE_LOG

Moment = Annotated[float, msgspec.Meta(gt=0, le=1e14)]
"""Milliseconds since 1970, up to a year that a calendar has."""

Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e14)]
Count = Annotated[int, msgspec.Meta(ge=0)]

TORN = "not a whole line of JSON"
FOREIGN = "a line of another program"
OTHER_FORMAT = "a line of another format"
WRONG_VALUE = "a value that cannot be"
"""Why a line is left out."""


class Request(msgspec.Struct, tag_field="kind", tag=SERVE_LOG, gc=False):
    """A request. Times in milliseconds, but for `model_loading_time` and `adapter_switch_time`, which are seconds."""

    format: Literal[1]
    timestamp: Moment
    adapter: str
    error_kind: str
    request_duration_ms: Milliseconds
    generation_latency_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    prompt_tokens: Count | None = None
    new_tokens: Count = 0
    model_loading_time: float | None = None
    adapter_switch_time: float | None = None
    gpu_memory_allocated: int | None = None
    gpu_memory_reserved: int | None = None
    gpu_utilization: float | None = None
    kv_usage: float | None = None
    sample_age_ms: float | None = None
    running_at_start: Count = 0
    waiting_at_start: Count = 0
    batch_fill: float | None = None
    sources: msgspec.Raw = msgspec.Raw(b"{}")


class Check(msgspec.Struct, tag_field="kind", tag=SERVE_CHECK, gc=False):
    """A check of a version by its canary prompts. It takes no time of its own. `arm` is "" where the version answers
    nobody yet: a `put` that is refused harms no user."""

    timestamp: Moment
    adapter: str
    version: str
    verdict: Literal["own", "stale", "wrong", "unclear"]
    distance: float | None = None
    arm: str = "live"
    request_duration_ms: float = 0.0


Row = Request | Check

UNREADABLE = (msgspec.DecodeError, *BROKEN)
"""What `decode` raises."""

decode = msgspec.json.Decoder(Row).decode
"""A line's record."""


def sources(row: Request) -> Mapping[str, str]:
    """Who told each number of a request, by the field's name; {} where that is not told."""
    try:
        return msgspec.json.decode(row.sources, type=dict[str, str])
    except UNREADABLE:
        return {}


def why(line: bytes) -> str:
    """Why a line cannot be decoded."""
    try:
        values = json.loads(line)
    except BROKEN:
        return TORN
    if not isinstance(values, dict) or values.get("kind") not in (SERVE_LOG, SERVE_CHECK):
        return FOREIGN
    if values["kind"] == SERVE_LOG and values.get("format") != 1:
        return OTHER_FORMAT
    return WRONG_VALUE
