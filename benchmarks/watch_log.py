"""What reading the log of `peftopt serve` costs: seconds, and memory at its peak.

Writes lines like those of a real log (results/example/serve): 20 adapters, an hour of traffic for each million lines,
some failures and checks. Then a process of its own reads their windows, each as `peftopt watch` does. Beside it, what
decoding the lines alone takes with msgspec and with orjson. Run: python benchmarks/watch_log.py --lines 1000000
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "results" / "example" / "serve" / "requests.jsonl"
PER_HOUR = 1_000_000
ADAPTERS = 20
WINDOW_S = 60.0
BEGAN_MS = 1.8e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read(arguments.read)
    elif arguments.decode:
        decode(arguments.decode)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "requests.jsonl"
            write(path, arguments.lines)
            print(f"{arguments.lines:,} lines, {path.stat().st_size / 1e6:,.0f} MB")
            for task in ("--read", "--decode"):
                subprocess.run([sys.executable, __file__, task, str(path)], check=True)


def write(path: Path, count: int) -> None:
    """A log of so many lines, in the order in which requests end."""
    import orjson

    from peftopt.loadtest.arrivals import SERVE_CHECK

    examples = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]
    dice = random.Random(0)
    ended_ms = BEGAN_MS
    with path.open("wb") as file:
        for number in range(count):
            ended_ms += dice.expovariate(PER_HOUR / 3.6e6)
            adapter = f"adapter-{dice.randrange(ADAPTERS)}"
            if number % 10_000 == 9_999:
                line = {"kind": SERVE_CHECK, "timestamp": round(ended_ms, 3), "adapter": adapter, "version": "v"}
                line |= {"verdict": "own", "distance": 0.4}
            else:
                line = _request(dice.choice(examples), adapter, ended_ms, dice)
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def _request(example: dict[str, object], adapter: str, ended_ms: float, dice: random.Random) -> dict[str, object]:
    slower = dice.lognormvariate(0, 0.3)
    times = ("request_duration_ms", "generation_latency_ms", "ttft_ms", "tpot_ms", "gaps_p95_ms")
    line = {**example, **{name: round(float(str(example[name])) * slower, 3) for name in times}}
    line |= {"request_id": f"{dice.getrandbits(128):032x}", "model": adapter, "adapter": adapter}
    line["timestamp"] = round(ended_ms - float(str(line["request_duration_ms"])), 3)
    if dice.random() < 0.01:
        line |= {"status": 504, "finish": "", "error": "no token for 30 s", "error_kind": "timeout_first"}
    return line


def read(path: Path) -> None:
    """Seconds and memory of all windows."""
    from peftopt.watch.promise import Lengths, Promise
    from peftopt.watch.sources.log import Log

    promise = Promise("run", "variant", beside=4, prompt_tokens=Lengths(100, 160, 0.1, 0.1))
    began, cpu = time.perf_counter(), time.process_time()
    log = Log([path], promise, WINDOW_S)
    windows = sum(1 for _ in log.read()) + len(log.flush())
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"read in {seconds:.1f} s ({cpu_s:.1f} s of CPU), {peak:.0f} MiB at the peak: {windows} windows", end=", ")
    print(f"{log.lines:,} lines, {log.left_out.total()} left out")


def decode(path: Path) -> None:
    """CPU seconds that decoding takes, with nothing else."""
    import orjson

    from peftopt.watch.sources import lines

    decoders: dict[str, Callable[[bytes], object]] = {"msgspec": lines.decode, "orjson": orjson.loads}
    with path.open("rb") as file:
        some = [line for line, _ in zip(file, range(100_000), strict=False)]
    for name, decoder in decoders.items():
        cpu = time.process_time()
        for line in some:
            decoder(line)
        print(f"decoding a million lines with {name}: {1e6 * (time.process_time() - cpu) / len(some):.1f} s of CPU")


if __name__ == "__main__":
    main()
