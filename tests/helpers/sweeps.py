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
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from helpers.faulty_io import ALONE, FAULTS, KILLED, VARIABLE, Faults
from helpers.forked import COMMANDS, WORKERS, Copy, First
from peftopt.errors import ENVIRONMENT

FIRST = First(
    *(*COMMANDS.imported, *WORKERS.imported, "cattrs", "ml_dtypes", "peftopt.report", "helpers.swept"),
    *("peftopt.runner.recipe_run", "peftopt.runner.judged", "peftopt.runner.single", "peftopt.runner.compile"),
    *("peftopt.diagnose.planning.planning", "peftopt.merging.job", "peftopt.transforms.awq", "peftopt.transforms.bake"),
    *("peftopt.transforms.merge", "peftopt.transforms.int8", "peftopt.engines.continuous", "peftopt.engines.vllm"),
)
HOME = "{home}"
"""In a job's words: the folder that it writes to."""
LEFT = re.compile(r"\.tmp\b|^\..+\.\d+\.|^peftopt-\d+-")
"""Names of what is written before it has its own."""
REMOVALS = ("unlink", "remove", "rmdir")
"""What cannot be removed is left, for the next run."""

LIMIT_S = 300
"""Seconds that a run may take."""

ENDS_S = 60
"""Seconds that its processes may outlive it."""


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
    """How a run ended: its exit code, what it said, how many operations there were, and which one failed. `hangs` says
    what did not end, "" for nothing."""

    code: int
    said: str
    count: int
    what: str = ""
    hangs: str = ""


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
        hangs = "" if within(LIMIT_S, lambda: _over(copy)) else f"it did not end in {LIMIT_S} s"
    finally:
        copy.kill()
    code = copy.wait()
    if not hangs and not within(ENDS_S * 50, lambda: _gone(faults)):
        hangs = f"of its processes some live {ENDS_S} s after it"
    what = Path(f"{counter}.what")
    failed = what.read_text().strip() if what.exists() else ""
    return Ended(code, said.read_text(errors="replace"), faults.counted(), failed, hangs)


def within(tries: int, happened: Callable[[], bool]) -> bool:
    """Whether it happens in so many tries. A clock would count the time in which the machine stops all processes."""
    return any(happened() for _ in range(tries))


def _over(copy: Copy) -> bool:
    """Whether a process ends in a second."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        copy.wait(1)
    return copy.returncode is not None


def _gone(faults: Faults) -> bool:
    """Whether all that counted are gone; not at once, where one lives."""
    living = [each for each in faults.processes() if lives(each)]
    if living:
        time.sleep(0.02)
    return not living


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
    assert not ended.hangs, f"{ended.hangs}: {ended.said[-300:]}"
    assert ended.code in codes, f"exit {ended.code}: {ended.said[-300:]}"
    assert "Traceback" not in ended.said, ended.said[-600:]
    if ended.code == ENVIRONMENT:
        assert "error:" in ended.said and "hint:" in ended.said, ended.said[-300:]
        assert dies or ended.what in REMOVALS or not left(home), f"left behind: {left(home)}"
    job.check(home)
    second = attempt(job, home)
    assert not second.hangs, f"the next run: {second.hangs}: {second.said[-300:]}"
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
    """What a sweep of one job by one fault found, of so many operations of a run without a fault."""

    operations: int = 0
    points: int = 0
    wrong: int = 0
    seconds: float = 0.0
    first: str = ""


def swept(
    job: Job, faults: Sequence[str], scratch: Path, step: int = 1, until: float = math.inf
) -> Iterator[tuple[str, Tally]]:
    """Each fault's tally; no point begins when the clock (monotonic) is beyond `until`."""
    wanted, operations = reference(job, scratch)
    for fault in faults:
        tally, started = Tally(operations), time.monotonic()
        for point in itertools.takewhile(lambda _: time.monotonic() < until, sweep(job, fault, scratch, wanted, step)):
            tally.points += 1
            if point.wrong:
                tally.wrong += 1
                tally.first = tally.first or f"operation {point.at} ({point.ended.what}): {point.wrong}"
        tally.seconds = time.monotonic() - started
        yield fault, tally
