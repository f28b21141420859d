"""Cells on a Ray cluster: which machine they take, and what is refused. Without Ray these tests are skipped."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.executors import MakeJob, check_a_small_machine_is_named, check_each_runs_once, jobs_below
from helpers.waiting import wait_until

from peftopt import store
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.recipe.grid import MachineClass
from peftopt.runner.executors import opened
from peftopt.runner.executors.ahead import EACH

ray = pytest.importorskip("ray")

STORE = 80_000_000
"""Bytes of each node's object store: the least that Ray takes."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines that are one of a class each, and three that are no classes: two that differ, one that has two."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "object_store_memory": STORE, "resources": {"small": 1}}
    found = Cluster(initialize_head=True, head_node_args=head)
    for cpus, resources in ((2, {"large": 1}), (1, {"mixed": 1}), (2, {"mixed": 1}), (1, {"double": 2})):
        found.add_node(num_cpus=cpus, object_store_memory=STORE, resources=resources)
    found.wait_for_nodes()
    yield found
    found.shutdown()


@pytest.fixture
def executor(cluster: Any) -> Iterator[Any]:
    found = opened(f"ray:{cluster.address}", "")
    yield found
    found.close()


@pytest.fixture
def job(tmp_path: Path) -> MakeJob:
    return jobs_below(tmp_path)


def test_each_cell_runs_once_and_says_how_it_ended(executor: Any, job: MakeJob) -> None:
    small, large = MachineClass("small"), MachineClass("large")
    assert (executor.machines(small), executor.machines(large), executor.machines(MachineClass("none"))) == (1, 1, 0)
    check_each_runs_once(executor, job, small, large)


def test_a_machine_that_is_less_than_its_class_is_named(executor: Any, job: MakeJob) -> None:
    check_a_small_machine_is_named(executor, job)


@pytest.mark.parametrize(("name", "told"), [("mixed", "1 processors and 0 GPUs, 2"), ("double", "more than one cell")])
def test_machines_that_would_mix_measurements_are_refused(executor: Any, name: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        executor.machines(MachineClass(name))


def test_a_cell_whose_task_breaks_has_failed_and_the_others_go_on(executor: Any, job: MakeJob) -> None:
    small = MachineClass("small")
    broken, whole = job("broken", small, "--version"), job("whole", small, "--version")
    (broken.folder / ".owner").mkdir()  # where the lock's file would be
    for each in (broken, whole):
        executor.submit(each)
    ended = {each.name: attempt for each, attempt in (executor.wait() for _ in range(2))}
    assert (ended["broken"].exit_code, ended["whole"].exit_code) == (4, 0)
    assert ".owner" in ended["broken"].message


def test_more_cells_than_a_cluster_gets_at_a_time_all_end(executor: Any, job: MakeJob) -> None:
    jobs = [job(f"c{n}", MachineClass("small"), "--version") for n in range(2 * EACH + 1)]
    for each in jobs:
        executor.submit(each)
    assert len(executor.running) == EACH
    assert [executor.wait()[0].name for _ in jobs] == [each.name for each in jobs], "in their order"


def test_a_cell_whose_process_is_lost_again_and_again_has_failed(
    executor: Any, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftopt.runner.executors.ray.RETRIES", 0)
    cell = job("a", MachineClass("small"), "--version")
    executor.submit(cell)
    wait_until(lambda: store.owner(cell.folder))
    os.kill(int(store.owner(cell.folder).split()[1]), signal.SIGKILL)
    _, ended = executor.wait()
    assert ended.exit_code == 4 and "lost 1 times" in ended.message


def test_without_a_cluster_it_is_said_how_to_start_one() -> None:
    with pytest.raises(MissingEnvironment, match="no Ray cluster") as caught:
        opened("ray:127.0.0.1:1", "")
    assert "ray start" in caught.value.hint
