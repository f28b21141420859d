"""Decision <-> decision.json. Unknown numbers are null: JSON has neither NaN nor infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

from peftopt.errors import BadInput
from peftopt.measurements import structured
from peftopt.records import FORMAT, Decision, Interval, JsonValue

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

UNKNOWN = {"estimate": math.nan, "low": -math.inf, "high": math.inf, "level": math.nan}
"""The value of null in an interval, by field."""

_INTERVAL = {field.name for field in fields(Interval)}


def render(decision: Decision) -> str:
    """The decision alone: the measurements have their own file."""
    return json.dumps({"format": decision.format, **_fields(decision)}, indent=2, allow_nan=False) + "\n"


def decision_from_json(text: str) -> Decision:
    """The decision in a text of `render`. A bound of null is infinite, an estimate of null NaN. Raises BadInput for
    damaged text, or another version."""
    try:
        written: JsonValue = json.loads(text)
    except ValueError as error:
        raise BadInput(f"the decision is not JSON: {error}", "decide again: `peftopt decide`") from None
    if not isinstance(written, dict) or written.get("format") != FORMAT:
        version = written.get("format") if isinstance(written, dict) else None
        raise BadInput(
            f"the decision has format {version}, this peftopt reads format {FORMAT}",
            "decide again from its measurements: `peftopt decide`",
        )
    variants = without_nulls(written.get("variants"))
    try:
        return structured(Decision, {**written, "variants": variants}, "decision")
    except BadInput as error:
        raise BadInput(f"the decision is not whole: {error.message}", "decide again: `peftopt decide`") from None


def without_nulls(value: JsonValue) -> JsonValue:
    """The value with the nulls of every interval replaced by their values."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == _INTERVAL:
        return {name: UNKNOWN.get(name) if each is None else each for name, each in value.items()}
    return {name: without_nulls(each) for name, each in value.items()}


def plain(value: object) -> JsonValue:
    """Records in the order of their fields, mappings in that of their keys, no number that JSON lacks."""
    if is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _fields(record: DataclassInstance) -> dict[str, JsonValue]:
    return {field.name: plain(getattr(record, field.name)) for field in fields(record)}
