"""A sweep on a Slurm partition whose driver, jobs and nodes are lost, beside the same sweep on this machine.

    python benchmarks/sweeps.py slurm:PARTITION     # as Slurm's administrator

The partition has two nodes, of the features small and large. Six cells of tiny models: two adapters and an empty
folder, on these two classes. While two jobs run and a cell races, the driver is killed and started again. Then one of
the jobs is killed (scancel --signal=KILL), and once a cell races beside another job again, a node is set down and up.
A row of the table is a cell: what it decides on this machine and on the partition, how many jobs were submitted, how
its commands ended, and how many turns were measured twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.command_line import prompts  # type: ignore[import-not-found]
from helpers.tiny_models import make_base, make_lora  # type: ignore[import-not-found]

from peftopt.runner import cells

RECIPE = """model: {{base: {home}/base, adapter: {home}/first}}
workloads: {{chat: {{prompts: {prompts}, new_tokens: 4, batch: 1}}}}
quality: {{prompts: {prompts}, new_tokens: 2, batch: 4}}
measure: {{requests: 10, warmup: 1, relaunch: 10, max_blocks: 10, min_blocks: 10, threads: 1}}
tradeoffs: {{merge: {{gain: off, parity: off, lost: off, critical_errors: off}}, variant: {{critical_errors: off}}}}
require: [size <= 1.5x]
variants: {{adapter: [], merged: [merge]}}
minimize: latency.p50@chat
"""
"""Nothing of it is decided by times, so all machines have to decide the same, and all may run beside each other."""

GRID = """recipe: tiny.yaml
models: {tiny: {base: base, adapters: {first: first, second: second, empty: empty}}}
machines: {small: {}, large: {}}
"""

PATIENCE_S = 900.0


def main(on: str) -> None:
    """Run both sweeps and print the table."""
    home = Path(tempfile.mkdtemp(prefix="sweeps-"))
    make_base(home / "base", "bfloat16")
    for name in ("first", "second"):
        make_lora(home / "base", home / name)
    (home / "empty").mkdir()
    questions = prompts(home / "eval.jsonl", 6, "eval")
    (home / "tiny.yaml").write_text(RECIPE.format(home=home, prompts=questions))
    (home / "grid.yaml").write_text(GRID)
    beside = [begin(home, "local", "--machine", machine) for machine in ("small", "large")]
    began = time.monotonic()
    told = faults(home, on)
    for each in beside:
        each.wait()
    for line in (*told, f"the sweep on {on} took {time.monotonic() - began:.0f} s; its files: {home}"):
        print(line)
    table(home)


def begin(home: Path, results: str, *options: str) -> subprocess.Popen[bytes]:
    """A sweep of the grid."""
    words = ("sweep", "run", str(home / "grid.yaml"), "--results", str(home / results), *options)
    return subprocess.Popen([sys.executable, "-m", "peftopt.cli", *words], stdout=subprocess.DEVNULL)


def faults(home: Path, on: str) -> list[str]:
    """Run the sweep on the partition, with its faults; what was done."""
    told = []
    driver = begin(home, "cluster", "--on", on)
    until(lambda: bool(racing(home)))
    driver.kill()
    driver.wait()
    before = jobs()
    told.append(f"killed the driver; jobs that live on: {', '.join(sorted(before))}")
    driver = begin(home, "cluster", "--on", on)
    time.sleep(10)
    told.append(f"started it again; jobs 10 s later: {', '.join(sorted(jobs()))}")
    killed = min(job for job, words in jobs().items() if words[0] == "RUNNING")
    slurm("scancel", "--signal=KILL", killed)
    told.append(f"killed job {killed} on node {before.get(killed, ('', '?'))[1]}")
    until(lambda: bool(racing(home)) and killed not in jobs())
    job, node = next((job, words[1]) for job, words in sorted(jobs().items()) if words[0] == "RUNNING")
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=trial")
    told.append(f"set node {node} down, on which job {job} ran")
    time.sleep(10)
    told.append(f"10 s later job {job} is {jobs().get(job, ('not listed',))[0]}")
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)  # it may be up by itself
    code = driver.wait(PATIENCE_S)
    told.append(f"the sweep ended with {code}")
    return told


def racing(home: Path) -> list[str]:
    """The cells of the partition that have begun their race, and whose jobs run; none where only one job runs."""
    live = [words[2] for words in jobs().values() if words[0] == "RUNNING"]
    return [name for name in live if len(live) == 2 and turns(home, name)]


def turns(home: Path, name: str) -> Counter[str]:
    """How often each turn of a cell was measured on the partition: a variant in a block of a workload."""
    found: Counter[str] = Counter()
    for file in (home / "cluster" / "runs").glob(f"*-{name}-*/measurements.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if row["probe"] == "speed" and "block" in row.get("values", {}):
                found[str([row["variant"], row["workload"], row["values"]["block"]])] += 1
    return found


def jobs() -> dict[str, tuple[str, ...]]:
    """The jobs that live, by their ids: state, node, name."""
    listed = slurm("squeue", "--noheader", "--format=%i|%T|%N|%j").splitlines()
    return {words[0]: tuple(words[1:]) for words in (line.split("|") for line in listed)}


def status(home: Path, results: str) -> list[dict[str, Any]]:
    """Where the cells stand."""
    words = ("sweep", "status", str(home / "grid.yaml"), "--results", str(home / results), "--json")
    done = subprocess.run([sys.executable, "-m", "peftopt.cli", *words], capture_output=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)["cells"]
    return found


def slurm(*words: str) -> str:
    """What a command of Slurm's prints."""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def until(happened: Callable[[], bool]) -> None:
    """Wait until it happens."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.5)


def table(home: Path) -> None:
    """Print a row for each cell."""
    folder = cells.folder_of(home / "cluster", "grid")
    print("| cell | this machine | partition | jobs | its commands ended with | turns | measured twice |")
    print("|---|---|---|---|---|---|---|")
    for here, there in zip(status(home, "local"), status(home, "cluster"), strict=True):
        name = there["cell"]
        submitted = len(list((folder / name / "slurm").glob("*_submission.sh")))
        codes = ", ".join(str(each.exit_code) for each in cells.attempts(folder / name))
        measured = turns(home, name)
        twice = sum(number - 1 for number in measured.values())
        print(
            f"| {there['adapter']}, {there['machine']} | {said(here)} | {said(there)} | {submitted} | {codes} "
            f"| {len(measured)} | {twice} |"
        )


def said(cell: dict[str, Any]) -> str:
    """What a cell decided."""
    return f"{cell['outcome']}, {cell['chosen']}" if cell["outcome"] else f"{cell['state']}, exit {cell['exit_code']}"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*sys.argv[1:])
