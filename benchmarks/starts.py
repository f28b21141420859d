"""How long until a worker is ready, and has a model open: from nothing, and as a copy of a fork server.

    python benchmarks/starts.py --model models/smollm2-135m-instruct

Both take turns, so that what else the machine does meets both. The fork server's own imports are told apart: all
workers of a launch share them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from peftopt.forking import ForkServer
from peftopt.jobs import MemoryJob, OpenJob, PrepareJob
from peftopt.records import Model
from peftopt.runner.process import WorkerProcess, fork_server

DEADLINE_S = 600.0


@dataclass(frozen=True)
class Start:
    """Seconds until a worker was ready, then until its model was open; its CPU time (s) and its memory (MB)."""

    ready: float
    opened: float
    cpu: float
    memory: float


def start(model: Model, log: Path, threads: int, forks: ForkServer | None) -> Start:
    """Start a worker, and let it open the model."""
    begun = time.perf_counter()
    with WorkerProcess(log, threads, forks=forks) as worker:
        worker.ask(PrepareJob(plugin="eager", model=model), DEADLINE_S)
        ready = time.perf_counter() - begun
        worker.ask(OpenJob(plugin="eager", model=model, params={}), DEADLINE_S)
        opened = time.perf_counter() - begun - ready
        held = worker.ask(MemoryJob(), DEADLINE_S).peak_memory_bytes or 0
        return Start(ready, opened, worker.cpu_s(), held / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--starts", type=int, default=5, help="Of each kind.")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    model = Model(str(arguments.model.resolve()))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "worker.log")
        with fork_server(Path(folder, "forks.log"), arguments.threads) as forks:
            if forks is None:
                raise SystemExit("processes cannot begin as copies here")
            start(model, log, arguments.threads, None)  # the libraries' files are read from disk
            first = start(model, log, arguments.threads, forks)
            fresh, copies = [], []
            for _ in range(arguments.starts):
                fresh.append(start(model, log, arguments.threads, None))
                copies.append(start(model, log, arguments.threads, forks))
    print("| worker | ready (s) | opens the model (s) | CPU time (s) | memory (MB) |")
    print("|---|---|---|---|---|")
    for name, starts in (("from nothing", fresh), ("the first copy", [first]), ("a further copy", copies)):
        figures = [median(getattr(each, key) for each in starts) for key in ("ready", "opened", "cpu", "memory")]
        print(f"| {name} | {figures[0]:.2f} | {figures[1]:.2f} | {figures[2]:.2f} | {figures[3]:.0f} |")
    ratio = median(a.ready / b.ready for a, b in zip(copies, fresh, strict=True))
    print(f"a copy is ready in {ratio:.3f}x the time of a worker from nothing ({arguments.starts} pairs)")


if __name__ == "__main__":
    main()
