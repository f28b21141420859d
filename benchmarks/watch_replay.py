"""The real log of a gateway, replayed with a fault planted half way: is it named rightly, and nothing else?

    python benchmarks/watch_replay.py                       # 6 hours of each fault, and of none: under a minute
    python benchmarks/watch_replay.py --hours 24 --seeds 5

The log is that of results/example/serve, its merged model's 59 requests in 330 s. Windows of 20 s of it follow each
other in a drawn order. The run that decided is made of the same requests. `peftopt watch --once` judges each log.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import replays  # type: ignore[import-not-found]  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=6.0)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        (where / "base").mkdir()
        run = replays.run_of_log(where / "results", where / "base")
        print("| fault | named by | first word after | anything else | before the fault | exit |")
        print("|---|---|---|---|---|---|")
        for name in replays.FAULTS:
            for seed in range(options.seeds):
                print(_row(run, where / "log.jsonl", name, options.hours, seed), flush=True)


def _row(run: Path, log: Path, name: str, hours: float, seed: int) -> str:
    fault, expected = replays.FAULTS[name]
    replays.write(log, replays.replay(hours, fault, seed))
    code, records = watched(run, log)
    begins = replays.BEGINS + 1800 * hours
    alarms = [record for record in records if record["kind"] == "alarm"]
    kinds = {alarm["detector"] for alarm in alarms if alarm["at"] > begins}
    early = sorted({alarm["detector"] for alarm in alarms if alarm["at"] <= begins})
    first = min((alarm["at"] - begins for alarm in alarms if alarm["at"] > begins), default=None)
    after = "—" if first is None else f"{first / 60:.0f} min"
    named, other = sorted(kinds & expected), sorted(kinds - expected)
    cells = [
        name,
        ", ".join(named) or "—",
        after,
        ", ".join(other) or "nothing",
        ", ".join(early) or "nothing",
        str(code),
    ]
    return f"| {' | '.join(cells)} |"


def watched(run: Path, log: Path) -> tuple[int, list[dict[str, Any]]]:
    """The exit code of `peftopt watch --once`, and what it printed."""
    state = log.with_suffix(".state")
    state.unlink(missing_ok=True)
    command = [sys.executable, "-m", "peftopt.cli", "watch", str(run), "--variant", "merged", "--logs", str(log)]
    command += ["--once", "--json", "--state", str(state)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode not in (0, 1, 3):
        raise SystemExit(done.stderr)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    main()
