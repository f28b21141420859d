"""The contents of a results folder: runs with their outcomes, artifacts with the runs that use them, unused ones."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt import store
from peftopt.errors import PeftoptError
from peftopt.report.as_json import decision_from_json


@dataclass(frozen=True)
class KeptRun:
    """A run's folder. `age_s`: seconds since its last change. `outcome`: its decision's, "unfinished" without a
    decision, "unreadable" for damaged files. `chosen`: the variant that it ships, "" for none. `artifacts`: those that
    it uses."""

    folder: Path
    age_s: float
    size_bytes: int
    variants: int
    outcome: str
    chosen: str
    artifacts: frozenset[str]


@dataclass(frozen=True)
class Kept:
    """An artifact, a compile cache or leftovers of an interrupted build: `what` it is, and the `runs` that use it."""

    folder: Path
    what: str
    age_s: float
    size_bytes: int
    runs: tuple[str, ...] = ()


def runs(results: Path) -> list[KeptRun]:
    """All runs of a results folder, newest first."""
    folders = [plan.parent for plan in (results / "runs").glob("*/plan.json")]
    return [_run(folder) for folder in sorted(folders, key=lambda folder: folder.name, reverse=True)]


def artifacts(results: Path, among: Sequence[KeptRun]) -> list[Kept]:
    """All that builds wrote, largest first. `among`: the runs that count as users; an unreadable one uses all."""
    home = store.Store(results)
    kept = []
    for manifest in (results / "artifacts").glob(f"*/*/{store.MANIFEST}"):
        folder = manifest.parent
        if ".damaged." in folder.name or ".tmp." in folder.name:
            continue
        users = [run for run in among if folder.name in run.artifacts or run.outcome == "unreadable"]
        cache = home.root / "cache" / folder.name[:16]
        names = tuple(run.folder.name for run in users)
        kept.append(Kept(folder, _plugin(manifest), _age(folder), store.size(folder), names))
        if cache.is_dir():
            kept.append(Kept(cache, "compiled graphs", _age(cache), store.size(cache), names))
    for folder in (results / "artifacts").glob("*/*.damaged.*"):
        kept.append(Kept(folder, "damaged", _age(folder), store.size(folder)))
    for folder in (results / "artifacts").glob("*/*.tmp.*"):
        process = folder.name.rpartition(".")[2]
        if not (process.isdigit() and int(process) and store.is_alive(int(process))):
            kept.append(Kept(folder, "half built", _age(folder), store.size(folder)))
    return sorted(kept, key=lambda each: each.size_bytes, reverse=True)


def unused(kept: Iterable[Kept], older_s: float = 0.0, over_bytes: float = 0.0) -> list[Kept]:
    """The artifacts that no run uses and that are older than `older_s`, oldest first, until the remaining unused ones
    take at most `over_bytes`."""
    candidates = sorted((item for item in kept if not item.runs), key=lambda item: item.age_s, reverse=True)
    total = sum(item.size_bytes for item in candidates)
    selected = []
    for item in candidates:
        if item.age_s < older_s or total <= over_bytes:
            continue
        selected.append(item)
        total -= item.size_bytes
    return selected


def remove(folder: Path) -> None:
    """Remove a folder of the store: rename it first, then delete its files. An artifact being built is not touched,
    since its lock and its temporary folder are others."""
    aside = folder.with_name(f"{folder.name}.tmp.0")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
        shutil.rmtree(aside)


def _run(folder: Path) -> KeptRun:
    age, size = _age(folder), store.size(folder)
    try:
        plan = store.read_plan(folder / "plan.json")
        used = frozenset(build.id for build in plan.builds)
        decided = folder / "decision.json"
        if not decided.exists() or store.is_interrupted(folder):
            return KeptRun(folder, age, size, len(plan.recipe.variants), "unfinished", "", used)
        decision = decision_from_json(store.read_text(decided))
    except (PeftoptError, OSError, ValueError):
        return KeptRun(folder, age, size, 0, "unreadable", "", frozenset())
    return KeptRun(folder, age, size, len(plan.recipe.variants), decision.outcome, decision.chosen or "", used)


def _plugin(manifest: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(manifest.read_text(encoding="utf-8"))["build"]["step"]["plugin"])
    return "unreadable"


def _age(folder: Path) -> float:
    """Seconds since anything directly in the folder changed."""
    times = [entry.stat().st_mtime for entry in (folder, *folder.iterdir()) if entry.exists()]
    return max(0.0, time.time() - max(times))
