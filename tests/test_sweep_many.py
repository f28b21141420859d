"""A sweep of many cells whose commands do nothing: how much it looks at, what others do beside it, in which order."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command, prompts
from helpers.untimed import RECIPE
from hypothesis import given
from hypothesis import strategies as st

from peftopt import store
from peftopt.recipe.grid import Cell, MachineClass
from peftopt.records import Decision
from peftopt.report import as_json
from peftopt.runner.cells import Job
from peftopt.runner.executors import attempt
from peftopt.runner.executors.ahead import EACH, Ahead
from peftopt.runner.sweep import ordered

DECISION = Decision(
    recipe="r", baseline="adapter", minimize="latency.p50@chat", clock="wall", chosen=None, outcome="rejected",
    sentence="keep it", variants=(),
)  # fmt: skip


def decided(results: Path, recipe: str, noted: bool = True) -> Path:
    """A finished run of a recipe. An older peftopt left no note of its runs."""
    run = results / "runs" / f"20261130T120000-{recipe}-01234567"
    if noted:
        store.note(run, recipe)
    run.mkdir(parents=True)
    (run / store.FINISHED).touch()
    (run / "decision.json").write_text(as_json.render(DECISION))
    return run


@pytest.fixture
def grid(tmp_path: Path) -> Callable[[int], Path]:
    """Writes a grid of so many adapters, with their folders."""
    (tmp_path / "base").mkdir()
    questions = prompts(tmp_path / "eval.jsonl", 6, "eval")
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(base="base", adapter="a0", prompts=questions))

    def write(number: int) -> Path:
        for n in range(number):
            (tmp_path / f"a{n}").mkdir(exist_ok=True)
        listed = ", ".join(f"a{n}: a{n}" for n in range(number))
        file = tmp_path / f"grid{number}.yaml"
        file.write_text(f"recipe: tiny.yaml\nmodels: {{tiny: {{base: base, adapters: {{{listed}}}}}}}\n")
        return file

    return write


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells whose command was run. Each is decided by it."""
    names: list[str] = []

    def decide(job: Job) -> tuple[int, bytes]:
        names.append(job.name)
        decided(job.results, job.name)
        return 1, b""

    monkeypatch.setattr(attempt, "_run", decide)
    return names


def cells_of(grid: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert command("sweep", "status", grid, "--results", results, "--json") == 0
    listed: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["cells"]
    return listed


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many entries of folders were listed."""
    counted: Counter[str] = Counter()
    scandir, listdir = os.scandir, os.listdir

    class Counted:
        """What os.scandir gives, counted."""

        def __init__(self, *place: Any) -> None:
            self.found = scandir(*place)

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *error: object) -> None:
            self.found.close()

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            return self

        def __next__(self) -> os.DirEntry[str]:
            entry = next(self.found)
            counted["entries"] += 1
            return entry

        def close(self) -> None:
            self.found.close()

    def listed(*place: Any) -> list[str]:
        names = listdir(*place)
        counted["entries"] += len(names)
        return names

    monkeypatch.setattr(os, "scandir", Counted)
    monkeypatch.setattr(os, "listdir", listed)
    return counted


def test_a_sweep_of_twice_as_many_cells_looks_at_no_more_than_twice_as_much(
    grid: Callable[[int], Path], tmp_path: Path, run: list[str], entries: Counter[str]
) -> None:
    work = []
    for number in (1, 20, 40):  # the first also looks for plug-ins
        entries.clear()
        assert command("sweep", grid(number), "--results", tmp_path / f"results{number}", "--no-forecast") == 1
        work.append(entries["entries"])
    assert len(run) == 61
    assert work[1] >= 20 and work[2] <= 2 * work[1], work


def test_what_others_decide_beside_a_sweep_is_not_measured_again(
    grid: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    all_, results, begun = grid(5), tmp_path / "results", []
    names = [cell["cell"] for cell in cells_of(all_, results, capsys)]
    old = decided(results, names[4], noted=False)

    def others_too(job: Job) -> tuple[int, bytes]:
        begun.append(job.name)
        for name in names[:3]:
            decided(results, name)
        return 1, b""

    decided(results, names[3]).rename(tmp_path / "removed")
    monkeypatch.setattr(attempt, "_run", others_too)
    command("sweep", all_, "--results", results, "--no-forecast")
    assert begun[0] == names[0] and names[1] not in begun and names[2] not in begun, "another process decided them"
    assert names[3] in begun, "its run was removed"
    assert names[4] not in begun and old.exists(), "an older peftopt decided it"


# ---- the order -----------------------------------------------------------------------------------


def cell(name: str, machine: str) -> Cell:
    return Cell(name, "m", name, "all", MachineClass(machine), "")


LISTED = st.lists(st.tuples(st.sampled_from(["one", "two", "ten"]), st.integers(1, 5)), max_size=40)
MACHINES = {"one": 1, "two": 2, "ten": 10}


@given(listed=LISTED)
def test_where_a_class_has_several_machines_the_longest_cells_begin_first(listed: Sequence[tuple[str, int]]) -> None:
    todo = [cell(f"c{n}", machine) for n, (machine, _) in enumerate(listed)]
    takes = {f"c{n}": float(length) for n, (_, length) in enumerate(listed)}
    order = ordered(todo, MACHINES, takes)
    assert sorted(each.name for each in order) == sorted(takes)
    for machine, number in MACHINES.items():
        own = [each for each in order if each.machine.name == machine]
        before = [each for each in todo if each.machine.name == machine]
        assert own == (sorted(before, key=lambda each: -takes[each.name]) if number > 1 else before)


def test_a_cluster_that_takes_only_the_first_cells_gets_some_for_each_machine() -> None:
    todo = [cell(f"{machine}{n}", machine) for machine in ("two", "ten") for n in range(50)]
    first = ordered(todo, MACHINES, {each.name: 1.0 for each in todo})[:24]
    assert Counter(each.machine.name for each in first) == {"two": 4, "ten": 20}


@given(listed=LISTED, data=st.data())
def test_a_cluster_never_lacks_a_job_and_never_has_many(listed: Sequence[tuple[str, int]], data: st.DataObject) -> None:
    jobs = [Job(f"c{n}", (), MachineClass(machine), Path(), Path()) for n, (machine, _) in enumerate(listed)]
    waiting = Ahead()
    there: list[Job] = []
    ended: list[Job] = []
    for job in jobs:
        waiting.add(job)
        there += waiting.due(job.needs, MACHINES[job.needs.name])
    while there:
        for name, machines in MACHINES.items():
            own = [job for job in there if job.needs.name == name]
            left = [job for job in jobs if job.needs.name == name and job not in ended]
            assert len(own) == min(len(left), machines * EACH)
        job = there.pop(data.draw(st.integers(0, len(there) - 1)))
        ended.append(job)
        waiting.ended(job)
        there += waiting.due(job.needs, MACHINES[job.needs.name])
        begun = [each for each in jobs if each in there or each in ended]
        for name in MACHINES:
            own = [each for each in jobs if each.needs.name == name]
            assert [each for each in begun if each.needs.name == name] == own[: sum(each in own for each in begun)]
    assert {job.name for job in ended} == {job.name for job in jobs}
