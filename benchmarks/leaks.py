"""Is a leak told from steps, waves, caches and noise, and does our server leak?

    python benchmarks/leaks.py --series 200                   # simulated series of each shape, clean and with a leak
    python benchmarks/leaks.py --cycles 200                   # our server on a tiny model
    python benchmarks/leaks.py --cycles 200 --base DIR --adapter DIR --adapter DIR [--engine vllm]

The judge of `peftopt diagnose` and its cycles are what is run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from peftopt.diagnose.unloading import cycled, cycles, leaks, soaking  # noqa: E402
from peftopt.loadtest.protocols import Prompt  # noqa: E402

MB = 2.0**20
BEFORE = 200 * MB
LONGEST = leaks.LOOKS[-1]
LEAKS = (0.0, 0.25 * MB, MB)
"""Bytes a cycle that are planted."""

Series = np.typing.NDArray[np.float64]


def noise(dice: np.random.Generator, spread: float, alike: float = 0.0) -> Series:
    """An autoregressive series of that spread, whose neighbours are `alike` (0 to 1)."""
    series = dice.normal(0, spread * np.sqrt(1 - alike**2), LONGEST + 1)
    for at in range(1, len(series)):
        series[at] += alike * series[at - 1]
    return series


def steps(dice: np.random.Generator) -> Series:
    """An allocator that grows by 2 to 8 MB in one of fifty cycles."""
    return np.asarray(np.cumsum((dice.random(LONGEST + 1) < 0.02) * dice.uniform(2, 8, LONGEST + 1) * MB), dtype=float)


def wave(dice: np.random.Generator, period: int) -> Series:
    """A collector that comes by after so many cycles of 1 MB."""
    return np.asarray((np.arange(LONGEST + 1) + dice.integers(period)) % period * MB, dtype=float)


def cache(slots: int) -> Series:
    """A cache of so many adapters of 4 MB."""
    return np.asarray(np.minimum(np.arange(LONGEST + 1), slots) * 4 * MB, dtype=float)


SHAPES: Mapping[str, Callable[[np.random.Generator], Series]] = {
    "noise of 20 KB": lambda dice: noise(dice, 20e3),
    "noise of 150 KB": lambda dice: noise(dice, 150e3),
    "noise of 200 KB, neighbours alike": lambda dice: noise(dice, 200e3, 0.8),
    "noise of 1 MB": lambda dice: noise(dice, MB),
    "noise of 3 MB": lambda dice: noise(dice, 3 * MB),
    "steps in noise of 3 MB": lambda dice: noise(dice, 3 * MB) + steps(dice),
    "steps": lambda dice: noise(dice, 20e3) + steps(dice),
    "waves of 5 cycles": lambda dice: noise(dice, 20e3) + wave(dice, 5),
    "waves of 12 cycles": lambda dice: noise(dice, 20e3) + wave(dice, 12),
    "waves of 40 cycles": lambda dice: noise(dice, 20e3) + wave(dice, 40),
    "a cache of 4": lambda dice: noise(dice, 20e3) + cache(4),
    "a cache of 40": lambda dice: noise(dice, 20e3) + cache(40),
}


def series(runs: int) -> None:
    """What is said of each shape, with each leak on top."""
    for name, shape in SHAPES.items():
        for leak in LEAKS:
            said, needed = Counter[str](), []
            for run in range(runs):
                levels = BEFORE + shape(np.random.default_rng(run)) + np.arange(LONGEST + 1) * leak
                looks = (leaks.decided(list(levels[: look + 1])) for look in leaks.LOOKS)
                kept = next(each for each in looks if each)
                said[kept.outcome] += 1
                needed.append(kept.cycles)
            told = ", ".join(f"{count} {outcome}" for outcome, count in said.most_common())
            print(f"{name}, {leak / MB:g} MB a cycle: {told}; {np.mean(needed):.0f} cycles")


def real(count: int, base: Path, adapters: list[Path], engine: str, threads: int) -> None:
    """Cycles on a server, as many as are asked for whatever they show."""
    prompts = [Prompt(messages=({"role": "user", "content": text},)) for text in soaking.QUESTIONS]
    with soaking.engine(base, adapters, engine, threads, Path(tempfile.mkdtemp())) as server:
        began = time.monotonic()
        patient = cycles.Limits(300, 300, 300)
        seen = asyncio.run(cycles.cycles(server, adapters, prompts, 1e9, show, patient, most=count, early=False))
        seconds = time.monotonic() - began
    levels = " ".join(f"{level / 1e6:.1f}" for level in seen.host)
    print(f"{seen.cycles} cycles in {seconds:.0f} s; MB at rest: {levels}")
    for look in [look for look in leaks.LOOKS if look < seen.cycles]:
        print(f"after {look} cycles: {leaks.judge(seen.host[: look + 1])}")
    for row in cycled.rows(seen):
        print(f"{row.part}: {row.finding}: {row.sentence}")


def show(done: int, how: str) -> None:
    """Now and then a line."""
    if done % 20 == 0:
        print(f"  {done} cycles, {how}", file=sys.stderr, flush=True)


def main() -> None:
    """Do what the options ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--series", type=int, default=0)
    parser.add_argument("--cycles", type=int, default=0)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path, action="append", default=[])
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.series:
        series(options.series)
    if options.cycles:
        from helpers.tiny_models import make_base, make_lora  # type: ignore[import-not-found]

        with tempfile.TemporaryDirectory() as folder:
            base, adapters = options.base or Path(folder, "base"), list(options.adapter)
            if options.base is None:
                make_base(base, "float32")
            while len(adapters) < 2:
                adapters.append(Path(folder, f"made {len(adapters)}"))
                make_lora(base, adapters[-1], std=0.05, r=8 * len(adapters))
            real(options.cycles, base, adapters, options.engine, options.threads)


if __name__ == "__main__":
    main()
