"""Does any broken file end in a traceback, take long, or take much memory? Files are broken by chance, one at a time.

    python benchmarks/fuzz.py --seconds 60              # as CI does
    python benchmarks/fuzz.py --seconds 3600 --first 100000

Recipes, thresholds, prompts, safetensors files, configs of adapters and models, tokenizers. Exit 1: one of them ended
as none should, took more than 2 s of CPU time, or made the process grow by more than 500 MB.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import fuzzed  # type: ignore[import-not-found]  # noqa: E402
from helpers.tiny_models import make_base, make_lora  # type: ignore[import-not-found]  # noqa: E402

LONG_S = 2.0
MUCH_MB = 500.0


def main() -> int:
    """Print a table and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--files", type=int, default=0, help="how many at most, 0 = all that fit the time")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    asked = parser.parse_args()
    tried: Counter[str] = Counter()
    slowest: dict[str, float] = {}
    wrong = []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        make_base(folder / "b", "bfloat16")
        make_lora(folder / "b", folder / "l")
        (folder / "good").mkdir()
        (folder / "scratch").mkdir()
        good = fuzzed.place(folder / "b", folder / "l", folder / "good")
        fuzzed.checked(good / "tiny.yaml")  # imports are none of a file's
        before, until = peak_mb(), time.monotonic() + asked.seconds
        for kind, said in fuzzed.many(good, folder / "scratch", asked.first):
            tried[kind] += 1
            slowest[kind] = max(slowest.get(kind, 0.0), said.seconds)
            if said.wrong or said.seconds > LONG_S:
                wrong.append(f"{said.what}: {said.wrong or f'{said.seconds:.1f} s'}")
            if time.monotonic() > until or sum(tried.values()) == asked.files:
                break
    grown = peak_mb() - before
    if grown > MUCH_MB:
        wrong.append(f"the process grew by {grown:.0f} MB")
    print("| kind | files | slowest, s of CPU time |\n| --- | --- | --- |")
    for kind, count in tried.items():
        print(f"| {kind} | {count} | {slowest[kind]:.2f} |")
    print(f"\n{sum(tried.values())} files, {len(wrong)} wrong; the process grew by {grown:.0f} MB")
    for line in wrong[:20]:
        print(line, file=sys.stderr)
    return int(bool(wrong))


def peak_mb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
