"""A baseline as the text of a file: small, sorted, quiet in a diff."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields

from peftopt.errors import BadInput
from peftopt.gate.records import FORMAT, Baseline, Race
from peftopt.measurements import structured
from peftopt.records import JsonValue
from peftopt.report.as_json import plain, without_nulls

DIGITS = 6
"""Significant digits of a number in the file: more would be noise in a diff."""

AGAIN = "write it again from a run that you accept: peftopt gate RECIPE --update"

_NUMBERS = re.compile(r"\[\n\s*(-?[\d.e+-]+(?:,\n\s*-?[\d.e+-]+)*)\n\s*\]")
"""A list of numbers, one a line. No text of JSON holds a line end, so none is taken for one."""


def render(baseline: Baseline) -> str:
    """The file's text: keys in order, a line for each value, the numbers of a launch on one line."""
    values = plain(baseline)
    assert isinstance(values, dict)
    text = json.dumps(_short({"format": FORMAT, **values}), indent=1, sort_keys=True, allow_nan=False)
    return _NUMBERS.sub(_on_one_line, text) + "\n"


def read(text: str, name: str) -> Baseline:
    """What `render` wrote; `name` is the file's, for errors. Raises BadInput for text that is not whole, of another
    version, or whose numbers cannot be."""
    try:
        written: JsonValue = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{name} is not JSON: {error}", AGAIN) from None
    if not isinstance(written, dict) or written.get("format") != FORMAT:
        version = written.get("format") if isinstance(written, dict) else None
        raise BadInput(f"{name} has format {version}, this peftopt reads format {FORMAT}", AGAIN)
    try:
        baseline = structured(Baseline, without_nulls(written), "baseline")
    except BadInput as error:
        raise BadInput(f"{name} is not whole: {error.message}", AGAIN) from None
    _check(baseline, name)
    return baseline


def line_of(text: str, key: str) -> int:
    """The line, from 1, that has this key; 1 where none has."""
    start = f"{json.dumps(key)}:"
    lines = (number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith(start))
    return next(lines, 1)


def _on_one_line(numbers: re.Match[str]) -> str:
    return f"[{', '.join(numbers[1].split())}]".replace(",,", ",")


def _check(baseline: Baseline, name: str) -> None:
    """Raises BadInput for what no run leaves, such as a tolerance below 0 or a score above 1."""
    tolerances = {each.name: getattr(baseline.tolerances, each.name) for each in fields(baseline.tolerances)}
    for what, tolerance in tolerances.items():
        if not 0 <= tolerance < 1:
            raise BadInput(f"{name}: tolerances.{what} is {tolerance:g}", "give a share from 0 to below 1")
    for metric, scores in baseline.accepted.scores.items():
        if len(scores.below) > scores.asked or any(not 0 <= score < 1 for score in scores.below.values()):
            raise BadInput(f"{name}: scores.{metric} cannot be so", AGAIN)
    for key, race in baseline.accepted.races.items():
        if not _is_race(race):
            raise BadInput(f"{name}: races.{key} has a launch without blocks, or a block without a time", AGAIN)


def _is_race(race: Race) -> bool:
    return all(launch and all(map(math.isfinite, launch)) for launch in race.launches)


def _short(value: JsonValue) -> JsonValue:
    """The value with its numbers rounded."""
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
