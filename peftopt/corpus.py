"""Prompts and calibration texts: read once, checked line by line, named by their content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peftopt import identity
from peftopt.errors import BadInput
from peftopt.records import GENERIC, Json


@dataclass(frozen=True)
class Row:
    """One prompt. `expected` is the exact right answer, "" when none is known; `critical` rows may never get worse."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    expected: str = ""
    critical: bool = False
    slices: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Json]:
        return asdict(self)


def row_from(values: Mapping[str, Json]) -> Row:
    """A Row from its JSON form. Raises KeyError, TypeError or ValueError for one that is not a row."""
    messages = values.get("messages") or [{"role": "user", "content": values["prompt"]}]
    if not all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages):
        raise TypeError("role and content of a message must be text")
    expected = values.get("expected", "")
    return Row(
        id=str(values["id"]),
        messages=tuple({"role": m["role"], "content": m["content"]} for m in messages),
        expected=expected if isinstance(expected, str) else json.dumps(expected, separators=(",", ":")),
        critical=bool(values.get("critical", False)),
        slices=tuple(str(s) for s in values.get("slices", ())),
    )


def read(path: str, only_slice: str = "") -> list[Row]:
    """The rows of a JSON-lines file, in order. Raises BadInput naming the line that is broken or repeated."""
    rows: list[Row] = []
    seen: dict[str, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read prompts {path}: {error}", "give a UTF-8 JSON-lines file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = row_from(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            shape = '{"id": "…", "messages": [{"role": "user", "content": "…"}], "expected": "…"}'
            raise BadInput(f"{path}:{number} is not a prompt: {error!r}", f"each line looks like {shape}") from error
        if row.id in seen:
            raise BadInput(f"{path}:{number} repeats the id {row.id!r} of line {seen[row.id]}", "make ids unique")
        seen[row.id] = number
        rows.append(row)
    rows = [row for row in rows if not only_slice or only_slice in row.slices]
    if not rows:
        which = f" in slice {only_slice!r}" if only_slice else ""
        raise BadInput(f"{path} holds no prompts{which}", "add at least one JSON line")
    return rows


def calibration_file(named: str) -> Path:
    """The file of calibration rows that a user names: their own, or for "generic" the one that comes with peftopt."""
    return Path(__file__).parent / "generic.jsonl" if named == GENERIC else Path(named)


def check_apart(evaluation: Sequence[Row], calibration: Sequence[Row], path: str) -> None:
    """Refuse a calibration row that is also evaluated: a quantizer must not see the questions of its exam."""
    exam = {identity.of_value(row.messages): row.id for row in evaluation}
    for row in calibration:
        if twin := exam.get(identity.of_value(row.messages)):
            raise BadInput(
                f"calibration row {row.id!r} of {path} is also evaluation row {twin!r}",
                "take it out of one of the two files",
            )
