"""What made a quantized folder: method, library, parameters, calibration. Written as quantization.json beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from peftopt import __version__, identity, machine
from peftopt.records import FORMAT, Json

FILE = "quantization.json"


def write(
    out: Path,
    method: str,
    libraries: Sequence[str],
    params: Mapping[str, Json],
    seed: int,
    calibration: Mapping[str, Json] | None = None,
    notices: Sequence[str] = (),
    **more: Json,
) -> None:
    """Leave quantization.json in a quantizer's folder.

    `libraries` are distribution names, the one that does the work first; `params` as they were resolved (the group
    size that "auto" became); `calibration` what `calibrated` gives; `notices` what a user should know, a sentence each;
    `more` what the method chose by itself.
    """
    record = {
        "format": FORMAT,
        "made_by": f"peftopt {__version__}",
        "method": method,
        "libraries": machine.versions(tuple(libraries)),
        "params": dict(params),
        "seed": seed,
        "calibration": calibration,
        "notices": list(notices),
        **more,
    }
    _save(out, record)


def calibrated(texts: Sequence[str], tokens: int) -> dict[str, Json]:
    """The texts that a quantizer used, by content, and how many of their tokens it saw."""
    return {"texts": identity.of_value(list(texts)), "rows": len(texts), "tokens": tokens}


def read(out: Path) -> dict[str, Json] | None:
    """What quantization.json says; None for a folder without one."""
    if not (out / FILE).is_file():
        return None
    return dict(json.loads((out / FILE).read_text(encoding="utf-8")))


def add(out: Path, **more: Json) -> dict[str, Json] | None:
    """Put in what only the caller knows: where the texts came from, that the folder was opened again. None without
    a file to put it in."""
    record = read(out)
    if record is not None:
        _save(out, record := record | more)
    return record


def summary(record: Mapping[str, Json]) -> str:
    """The provenance in a line."""
    library, version = next(iter(record["libraries"].items()), ("", ""))
    params = ", ".join(f"{name} {value}" for name, value in record["params"].items() if value not in ("", 0, 0.0))
    parts = [f"{library} {version}".strip(), params]
    if calibration := record["calibration"]:
        source = calibration.get("source", "task")
        parts.append(f"{calibration['tokens']} calibration tokens of {calibration['rows']} rows ({source})")
    if verified := record.get("verified"):
        parts.append(verified)
    return "; ".join(filter(None, [*parts, *record["notices"]]))


def _save(out: Path, record: Mapping[str, Json]) -> None:
    (out / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
