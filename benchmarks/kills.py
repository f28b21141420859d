"""Is anything ever left half written? Each operation on files fails, or is the last of its process, in turn.

    python benchmarks/kills.py                          # every job and fault: some hours
    python benchmarks/kills.py --kills                  # every job, kill -9 of all its processes, and of one
    python benchmarks/kills.py --job merge --fault "kill -9"
    python benchmarks/kills.py --step 5                 # one operation in five

A job is run in a copy of a folder, and its N-th operation on files fails there, in the command itself or in one of its
workers; then it is run again. A point is wrong where a file under its own name is torn, where the exit code or what is
said is none that is promised, where the next run ends otherwise than one without a fault, or leaves something behind.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import faulty_io, sweeps, swept  # type: ignore[import-not-found]  # noqa: E402
from helpers.servers import served  # type: ignore[import-not-found]  # noqa: E402
from helpers.tiny_models import make_base, make_lora  # type: ignore[import-not-found]  # noqa: E402

SLOW = {"compile": 100, "run": 30}
"""A point of these takes many seconds: one operation in so many, unless --step says otherwise."""

ALONE = "kill -9 of one"
SEVERAL = ("merge", "quantize", "compile", "run")
"""The jobs of more than one process: to the others, the death of one is that of all."""


def main() -> int:
    """Print a table; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", action="append", choices=list(swept.MAKERS), help="only this job; repeat for more")
    parser.add_argument("--fault", action="append", choices=list(faulty_io.FAULTS), help="only this fault; repeat")
    parser.add_argument("--kills", action="store_true", help="only kills")
    parser.add_argument("--step", type=int, default=0, help="one operation in so many")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, and say what was found")
    asked = parser.parse_args()
    chosen = asked.fault or [fault for fault in faulty_io.FAULTS if fault.startswith("kill") or not asked.kills]
    until = time.monotonic() + 60 * asked.minutes
    points = kills = wrong = 0
    print("| job | fault | operations | points | wrong | seconds a point |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder, served() as server:
        home = Path(folder)
        make_base(home / "base", "bfloat16")
        make_lora(home / "base", home / "lora")
        place = swept.Place(home / "base", home / "lora", home / "jobs", server.url)
        place.folder.mkdir()
        for name in asked.job or swept.MAKERS:
            job, scratch = swept.job(name, place), home / f"sweep-{name}"
            step = asked.step or SLOW.get(name, 1)
            faults = [fault for fault in chosen if fault != ALONE or name in SEVERAL]
            for fault, tally in tallies(job, faults, scratch, step, until):
                each = tally.seconds / max(tally.points, 1)
                counts = f"{tally.operations} | {tally.points} | {tally.wrong}"
                print(f"| {name} | {fault} | {counts} | {each:.2f} |", flush=True)
                if tally.first:
                    print(f"{name}, {fault}: {tally.first}", file=sys.stderr, flush=True)
                points += tally.points
                kills += tally.points if fault.startswith("kill") else 0
                wrong += tally.wrong
    sweeps.FIRST.close()
    print(f"\n{points} points, {kills} of them kills; {wrong} wrong")
    return int(wrong > 0)


def tallies(
    job: sweeps.Job, faults: list[str], scratch: Path, step: int, until: float
) -> Iterator[tuple[str, sweeps.Tally]]:
    """Each fault's tally. A job that is wrong without a fault is a wrong point, and the sweep goes on to the next."""
    try:
        yield from sweeps.swept(job, faults, scratch, step, until)
    except AssertionError as error:
        yield "none", sweeps.Tally(wrong=1, first=str(error)[-600:])


if __name__ == "__main__":
    sys.exit(main())
