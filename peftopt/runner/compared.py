"""Read runs from disk, whole or in part, for a comparison. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from peftopt import store
from peftopt.decision.comparing import ComparedRun
from peftopt.decision.decide import decide
from peftopt.decision.evidence import Evidence
from peftopt.errors import BadInput
from peftopt.measurements import Measured
from peftopt.records import Decision, JsonValue, Plan
from peftopt.report import fingerprint
from peftopt.report.as_json import decision_from_json
from peftopt.runner import hashes
from peftopt.runner.judged import JUDGED

HINT = "give a run's folder, such as one that `peftopt runs` lists, or its decision.json"


def read(given: Path, warn: Callable[[str], None] = lambda _: None) -> ComparedRun:
    """A run from its folder, or from its decision.json alone. `lacks` names what is missing or was written by an older
    peftopt. A run without a decision is judged from its measurements, in memory. Raises BadInput for a path that holds
    no run."""
    if given.is_file():
        decision = decision_from_json(store.read_text(given))
        lacks = ["only its decision was given: base, adapter, prompts and recipe are not known"]
        return _compared(str(given), decision, None, [], {}, lacks)
    if not given.is_dir():
        raise BadInput(f"there is no run at {given}", HINT)
    lacks = []
    plan = _plan(given, lacks)
    records = _records(given, lacks, warn) if plan else []
    known = _object(given / "machine.json")
    decided = given / "decision.json"
    if decided.exists():
        decision = decision_from_json(store.read_text(decided))
    elif plan and records:
        decision = decide(Evidence(plan, records), known)
        lacks.append("it has not decided: it is judged here by its measurements so far")
    else:
        raise BadInput(f"{given} is not a run: it has no decision.json", HINT)
    if not decision.machine:
        decision = replace(decision, machine=known)
    return _compared(str(given), decision, plan, records, _object(given / hashes.FILE), lacks)


def _compared(
    name: str,
    decision: Decision,
    plan: Plan | None,
    records: list[Measured],
    contents: Mapping[str, JsonValue],
    lacks: list[str],
) -> ComparedRun:
    if not decision.machine:
        lacks = [*lacks, "its machine and packages are not known"]
    launches = {}
    if plan and records:
        evidence = Evidence(plan, records)
        measured = [(variant, workload) for variant, workload in evidence.turns]
        launches = {f"{v}@{w}": evidence.launch_count(v, w) for v, w in measured}
    facts = fingerprint.facts(decision, plan, records, contents)
    return ComparedRun(name, decision, facts, launches, tuple(lacks))


def _object(file: Path) -> dict[str, JsonValue]:
    """The JSON object in a file; {} without a file. Raises BadInput for a damaged file."""
    return store.read_object(file) if file.exists() else {}


def _plan(folder: Path, lacks: list[str]) -> Plan | None:
    """The plan that judged the run; None, with a line in `lacks`, if this peftopt cannot read one."""
    file = folder / (JUDGED if (folder / JUDGED).exists() else "plan.json")
    if not file.exists():
        lacks.append("no plan.json: base, adapter, prompts and recipe are not known")
        return None
    try:
        return store.read_plan(file)
    except BadInput:
        lacks.append(f"{file.name} is of another peftopt: base, adapter, prompts and recipe are not known")
        return None


def _records(folder: Path, lacks: list[str], warn: Callable[[str], None]) -> list[Measured]:
    """A run's measurements; none, with a line in `lacks`, if this peftopt cannot read them."""
    file = folder / "measurements.jsonl"
    if not file.exists():
        lacks.append("no measurements.jsonl: prompts, engines and launches are not known exactly")
        return []
    try:
        return store.read(file, warn)
    except BadInput as error:
        lacks.append(f"measurements.jsonl cannot be read: {error.message}")
        return []
