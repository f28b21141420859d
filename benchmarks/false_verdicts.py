"""How often each way of judging "more than 15 % faster" is wrong, on simulated machines.

    python benchmarks/false_verdicts.py --replications 2000

A world is log t = variant + drift + slow sine + AR(1) + noisy neighbour (all the machine's), launch effect,
jitter and spikes. The truth is a gain of 12 %, exactly 15 % or 18 %. Accepting the first or rejecting the
last is wrong; so is accepting the second more often than a rule's stated error.

Blocks of one process share its launch effect, so they say less than as many fresh processes, and no rule here
knows which blocks do: `--relaunch` and `--launch` show how far the error grows with it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peftopt import stats
from peftopt.records import Outcome

LIMIT = math.log(0.85)
REQUESTS, RUNS = 3, 20


@dataclass(frozen=True)
class World:
    """Standard deviations and shifts of log time.

    `busy` is the chance per turn that the neighbour arrives and that it leaves; `spikes` the chance and mean
    size per request; `relaunch` the blocks between fresh processes.
    """

    name: str
    drift: float
    sine: float
    wander: float
    neighbour: float
    busy: tuple[float, float]
    launch: float
    jitter: float
    spikes: tuple[float, float]
    blocks: int = 60
    relaunch: int = 5


WORLDS = (
    World("quiet", 0.01, 0.006, 0.005, 0.0, (0.0, 1.0), 0.002, 0.0105, (0.02, 0.05)),
    World("CI", 0.05, 0.03, 0.015, 0.112, (0.1, 0.5), 0.006, 0.025, (0.05, 0.1)),
    World("hostile", 0.1, 0.08, 0.05, 0.24, (0.15, 0.35), 0.012, 0.055, (0.1, 0.2), blocks=200),
    World("overloaded", 0.3, 0.2, 0.3, 0.85, (0.3, 0.3), 0.05, 0.45, (0.3, 0.6), blocks=200),
)
"""The neighbour that comes and goes between turns makes the tails."""


def machine(world: World, turns: int, rng: np.random.Generator) -> np.ndarray:
    """What the machine adds to the log time of each of its turns."""
    when = np.arange(turns)
    drift = rng.uniform(-world.drift, world.drift) * when / 120
    sine = world.sine * np.sin(2 * math.pi * (when / rng.uniform(30, 90) + rng.uniform()))
    wander, neighbour = np.empty(turns), np.empty(turns)
    arrives, leaves = world.busy
    state, busy = rng.normal(), rng.uniform() < arrives / (arrives + leaves)
    for turn, (shock, chance) in enumerate(zip(rng.normal(size=turns), rng.uniform(size=turns), strict=True)):
        state = 0.9 * state + math.sqrt(1 - 0.81) * shock
        busy = chance >= leaves if busy else chance < arrives
        wander[turn], neighbour[turn] = state, busy
    return drift + sine + world.wander * wander + world.neighbour * neighbour


def turns(world: World, launches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The median of a turn's requests without the machine; `launches` numbers the process of each turn."""
    effect = world.launch * rng.normal(size=launches.max() + 1)[launches]
    shape = (len(launches), REQUESTS)
    chance, size = world.spikes
    spikes = (rng.uniform(size=shape) < chance) * rng.exponential(size, shape)
    result: np.ndarray = effect + np.median(world.jitter * rng.normal(size=shape) + spikes, axis=1)
    return result


def interleaved(world: World, gain: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log times of the reference and the variant in blocks of random order."""
    blocks = np.arange(world.blocks)
    process = blocks // world.relaunch
    load = machine(world, 2 * world.blocks, rng).reshape(-1, 2)
    first = rng.integers(0, 2, world.blocks)
    reference = load[blocks, first] + turns(world, process, rng)
    variant = load[blocks, 1 - first] + turns(world, process, rng)
    return reference, variant + math.log1p(-gain)


def sequential(world: World, gain: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log times of all runs of the reference, then all of the variant, each from one launch."""
    load = machine(world, 2 * RUNS, rng)
    one = np.zeros(RUNS, dtype=int)
    variant = load[RUNS:] + turns(world, one, rng) + math.log1p(-gain)
    return load[:RUNS] + turns(world, one, rng), variant


Rule = Callable[[np.ndarray, np.ndarray], Outcome]


def medians(reference: np.ndarray, variant: np.ndarray) -> Outcome:
    gap = np.median(variant[:RUNS]) - np.median(reference[:RUNS])
    return "accepted" if gap < LIMIT else "rejected"


def one_run(reference: np.ndarray, variant: np.ndarray) -> Outcome:
    return "accepted" if variant[0] - reference[0] < LIMIT else "rejected"


def t_after_every_pair(reference: np.ndarray, variant: np.ndarray) -> Outcome:
    d = variant - reference
    n = np.arange(1, len(d) + 1)
    centre = np.cumsum(d) / n
    spread = np.sqrt(np.maximum(np.cumsum(d**2) / n - centre**2, 0) / np.maximum(n - 1, 1))
    half = stdtrit(np.maximum(n - 1, 1), 0.975) * spread
    clear = np.flatnonzero((np.abs(centre - LIMIT) > half) & (n >= 5))
    if not len(clear):
        return "inconclusive"
    return "accepted" if centre[clear[0]] < LIMIT else "rejected"


def five_looks(reference: np.ndarray, variant: np.ndarray) -> Outcome:
    return stats.race(variant - reference, LIMIT).outcome


def betting(reference: np.ndarray, variant: np.ndarray) -> Outcome:
    return stats.bet(variant - reference, LIMIT).outcome


RULES: dict[str, tuple[Callable[..., tuple[np.ndarray, np.ndarray]], Rule]] = {
    "one run each": (interleaved, one_run),
    "median of 20, one after the other": (sequential, medians),
    "median of 20, interleaved": (interleaved, medians),
    "95 % t interval after every pair": (interleaved, t_after_every_pair),
    "five looks, exact interval": (interleaved, five_looks),
    "betting": (interleaved, betting),
}


def rows(world: World, replications: int, seed: int) -> Iterator[tuple[str, list[float]]]:
    """How often each rule accepts 12 %, accepts 15 %, rejects 18 %, and decides when it is 12 or 18 %."""
    outcomes = {}
    ways = (interleaved, sequential)
    for gain in (0.12, 0.15, 0.18):
        rng = np.random.default_rng([seed, round(gain * 100)])
        drawn = [{how: how(world, gain, rng) for how in ways} for _ in range(replications)]
        for name, (how, rule) in RULES.items():
            outcomes[name, gain] = [rule(*data[how]) for data in drawn]
    for name in RULES:
        low, exact, high = (outcomes[name, gain] for gain in (0.12, 0.15, 0.18))
        shares = [low.count("accepted"), exact.count("accepted"), high.count("rejected")]
        undecided = (low + high).count("inconclusive") / (2 * replications)
        yield name, [share / replications for share in shares] + [1 - undecided]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", action="append", choices=[w.name for w in WORLDS], help="default: all")
    parser.add_argument("--relaunch", type=int, default=5, help="blocks between fresh processes")
    parser.add_argument("--launch", type=float, default=1.0, help="factor on every launch effect")
    options = parser.parse_args()
    began = time.monotonic()
    for world in WORLDS:
        if options.world and world.name not in options.world:
            continue
        world = replace(world, relaunch=options.relaunch, launch=world.launch * options.launch)
        rng = np.random.default_rng(options.seed)
        gaps = [np.std(np.subtract(*interleaved(world, 0.15, rng))) for _ in range(100)]
        print(f"\n{world.name}: paired log-ratio sd {np.mean(gaps):.3f}, up to {world.blocks} blocks")
        print(f"{'rule':36}{'accepts 12 %':>14}{'accepts 15 %':>14}{'rejects 18 %':>14}{'decided':>10}")
        for name, (low, exact, high, decided) in rows(world, options.replications, options.seed):
            print(f"{name:36}{low:>14.2%}{exact:>14.2%}{high:>14.2%}{decided:>10.1%}")
    print(f"\n{options.replications} replications a cell, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
