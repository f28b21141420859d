"""Every operation on files fails or is the last one of its process, in turn: nothing half written is ever found, and
the next run ends as if nothing had been. Here a sample; `python benchmarks/kills.py` sweeps all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import sweeps, swept
from helpers.faulty_io import FAULTS, Faults, injected
from helpers.servers import served

from peftopt import machine

pytestmark = pytest.mark.skipif(bool(machine.gpus()), reason="copies of a process cannot share a GPU")

QUICK = ("artifact", "registry", "log", "decide", "report", "sweep")
SAMPLE = {"artifact": 11, "registry": 50, "log": 5, "decide": 29, "report": 21, "sweep": 5}
"""An operation in so many, of the quick jobs."""
SLOW = {"load": (1, 3), "merge": (5, 41), "quantize": (11,)}
"""The operations that are the last of all processes, of the others."""


@pytest.fixture(scope="module")
def place(tiny_base: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[swept.Place]:
    with served() as server:
        yield swept.Place(tiny_base, tiny_lora, tmp_path_factory.mktemp("jobs"), server.url)


@pytest.fixture(scope="module")
def jobs(place: swept.Place) -> dict[str, tuple[sweeps.Job, object]]:
    """Jobs that were asked for, with what they result in without a fault."""
    return {}


def job(name: str, place: swept.Place, jobs: dict[str, tuple[sweeps.Job, object]], tmp_path: Path) -> sweeps.Job:
    if name not in jobs:
        made = swept.job(name, place)
        jobs[name] = (made, sweeps.reference(made, tmp_path)[0])
    return jobs[name][0]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", QUICK)
@pytest.mark.fault(1, "a file under its own name is whole, and the next run ends as if nothing had been")
@pytest.mark.fault(4, "what was there stays, what was half written is freed, exit 4 with the bytes that are free")
@pytest.mark.fault(5, "the path is named, nothing is left half written, exit 4")
@pytest.mark.fault(6, "taken as not written")
def test_no_fault_of_the_disk_and_no_kill_leaves_half_a_file(
    name: str, fault: str, place: swept.Place, jobs: dict[str, tuple[sweeps.Job, object]], tmp_path: Path
) -> None:
    made = job(name, place, jobs, tmp_path)
    step = max(1, SAMPLE[name] // (4 if FAULTS[fault][1] else 1))
    points = list(sweeps.sweep(made, fault, tmp_path, jobs[name][1], step, 1 + list(FAULTS).index(fault) % step))
    assert not [f"{point.at} ({point.ended.what}): {point.wrong}" for point in points if point.wrong]


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, places in SLOW.items() for at in places])
@pytest.mark.fault(1, "the next run makes the model, or goes on to the same verdict")
def test_a_model_or_a_run_that_is_killed_anywhere_is_made_by_the_next(
    name: str, at: int, place: swept.Place, jobs: dict[str, tuple[sweeps.Job, object]], tmp_path: Path
) -> None:
    made = job(name, place, jobs, tmp_path)
    point = next(sweeps.sweep(made, "kill -9", tmp_path, jobs[name][1], first=at), None)
    assert point is not None, f"{name} has no {at} operations any more"
    assert not point.wrong, point.wrong
    assert point.ended.code == -9


def test_the_shim_itself_counts_fails_and_is_gone_afterwards(tmp_path: Path) -> None:
    """Every kind of operation is seen: else a sweep would be clean because it did nothing."""

    def work(folder: Path) -> None:
        folder.mkdir()
        with (folder / "a").open("w") as file:
            file.write("text")
        number = os.open(folder / "b", os.O_WRONLY | os.O_CREAT)
        os.write(number, b"more")
        os.fsync(number)
        os.close(number)
        (folder / "b").rename(folder / "c")
        (folder / "c").unlink()
        (folder / "a").unlink()
        folder.rmdir()

    counted = injected(Faults(str(tmp_path / "root")))
    with counted as faults:
        work(tmp_path / "root")
        work(tmp_path / "elsewhere")
    total = faults.count
    assert total == 11  # mkdir, open, write, close, open, write, fsync, rename, three removals
    for at in range(1, total + 1):
        root = tmp_path / f"root-{at}"
        with injected(Faults(str(root), at)), pytest.raises(OSError, match="No space left"):
            work(root)
    work(tmp_path / "root")
    assert faults.count == total and open is not None and sys.modules["io"].open is open
