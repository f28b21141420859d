"""JSON Schemas of the files that peftopt reads and writes, made from its types: for editors and other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from peftopt import docstrings, measurements, plugins, records
from peftopt.diagnose import records as diagnosed
from peftopt.diagnose.records import Diagnosis
from peftopt.errors import BadInput
from peftopt.measurements import PROBES
from peftopt.recipe import grid, parse
from peftopt.records import FORMAT, Decision, Interval, Plugin
from peftopt.report.as_json import UNKNOWN

FILES: Mapping[str, str] = {
    "recipe": "what `peftopt run` takes (YAML)",
    "grid": "what `peftopt sweep` takes (YAML)",
    "decision": "decision.json of a run",
    "measurement": "a line of measurements.jsonl of a run",
    "diagnosis": "diagnosis.json of `peftopt diagnose`",
}
"""The files that have a schema, by its name."""

FOLDER = Path(__file__).parent / "schemas"
"""Where the schemas lie that come with peftopt."""


def file(name: str) -> Path:
    """The file of a schema that comes with peftopt."""
    return FOLDER / f"{name}.schema.json"


def text(name: str) -> str:
    """A schema as it is printed. That of a recipe knows the plug-ins of other packages too. Raises BadInput for a name
    that is not known."""
    if name not in FILES:
        raise BadInput(f"there is no schema of {name!r}", f"known: {', '.join(FILES)}")
    if name == "recipe":
        return written(parse.schema(plugins.catalogue()))
    return file(name).read_text(encoding="utf-8")


def mode_line(schema: str) -> str:
    """The comment of a recipe that tells editors with a YAML language server where its schema is: a path or a URL."""
    return f"# yaml-language-server: $schema={schema}\n"


def generated() -> Mapping[str, str]:
    """The schemas as they come with peftopt, by name: of recipes with peftopt's own plug-ins."""
    own = {name: plugin for name, plugin in plugins.catalogue().items() if _is_own(plugin)}
    schemas = {
        "recipe": parse.schema(own),
        "grid": grid.schema(),
        "decision": of_record(Decision, "decision.json"),
        "measurement": measurement(),
        "diagnosis": of_record(Diagnosis, "diagnosis.json"),
    }
    return {name: written(schema) for name, schema in schemas.items()}


def written(schema: Mapping[str, Any]) -> str:
    """A schema as text."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _is_own(plugin: Plugin) -> bool:
    return plugin.params.__module__.startswith("peftopt.")


def measurement() -> dict[str, Any]:
    """The schema of a line of measurements.jsonl: its probe says what its values are."""
    whole = of_record(records.Measurement, "a line of measurements.jsonl", *PROBES.values())
    line = whole["$defs"]["Measurement"]
    line["properties"]["probe"] = {"description": "What was measured.", "enum": [*PROBES]}
    line["allOf"] = [
        {
            "if": {"properties": {"probe": {"const": probe}}},
            "then": {"properties": {"values": {"$ref": f"#/$defs/{record.__name__}"}}},
        }
        for probe, record in PROBES.items()
    ]
    return whole


def of_record(record: type, title: str, *others: type) -> dict[str, Any]:
    """The schema of a file that holds a record, with those of `others` beside it. Keys that no record has are allowed:
    a newer peftopt may write them."""
    import msgspec

    (reference, *_), parts = msgspec.json.schema_components([record, *others], ref_template="#/$defs/{name}")
    classes = _records(records, measurements, diagnosed)
    for name, part in parts.items():
        part["description"] = docstrings.of_class(classes[name])
        for field, meaning in docstrings.of_fields(classes[name]).items():
            part["properties"][field]["description"] = meaning
    for field in UNKNOWN:
        if Interval.__name__ in parts:
            parts[Interval.__name__]["properties"][field]["type"] = ["number", "null"]
    version = {"description": "The version of the file's form.", "const": FORMAT}
    whole = parts[record.__name__]
    whole["properties"] = {"format": version, **{k: v for k, v in whole["properties"].items() if k != "format"}}
    whole["required"] = ["format", *whole.get("required", ())]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{title} of peftopt",
        **reference,
        "$defs": dict(sorted(parts.items())),
    }


def _records(*modules: ModuleType) -> dict[str, type]:
    return {name: each for module in modules for name, each in vars(module).items() if is_dataclass(each)}  # type: ignore[misc]
