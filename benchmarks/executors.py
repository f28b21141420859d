"""What an executor of sweeps takes beside the command that it runs.

    python benchmarks/executors.py              # this machine
    python benchmarks/executors.py ray CLASS    # the Ray cluster that this machine is in
    python benchmarks/executors.py slurm:PARTITION CLASS

Every job is `peftopt --version`. A job's overhead is the time from one job's end to the next one's, less what the
command took: queueing, the hand-over, the lock, looking up what the cell has decided, keeping how it ended.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from peftopt.recipe.grid import MachineClass
from peftopt.runner.cells import Job
from peftopt.runner.executors import opened

JOBS = 21


def main(on: str = "local", machine: str = "any") -> None:
    """Print the first job's overhead, and the median and the range of the others'."""
    needs = MachineClass(machine)
    with tempfile.TemporaryDirectory() as home:
        executor = opened(on, machine)
        jobs = [Job(f"job-{n}", ("--version",), needs, Path(home) / f"job-{n}", Path(home)) for n in range(JOBS)]
        for job in jobs:
            job.folder.mkdir()
        last = time.monotonic()
        for job in jobs:
            executor.submit(job)
        overheads = []
        for _ in jobs:
            _, ended = executor.wait()
            assert ended.exit_code == 0, ended
            now = time.monotonic()
            overheads.append((now - last - ended.seconds) * 1000)
            last = now
        executor.close()
    first, *others = overheads
    low, middle, high = min(others), statistics.median(others), max(others)
    print(f"{on}: the first {first:.0f} ms, then {middle:.0f} ms ({low:.0f} to {high:.0f}, {len(others)} jobs)")


if __name__ == "__main__":
    main(*sys.argv[1:])
