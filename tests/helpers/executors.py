"""What every executor of a sweep's cells does, whichever cluster it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftopt.recipe.grid import MachineClass
from peftopt.runner import cells
from peftopt.runner.cells import Job

MakeJob = Callable[..., Job]


def jobs_below(folder: Path) -> MakeJob:
    """Makes cells' jobs that keep their files below a folder: by name, class of machines and words of the command."""

    def make(name: str, machine: MachineClass, *words: str) -> Job:
        (folder / name).mkdir()
        return Job(name, words, machine, folder / name, folder)

    return make


def check_each_runs_once(executor: Any, job: MakeJob, first: MachineClass, second: MachineClass) -> None:
    """Each cell runs once and says how it ended; an error of the cell's is final."""
    asked = [job("a", first, "--version"), job("b", second, "--version"), job("c", first, "run", "no.yaml", "--json")]
    for each in asked:
        executor.submit(each)
    ended = dict((each.name, attempt) for each, attempt in (executor.wait() for _ in asked))
    assert {name: attempt.exit_code for name, attempt in ended.items()} == {"a": 0, "b": 0, "c": 2}
    assert "no.yaml" in ended["c"].message
    assert all(cells.attempts(each.folder) == [ended[each.name]] for each in asked)


def check_a_small_machine_is_named(executor: Any, job: MakeJob) -> None:
    """A machine that is less than its class is named, with what it lacks."""
    executor.submit(job("a", MachineClass("small", memory=9e14), "--version"))
    _, ended = executor.wait()
    assert ended.exit_code == 4 and "900000 GB" in ended.message
