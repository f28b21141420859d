"""A plan of traffic: the number of adapters, skew, requests, and service levels. Pure.

A plan is a line such as `adapters=40 zipf=1.1 rps=12 slo='ttft <= 500 ms' reload=1/day`, or comes from a gateway's log.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from peftopt.errors import BadInput
from peftopt.loadtest import summary
from peftopt.loadtest.summary import Slo
from peftopt.recipe.reader import nearest
from peftopt.records import Json

EXAMPLE = "adapters=40 zipf=1.1 rps=12 slo='ttft <= 500 ms' reload=1/day"

PROMPT_TOKENS, NEW_TOKENS = 128, 64
"""Lengths of a request where nothing says others."""

MOST_ADAPTERS = 10_000

PERIODS_S: Mapping[str, float] = {"s": 1.0, "min": 60.0, "hour": 3600.0, "day": 86_400.0, "week": 604_800.0}

BYTES: Mapping[str, float] = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What will be asked. The k-th most popular of the `adapters` gets a share of requests as 1 / k^zipf; 0 is evenly.

    `rps` requests come a second, at random (Poisson); each must meet all `slos`. Each adapter gets a new version
    `reloads_per_s` times a second. `lengths` are pairs of prompt tokens and new tokens that requests have, each as
    often as any other. `memory_bytes` is what engines may take on one device, 0 = what is free here; there are `gpus`
    devices alike. `names` of adapters where they are known, the most popular first.
    """

    adapters: int
    rps: float
    slos: tuple[Slo, ...]
    zipf: float = 0.0
    reloads_per_s: float = 0.0
    lengths: tuple[tuple[int, int], ...] = ((PROMPT_TOKENS, NEW_TOKENS),)
    memory_bytes: int = 0
    gpus: int = 1
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """The mean over requests."""
        return round(sum(prompt for prompt, _ in self.lengths) / len(self.lengths))

    @property
    def new_tokens(self) -> int:
        """The mean over requests."""
        return round(sum(new for _, new in self.lengths) / len(self.lengths))

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer."""
        return max(prompt + new for prompt, new in self.lengths)

    def name(self, adapter: int) -> str:
        """An adapter's name for readers, 0 = the most popular."""
        return self.names[adapter] if adapter < len(self.names) else f"adapter {adapter + 1}"

    def as_json(self) -> dict[str, Json]:
        """The plan as it was understood; lengths as their means."""
        return {
            "adapters": self.adapters,
            "zipf": self.zipf,
            "rps": self.rps,
            "slo": [slo.text for slo in self.slos],
            "reloads_per_day": self.reloads_per_s * PERIODS_S["day"],
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "memory_bytes": self.memory_bytes,
            "gpus": self.gpus,
            "names": list(self.names),
            "notes": list(self.notes),
        }


# ---- a plan's text -----------------------------------------------------------------------------


def given(text: str) -> dict[str, Json]:
    """The fields of a Traffic in a plan's text, and `prompt` and `new` tokens. Raises BadInput that names the invalid
    part."""
    fields: dict[str, Json] = {}
    for key, value in _pairs(text):
        if key not in _READERS:
            raise BadInput(f"--plan has no {key!r}", nearest(key, _READERS))
        field, read = _READERS[key]
        try:
            parsed = read(value)
        except ValueError as error:
            raise BadInput(f"--plan {key}={value}: {error}", f"write a plan such as {EXAMPLE}") from error
        if key == "slo":
            fields["slos"] = (*fields.get("slos", ()), parsed)
        elif field in fields:
            raise BadInput(f"--plan says {key} twice", "say it once")
        else:
            fields[field] = parsed
    return fields


def traffic(text: str, log: Mapping[str, Json] | None = None) -> Traffic:
    """The plan in a text, on top of the log's fields (`traffic_log`). Raises BadInput for an invalid or missing
    field."""
    said = given(text)
    fields = {**(log or {}), **said}
    prompt, new = fields.pop("prompt", None), fields.pop("new", None)
    pairs = fields.get("lengths", ((PROMPT_TOKENS, NEW_TOKENS),))
    fields["lengths"] = tuple((prompt or one, new or other) for one, other in pairs)
    if said.get("adapters", len(fields.get("names", ()))) != len(fields.get("names", ())):
        fields["names"] = ()
    for field, example in (("adapters", "adapters=40"), ("rps", "rps=12"), ("slos", "slo='ttft <= 500 ms'")):
        if field not in fields:
            what = {"slos": "a service level, by which options are judged", "rps": "a rate of requests"}
            raise BadInput(f"the plan lacks {what.get(field, 'a number of adapters')}", f"add {example} to --plan")
    return Traffic(**fields)


def _pairs(text: str) -> list[tuple[str, str]]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BadInput(f"--plan {text}: {error}", f"write a plan such as {EXAMPLE}") from error
    pairs = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[a-z]+", key):
            hint = "write a plan of key=value, and a value with blanks in quotes: slo='ttft <= 500 ms'"
            raise BadInput(f"--plan has {word!r}, which is not key=value", hint)
        pairs.append((key, value))
    return pairs


def _number(value: str, low: float, high: float, what: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise ValueError(f"must be {what}")
    return number


def _count(most: int, what: str) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= most:
            raise ValueError(f"must be {what}, from 1 to {most:,}")
        return int(value)

    return read


def _rps(value: str) -> float:
    return _number(value, 1e-6, 1e6, "requests a second, more than 0, such as 12")


def _zipf(value: str) -> float:
    return _number(value, 0, 10, "an exponent from 0 (all alike) to 10, such as 1.1")


def _reloads(value: str) -> float:
    """New versions of an adapter a second, from "1/day"; "never" is 0."""
    if value == "never":
        return 0.0
    match = re.fullmatch(r"([0-9.]+)\s*/\s*([a-z]+)", value)
    if not match or match[2] not in PERIODS_S:
        raise ValueError(f"must be new versions of an adapter per {', '.join(PERIODS_S)}, such as 1/day, or never")
    return _number(match[1], 0, 1e6, "a number and a time, such as 1/day") / PERIODS_S[match[2]]


def _memory(value: str) -> int:
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]+)", value)
    if not match or match[2] not in BYTES:
        raise ValueError(f"must be a size in {', '.join(BYTES)}, such as 24GB")
    return round(_number(match[1], 1e-3, 1e6, "a size, such as 24GB") * BYTES[match[2]])


def _slo(value: str) -> Slo:
    return summary.slo(value)


_READERS: Mapping[str, tuple[str, Callable[[str], Json]]] = {
    "adapters": ("adapters", _count(MOST_ADAPTERS, "a number of adapters")),
    "zipf": ("zipf", _zipf),
    "rps": ("rps", _rps),
    "slo": ("slos", _slo),
    "reload": ("reloads_per_s", _reloads),
    "prompt": ("prompt", _count(1_000_000, "tokens of a prompt")),
    "new": ("new", _count(1_000_000, "tokens of an answer")),
    "memory": ("memory_bytes", _memory),
    "gpus": ("gpus", _count(1_000, "a number of devices")),
}
"""Key of a plan -> field of a Traffic, and what reads its value. A reader raises ValueError."""


# ---- skew --------------------------------------------------------------------------------------


def shares(adapters: int, zipf: float) -> list[float]:
    """The share of requests of each adapter, the most popular first."""
    weights = [place**-zipf for place in range(1, adapters + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def fitted_zipf(counts: Sequence[int]) -> float:
    """The most likely exponent for these counts of requests, with each adapter's rank by its count; 0 to 10. Few
    requests make it too high, since chance orders them too."""
    ordered = sorted((count for count in counts), reverse=True)
    total = sum(ordered)
    if len(ordered) < 2 or not total:
        return 0.0
    logs = [math.log(place) for place in range(1, len(ordered) + 1)]
    mean_log = sum(count * log for count, log in zip(ordered, logs, strict=True)) / total
    low, high = 0.0, 10.0
    for _ in range(60):  # the expected logarithm of the place falls as the exponent grows, so halving meets it
        middle = (low + high) / 2
        expected = sum(share * log for share, log in zip(shares(len(ordered), middle), logs, strict=True))
        low, high = (middle, high) if expected > mean_log else (low, middle)
    return (low + high) / 2
