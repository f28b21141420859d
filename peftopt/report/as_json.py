"""Decision <-> decision.json. Unknown numbers are null: JSON has neither NaN nor infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from peftopt.errors import BadInput
from peftopt.records import FORMAT, Decision, Interval, Json, VariantDecision, Verdict


def render(decision: Decision) -> str:
    """The decision alone: the measurements have their own file."""
    return json.dumps({"format": decision.format, **plain(decision)}, indent=2, allow_nan=False) + "\n"


def decision_from_json(text: str) -> Decision:
    """Read what `render` wrote. A bound that is null is infinite, an estimate that is null NaN. Raises BadInput for
    text that is not whole, or of another version."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BadInput(f"the decision is not JSON: {error}", "decide again: `peftopt decide`") from None
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise BadInput(
            f"the decision has format {version}, this peftopt reads format {FORMAT}",
            "decide again from its measurements: `peftopt decide`",
        )
    try:
        variants = tuple(_variant(value) for value in found["variants"])
        return Decision(**{**found, "variants": variants, "warnings": tuple(found["warnings"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"the decision is not whole: {error}", "decide again: `peftopt decide`") from None


def _variant(found: dict[str, Any]) -> VariantDecision:
    return VariantDecision(
        **{
            **found,
            "techniques": tuple(found["techniques"]),
            "verdicts": tuple(Verdict(**{**v, "value": _interval(v["value"])}) for v in found["verdicts"]),
            "figures": {name: interval for name, v in found["figures"].items() if (interval := _interval(v))},
            # an older peftopt did not write all of these
            **{name: tuple(found.get(name, ())) for name in ("notes", "certificates", "remarks")},
        }
    )


def _interval(found: dict[str, Any] | None) -> Interval | None:
    if found is None:
        return None
    unknown = {"estimate": math.nan, "low": -math.inf, "high": math.inf, "level": math.nan}
    return Interval(**{**found, **{key: value for key, value in unknown.items() if found[key] is None}})


def plain(value: Json) -> Json:
    """Records in the order of their fields, mappings in that of their keys, no number that JSON lacks."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
