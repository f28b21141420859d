"""A job is run again and again, and each time another of its operations on files fails or is the last: nothing half
written may be found where whole files are, and the next run ends as if nothing had been.

Each run is a copy of a process that has imported everything (helpers.forked), and so are its workers.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from helpers.faulty_io import ALONE, FAULTS, KILLED, VARIABLE, Faults
from helpers.forked import COMMANDS, WORKERS, First
from helpers.waiting import wait_until
from peftopt.errors import ENVIRONMENT

FIRST = First(*COMMANDS.imported, *WORKERS.imported, "peftopt.runner.recipe_run", "peftopt.report", "helpers.swept")
HOME = "{home}"
"""In a job's words: the folder that it writes to."""
LEFT = re.compile(r"\.tmp\b|^\..+\.\d+\.|^peftopt-\d+-")
"""Names of what is written before it has its own."""
REMOVALS = ("unlink", "remove", "rmdir")
"""What cannot be removed is left, for the next run."""

LIMIT_S = 300.0


@dataclass(frozen=True)
class Job:
    """What is swept. `words` of `python -m`; `begin` is the folder that each run has a copy of, `codes` it may end
    with. `check` raises AssertionError for what is torn in the folder, also right after a kill; `result` says what has
    to be the same after the next run."""

    name: str
    words: tuple[str, ...]
    begin: Path
    check: Callable[[Path], object]
    result: Callable[[Path], object]
    codes: frozenset[int] = frozenset({0})
    again: frozenset[int] = frozenset()
    """Codes that the next run may end with too, where the one before was over but for its last word."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, what it said, how many operations there were, and which one failed."""

    code: int
    said: str
    count: int
    what: str = ""


@dataclass(frozen=True)
class Point:
    """A run whose `at`-th operation failed; `wrong` says what should not be, "" for nothing."""

    job: str
    fault: str
    at: int
    ended: Ended
    wrong: str = ""


def attempt(job: Job, home: Path, fault: str = "", at: int = 0, name: str = "") -> Ended:
    """Run a job in its folder; over when all its processes are. `name` tells it from one that runs there meanwhile."""
    number, only = FAULTS[fault] if fault else (KILLED, ())
    counter, said = home.with_name(f"count{name}"), home.with_name(f"said{name}")
    for note in ("processes", "what"):
        Path(f"{counter}.{note}").unlink(missing_ok=True)
    counter.write_text("0")
    faults = Faults(str(home), at, number, only, str(counter))
    (home / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, VARIABLE: faults.told(), "TMPDIR": str(home / "tmp"), "CUDA_VISIBLE_DEVICES": ""}
    words = [word.replace(HOME, str(home)) for word in job.words]
    copy = FIRST.begin(said, *words, environment=environment, folder=home, workers=FIRST)
    try:
        code = copy.wait(LIMIT_S)
    finally:
        copy.kill()
    wait_until(lambda: not [each for each in faults.processes() if lives(each)], lambda: f"{job.name} lives on")
    what = Path(f"{counter}.what")
    failed = what.read_text().strip() if what.exists() else ""
    return Ended(code, said.read_text(errors="replace"), faults.counted(), failed)


def lives(process: int) -> bool:
    """Whether a process runs: one that is dead and not yet asked for does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def sweep(job: Job, fault: str, scratch: Path, wanted: object, step: int = 1, first: int = 1) -> Iterator[Point]:
    """A run for each `step`-th operation from the `first` on, until one has no operation left to fail. `wanted` is the
    result of a run without a fault."""
    at = first
    while True:
        home = scratch / str(at) / "home"
        shutil.copytree(job.begin, home)
        ended = attempt(job, home, fault, at)
        if ended.count < at:
            shutil.rmtree(home.parent)
            return
        wrong = ""
        try:
            check(job, home, fault, ended, wanted)
        except AssertionError as error:
            wrong = str(error).split("\n")[0] or repr(error)
        yield Point(job.name, fault, at, ended, wrong)
        shutil.rmtree(home.parent)
        at += step


def check(job: Job, home: Path, fault: str, ended: Ended, wanted: object) -> None:
    """Raises AssertionError for a run that ended as none should, for what it left half written, and for a next run that
    finds something else than `wanted` or leaves something behind."""
    dies = FAULTS[fault][0] in (KILLED, ALONE)
    codes = {*job.codes, ENVIRONMENT, *([-9] if dies else [])}
    assert ended.code in codes, f"exit {ended.code}: {ended.said[-300:]}"
    assert "Traceback" not in ended.said, ended.said[-600:]
    if ended.code == ENVIRONMENT:
        assert "error:" in ended.said and "hint:" in ended.said, ended.said[-300:]
        assert dies or ended.what in REMOVALS or not left(home), f"left behind: {left(home)}"
    job.check(home)
    second = attempt(job, home)
    assert second.code in {*job.codes, *job.again}, f"the next run: exit {second.code}: {second.said[-300:]}"
    assert "Traceback" not in second.said, second.said[-600:]
    job.check(home)
    assert not left(home), f"the next run left {left(home)}"
    result = job.result(home)
    assert result == wanted, f"the next run's result is another: {result!r}"[:300]


def left(home: Path) -> list[str]:
    """What is there under a name that is not its own; a worker's log stays, where an error names it."""
    found = [each for each in home.rglob("*") if LEFT.search(each.name)]
    return [each.name for each in found if not only_logs(each)]


def only_logs(folder: Path) -> bool:
    """Whether a folder holds logs and nothing else."""
    return folder.is_dir() and all(file.suffix == ".log" for file in folder.rglob("*"))


def reference(job: Job, scratch: Path) -> tuple[object, int]:
    """The result of a run without a fault, and how many operations it has."""
    home = scratch / "reference" / "home"
    shutil.copytree(job.begin, home)
    ended = attempt(job, home)
    assert ended.code in job.codes, ended.said
    job.check(home)
    assert not left(home), left(home)
    result = job.result(home)
    shutil.rmtree(home.parent)
    return result, ended.count


@dataclass
class Tally:
    """What a sweep of one job by one fault found."""

    points: int = 0
    wrong: int = 0
    seconds: float = 0.0
    first: str = ""


def swept(
    job: Job, faults: Sequence[str], scratch: Path, step: int = 1, until: float = math.inf
) -> Iterator[tuple[str, Tally]]:
    """Each fault's tally; no point begins when the clock (monotonic) is beyond `until`."""
    wanted, _ = reference(job, scratch)
    for fault in faults:
        tally, started = Tally(), time.monotonic()
        for point in itertools.takewhile(lambda _: time.monotonic() < until, sweep(job, fault, scratch, wanted, step)):
            tally.points += 1
            if point.wrong:
                tally.wrong += 1
                tally.first = tally.first or f"operation {point.at} ({point.ended.what}): {point.wrong}"
        tally.seconds = time.monotonic() - started
        yield fault, tally
