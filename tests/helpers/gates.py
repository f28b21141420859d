"""What a gate compares: invented runs as folders, and invented snapshots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from helpers.records import decide, evidence_of
from peftopt import store
from peftopt.gate import taking
from peftopt.gate.records import Baseline, Errors, Hashes, Race, RuleFigure, Scores, Snapshot
from peftopt.records import Interval, Json, Measurement, Plan

HASHES = Hashes("base", "adapter", "shape", "tokenizer", "answers", {"chat": "chat", "bulk": "bulk"})
MACHINE: Mapping[str, Json] = {"cpu": "A", "cores": 8, "gpu": [], "versions": {"torch": "2.13.0"}}
RACE = "latency.p50@chat over adapter"


def run_folder(
    folder: Path,
    plan: Plan,
    found: Sequence[Measurement],
    hashes: Hashes = HASHES,
    machine: Mapping[str, Json] = MACHINE,
) -> Path:
    """A run's folder, as `peftopt run` leaves it."""
    folder.mkdir(parents=True)
    store.append(folder / "measurements.jsonl", *found)
    store.write(folder / "plan.json", json.dumps(asdict(plan)))
    store.write(folder / "machine.json", json.dumps(machine))
    store.write(folder / "hashes.json", json.dumps(asdict(hashes)))
    return folder


def snapshot_of(plan: Plan, found: Sequence[Measurement], variant: str = "merged", hashes: Hashes = HASHES) -> Snapshot:
    """What a gate keeps of such a run."""
    taken = taking.snapshot(evidence_of(plan, found), decide(plan, found, MACHINE), variant, hashes)
    assert taken is not None
    return taken


def invented(
    launches: Sequence[Sequence[float]],
    wrong: Sequence[int] = (),
    asked: int = 400,
    always: Mapping[str, tuple[str, ...]] | None = None,
    sometimes: Mapping[str, tuple[str, ...]] | None = None,
) -> Snapshot:
    """A snapshot with one race, one score and one rule that rests on neither."""
    return Snapshot(
        recipe="test",
        variant="merged",
        serves_adapter=False,
        outcome="accepted",
        decided_by="",
        chosen="merged",
        chain=("merge",),
        rules={
            "merge.gain": RuleFigure("accepted", Interval(0.5, 0.4, 0.6, 9), "x", 0.85, "adapter", RACE),
            "merge.parity": RuleFigure("accepted", Interval(0.001, 0.0, 0.002, asked), "share", 0.01, "adapter"),
        },
        races={RACE: Race("wall", tuple(tuple(launch) for launch in launches))},
        scores={"accuracy": Scores(asked, "rows", {f"p{number}": 0.0 for number in sorted(wrong)})},
        errors=Errors(asked, "rows", 0.05, always or {}, sometimes or {}),
        hashes=HASHES,
        machine={"cpu": "A", "cores": "8", "gpu": "", "threads": "8"},
        versions={"torch": "2.13.0"},
    )


def baseline_of(snapshot: Snapshot) -> Baseline:
    """It, accepted."""
    return Baseline("2026-01-31", snapshot)


def without(snapshot: Snapshot, figure: str) -> Snapshot:
    """The snapshot of a run that did not measure one thing: a rule, a score, a race, or "errors"."""
    if figure == "errors":
        return replace(snapshot, errors=None)
    return replace(
        snapshot,
        rules={name: rule for name, rule in snapshot.rules.items() if name != figure},
        scores={name: scores for name, scores in snapshot.scores.items() if name != figure},
        races={name: race for name, race in snapshot.races.items() if name != figure},
    )
