"""The columns of a run's tables: names, types, units and meanings, from the records that hold the measurements."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType

from peftopt import docstrings
from peftopt.measurements import Account, Answer, Disturbance, Sent
from peftopt.records import Interval, Verdict


@dataclass(frozen=True)
class Column:
    """A column of a table. `kind` is the type of its values, and `optional` says whether one may be missing."""

    name: str
    kind: type
    unit: str
    meaning: str
    optional: bool = False

    @property
    def dtype(self) -> str:
        """The column's dtype in pandas. One that may lack values has a dtype that knows missing ones."""
        whole, truth = ("Int64", "boolean") if self.optional else ("int64", "bool")
        return {float: "float64", int: whole, bool: truth, str: "string"}.get(self.kind, "object")


@dataclass(frozen=True)
class Table:
    """A table: what a row is, and its columns in order."""

    row: str
    columns: tuple[Column, ...]


_VARIANT = Column("variant", str, "", "The variant's name; the baseline's hidden second copy ends with ~aa.")
_WORKLOAD = Column("workload", str, "", 'The workload\'s name; "" where the measurement belongs to none.')
_BLOCK = "The block of the race, from 0"
_ORDER = "The variant's place in the block, from 0."

_SUFFIXES = {"_ms": "ms", "_bytes": "bytes", "_c": "°C", "_s": "s"}
_UNITS = {
    "s": ("seconds", "scheduled", "sent", "done", "first", "last"),
    "tokens": ("new_tokens", "prompt_tokens", "scored_tokens", "uncut_tokens", "agree"),
    "nats": ("nll", "kl", "kl_worst", "noise"),
    "share": ("steal", "throttled", "score", "level", "value_level", "engine_kv_cache_mean", "engine_kv_cache_peak"),
    "MHz": ("mhz",),
    "cores": ("cores", "foreign_cores"),
    "prompts": ("batch", "touched"),
    "requests": ("engine_running_mean", "engine_running_peak", "engine_waiting_mean", "engine_waiting_peak"),
}


@cache
def tables() -> Mapping[str, Table]:
    """The tables of a run by name."""
    return {
        "requests": Table(
            "a request",
            (
                _VARIANT,
                _WORKLOAD,
                Column("block", int, "", f"{_BLOCK}; empty for a load that was run apart.", optional=True),
                Column("order", int, "", f"{_ORDER} Empty for a load that was run apart.", optional=True),
                Column("source", str, "", '"race", or what sent a load that was run apart.'),
                *_of(Sent, missing=True),
            ),
        ),
        "blocks": Table(
            "a turn of a variant in a block",
            (
                _VARIANT,
                _WORKLOAD,
                Column("block", int, "", f"{_BLOCK}."),
                Column("order", int, "", _ORDER, optional=True),
                Column("launch", int, "", "Which life of the variant's process it was, from 1."),
                Column("requests", int, "requests", "Timed requests of the turn."),
                Column("latency_ms", float, "ms", "Their median time."),
                Column("ttft_ms", float, "ms", "Their median time to the first token.", optional=True),
                Column("tpot_ms", float, "ms", "Their median gap between tokens after the first.", optional=True),
                Column(
                    "throughput", float, "tokens/s", "Output tokens of them all, over their time one after another."
                ),
                Column("disturbed", str, "", 'Why the block counts as disturbed; "" where it does not.'),
                *_of(Disturbance),
                *_of(Account, "engine_"),
            ),
        ),
        "answers": Table(
            "an answer that was checked",
            (
                _VARIANT,
                Column("second_run", bool, "", "Whether it is of the baseline's second run, which shows its noise."),
                *_of(Answer),
            ),
        ),
        "figures": Table(
            "a metric of a variant",
            (
                _VARIANT,
                Column("outcome", str, "", "What was decided of the variant."),
                Column("metric", str, "", "Its name; metrics.md has their units."),
                *_of(Interval),
            ),
        ),
        "verdicts": Table(
            "a rule that judged a variant",
            (_VARIANT, *_of(Verdict)),
        ),
        "measurements": Table(
            "a measurement, as it was written",
            (
                Column("probe", str, "", "What was measured: `peftopt list probes`."),
                _VARIANT,
                _WORKLOAD,
                Column("launch", int, "", "2 for the baseline's second run of answers."),
                Column("values", dict, "", "The fields of the probe's record, as a mapping; in a file as JSON."),
            ),
        ),
    }


def _of(record: type, prefix: str = "", missing: bool = False) -> Iterator[Column]:
    """A column for each field of a record; those of a record inside it are `outer_inner`. Mappings have none.
    `missing`: rows may be of another record, and lack those fields that this one alone has."""
    hints = typing.get_type_hints(record)
    meanings = docstrings.of_fields(record)
    shared = {each.name for each in fields(record.__mro__[1])} if missing else set(hints)
    for each in fields(record):
        name = prefix + each.name
        kind, optional = _plain(hints[each.name])
        if is_dataclass(kind):
            yield from (_within(column, meanings[each.name], optional) for column in _of(kind, f"{name}_"))
        elif kind is not dict:
            yield Column(name, kind, _unit(name), meanings.get(each.name, ""), optional or each.name not in shared)


def _within(column: Column, outer: str, optional: bool) -> Column:
    return replace(column, meaning=f"{outer} {column.meaning}", optional=column.optional or optional)


def _plain(hint: object) -> tuple[type, bool]:
    """The type of a field without None, and whether it may be None: text for a word of some, list for any sequence."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, UnionType):
        (inner,) = (each for each in arguments if each is not NoneType)
        return _plain(inner)[0], True
    if origin is typing.Literal:
        return str, False
    if origin is tuple:
        return list, False
    if origin is not None:
        return dict, False
    assert isinstance(hint, type)
    return hint, False


def _unit(name: str) -> str:
    for unit, names in _UNITS.items():
        if name in names:
            return unit
    return next((unit for suffix, unit in _SUFFIXES.items() if name.endswith(suffix)), "")
