"""The race's workers: which are started ahead of it, and when there is no room for that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_decide import plan_of, whole

from peftopt import machine
from peftopt.errors import WorkerFailed
from peftopt.evidence import TWIN, Evidence
from peftopt.records import Variant
from peftopt.runner import racing


class Started:
    """In a worker's place: it knows its variant."""

    def __init__(self, name: str) -> None:
        self.name, self.closed = name, False

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


@pytest.fixture
def field(monkeypatch: pytest.MonkeyPatch) -> racing.Field:
    plan = plan_of("merged", "int8")
    run: Any = SimpleNamespace(plan=plan, recipe=plan.recipe, evidence=Evidence(plan, []), folder=Path())

    def worker(run: Any, variant: Variant, log: str, threads: int) -> Started:
        if variant.name == "int8":
            raise WorkerFailed("died", "at start")
        return Started(variant.name)

    monkeypatch.setattr(racing, "worker", worker)
    monkeypatch.setattr(machine, "free_memory", lambda: 2**40)
    return racing.Field(run, plan.recipe.workloads["chat"])


def test_workers_start_ahead_of_the_race_and_end_with_it(field: racing.Field) -> None:
    field.start()
    assert field.started.keys() == {"adapter", "adapter" + TWIN, "merged"}, "one that dies is told of at its turn"
    assert not field.children, "none has loaded its model"
    workers: list[Any] = list(field.started.values())
    field.close()
    assert all(worker.closed for worker in workers)


def test_no_worker_starts_ahead_where_memory_is_short_or_nothing_is_to_be_raced(
    field: racing.Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = whole(field.run.plan, {"merged": 0.5, "int8": 0.3})
    run: Any = field.run
    run.evidence = Evidence(field.run.plan, decided)
    field.start()
    assert not field.started
    run.evidence = Evidence(field.run.plan, [])
    monkeypatch.setattr(machine, "free_memory", lambda: racing.ROOM)
    field.start()
    assert not field.started
