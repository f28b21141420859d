"""The race's workers where one dies, where memory or processors are few; that they start at all: test_run.py."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.command_line import prompts
from helpers.records import evidence_of, plan_of, whole

from peftopt import machine, store
from peftopt.errors import WorkerFailed
from peftopt.measurements import Failure
from peftopt.records import TWIN, Step, Variant
from peftopt.runner import race
from peftopt.runner.run import Run


class Started:
    """In a worker's place: it knows its variant."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> race.Field:
    plan = plan_of("merged", "int8")
    chat = replace(plan.recipe.workloads["chat"], prompts=str(prompts(tmp_path / "p.jsonl", 4, "chat")))
    plan = replace(plan, recipe=replace(plan.recipe, workloads={**plan.recipe.workloads, "chat": chat}))
    run: Any = SimpleNamespace(plan=plan, recipe=plan.recipe, evidence=evidence_of(plan, []), folder=Path())

    def worker(run: Any, variant: Variant, log: str, threads: int, forks: Any) -> Started:
        if variant.name == "int8":
            raise WorkerFailed("died", "at start")
        return Started(variant.name)

    monkeypatch.setattr(race, "worker", worker)
    monkeypatch.setattr(machine, "free_memory", lambda: 2**40)
    return race.Field(run, plan.recipe.workloads["chat"])


def test_a_worker_that_dies_while_it_starts_ahead_is_told_of_at_its_turn(field: race.Field) -> None:
    field.start()
    assert field.started.keys() == {"adapter", "adapter" + TWIN, "merged"} and not field.children


def test_no_worker_starts_ahead_where_memory_is_short_or_nothing_is_to_be_raced(
    field: race.Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = whole(field.run.plan, {"merged": 0.5, "int8": 0.3})
    run: Any = field.run
    run.evidence = evidence_of(field.run.plan, decided)
    field.start()
    assert not field.started
    run.evidence = evidence_of(field.run.plan, [])
    monkeypatch.setattr(machine, "free_memory", lambda: race.ROOM)
    field.start()
    assert not field.started


@pytest.fixture
def served(field: race.Field, monkeypatch: pytest.MonkeyPatch) -> race.Field:
    """The same variants, each on a server, and nothing but their starts taken down."""
    run: Any = field.run
    chains = {name: replace(v, engine=Step("vllm", "engine", "")) for name, v in run.recipe.variants.items()}
    run.recipe = replace(run.recipe, variants=chains)
    run.log = lambda *_: None
    monkeypatch.setattr(race, "worker", lambda run, variant, log, threads, forks: Started(variant.name))
    return field


def test_servers_start_side_by_side_where_there_are_processors_for_them(
    served: race.Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2, timeout=60)

    def load(run: Any, variant: Variant, child: Any) -> dict[str, Any]:
        together.wait()
        return {}

    monkeypatch.setattr(race, "load", load)
    monkeypatch.setattr(machine, "cores", lambda: 2 * race.CORES)
    served._serve(["adapter", "merged", "adapter" + TWIN, "int8"])
    assert len(served.children) == 4 and not together.broken


def test_servers_start_one_by_one_at_their_turns_where_processors_are_few(
    served: race.Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "load", lambda *_: {})
    monkeypatch.setattr(machine, "cores", lambda: 2 * race.CORES - 1)
    served._serve(["adapter", "merged"])
    assert not served.children
    served._child("merged")
    assert served.children.keys() == {"merged"}


def test_a_server_that_did_not_start_beside_others_says_why_at_its_turn_and_may_try_again(
    served: race.Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def load(run: Any, variant: Variant, child: Any) -> dict[str, Any]:
        tries.append(variant.name)
        if variant.name == "merged" and tries.count("merged") == 1:
            raise WorkerFailed("killed", "by a neighbour")
        return {}

    monkeypatch.setattr(race, "load", load)
    monkeypatch.setattr(machine, "cores", lambda: 4 * race.CORES)
    served._serve(["adapter", "merged"])
    assert served.children.keys() == {"adapter"}
    with pytest.raises(WorkerFailed, match="neighbour"):
        served._child("merged")
    assert served._child("merged") and tries.count("merged") == 2


def test_a_run_keeps_one_evidence_until_something_is_logged(tmp_path: Path) -> None:
    listener: Any = None
    run = Run(plan_of("merged"), store.Store(tmp_path), tmp_path, listener)
    first = run.evidence
    assert run.evidence is first
    run.log(Failure(stage="build", reason="killed", detail=""), "merged")
    assert run.evidence is not first and run.evidence.failures.keys() == {"merged"}
    assert [m.variant for m in store.read(tmp_path / "measurements.jsonl")] == ["merged"]
    run.plan = plan_of("merged", "int8")
    assert run.evidence.plan is run.plan
