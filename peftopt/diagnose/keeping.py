"""The files of a diagnosis: its setting, and its result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from peftopt import store
from peftopt.diagnose.measuring.measured import TURNS
from peftopt.diagnose.records import Diagnosis
from peftopt.diagnose.setting import Setting
from peftopt.errors import BadInput, unwritable
from peftopt.measurements import as_json, structured
from peftopt.records import FORMAT, Json
from peftopt.report.as_json import plain, without_nulls

SETTING, DIAGNOSIS = "setting.json", "diagnosis.json"


def begin(setting: Setting, folder: Path) -> None:
    """Make the folder, and write the setting. Raises MissingEnvironment for a folder that cannot be written, BadInput
    for one with measurements of another setting."""
    if (folder / TURNS).exists() and _measured(read_setting(folder)) != _measured(setting):
        what = f"{folder} has measurements of another base, engine, adapter or load"
        raise BadInput(what, "choose another --out, or repeat the command that began it")
    hint = "choose another --out"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error, hint) from error
    store.write(folder / SETTING, json.dumps(as_json(setting), indent=1), hint)


def _measured(setting: Setting) -> Setting:
    """What measurements depend on, wherever the command was typed."""
    folders = {name: str(Path(folder).resolve()) for name, folder in setting.adapters.items()}
    return replace(setting, base=str(Path(setting.base).resolve()), adapters=folders, slo=())


def write(diagnosis: Diagnosis, folder: Path) -> None:
    """Store a diagnosis."""
    store.write(folder / DIAGNOSIS, text(diagnosis))


def text(diagnosis: Diagnosis) -> str:
    """diagnosis.json. An unknown bound is null: JSON has no infinity."""
    values = plain(diagnosis)
    assert isinstance(values, dict)
    return json.dumps({"format": FORMAT, **values}, indent=1, allow_nan=False) + "\n"


def read(folder: Path) -> Diagnosis:
    """A stored diagnosis. Raises BadInput for a folder without a whole one."""
    values = without_nulls(_json(folder / DIAGNOSIS))
    return structured(Diagnosis, values, "diagnosis")


def read_setting(folder: Path) -> Setting:
    """The setting of a diagnosis. Raises BadInput for a folder without a whole one."""
    return structured(Setting, _json(folder / SETTING), "setting")


def _json(file: Path) -> Json:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file.parent} holds no diagnosis: {error}", "diagnose first, without --more") from error
