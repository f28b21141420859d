"""How often a verdict is wrong, right or open: the rules of peftopt on simulated machines, beside the usual ones.

    python benchmarks/decision.py             # the noise worlds: a few minutes on one core
    python benchmarks/decision.py --winner 200   # races for the winner beside races of all variants
    python benchmarks/decision.py --live      # copies of a real engine on this machine, through the real pipeline

A world is log t = variant + drift + slow sine + AR(1) + noisy neighbour (all the machine's), launch effect, jitter and
spikes. The truth is a gain of 12 %, exactly 15 % or 18 %, and the rule "more than 15 % faster". Accepting the first or
rejecting the last is wrong; so is accepting the second more often than a rule's stated error. Every figure comes with
its Monte-Carlo error. What judges is peftopt's own code (stats.race; stopping.blocks in the race of twelve), no copy.

Blocks of one process share its launch effect, so they say less than as many fresh processes: `--relaunch` and
`--launch` show what the usual rules and peftopt's make of it. `--trust` builds worlds that try to fool a verdict
otherwise: broken models, coarse clocks, limits at their true value, many variants (benchmarks/trust.py).

`--live` runs a tiny model against copies of itself, some of which really do 12 % or 18 % more work at every token, and
counts the verdicts of "15 % faster" (of the identical ones) and of "less than 15 % slower" (of the others).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import trust

from peftopt import stats
from peftopt.decision import stopping
from peftopt.decision.decide import decide
from peftopt.decision.evidence import Evidence
from peftopt.decision.rules.table import WINNER, table_verdicts
from peftopt.measurements import Built, Launch, Measured, Request, Turn
from peftopt.recipe import plan as planning
from peftopt.records import (
    TWIN,
    Measure,
    Metric,
    Outcome,
    Plan,
    Recipe,
    Rule,
    Step,
    Variant,
    Workload,
)

ROOT = Path(__file__).resolve().parents[1]
LIMIT = math.log(0.85)
REQUESTS, RUNS, LONGEST = 3, 20, 200


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
    relaunch: int = Measure.relaunch


WORLDS = (
    World("quiet", 0.01, 0.006, 0.005, 0.0, (0.0, 1.0), 0.002, 0.0105, (0.02, 0.05)),
    World("CI", 0.05, 0.03, 0.015, 0.112, (0.1, 0.5), 0.006, 0.025, (0.05, 0.1)),
    World("hostile", 0.1, 0.08, 0.05, 0.24, (0.15, 0.35), 0.012, 0.055, (0.1, 0.2)),
    World("overloaded", 0.3, 0.2, 0.3, 0.85, (0.3, 0.3), 0.05, 0.45, (0.3, 0.6)),
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
    blocks = np.arange(LONGEST)
    process = blocks // world.relaunch
    load = machine(world, 2 * LONGEST, rng).reshape(-1, 2)
    first = rng.integers(0, 2, LONGEST)
    reference = load[blocks, first] + turns(world, process, rng)
    variant = load[blocks, 1 - first] + turns(world, process, rng)
    return reference, variant + math.log1p(-gain)


def sequential(world: World, gain: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log times of all runs of the reference, then all of the variant, each from one launch."""
    load = machine(world, 2 * RUNS, rng)
    one = np.zeros(RUNS, dtype=int)
    variant = load[RUNS:] + turns(world, one, rng) + math.log1p(-gain)
    return load[:RUNS] + turns(world, one, rng), variant


Judge = Callable[[np.ndarray, np.ndarray, int], Outcome]
"""(log times of the reference, of the variant, blocks of a launch) -> what a rule makes of them."""


def launches(blocks: int, relaunch: int) -> list[int]:
    return [block // relaunch for block in range(blocks)]


def medians(reference: np.ndarray, variant: np.ndarray, relaunch: int) -> Outcome:
    gap = np.median(variant[:RUNS]) - np.median(reference[:RUNS])
    return "accepted" if gap < LIMIT else "rejected"


def one_run(reference: np.ndarray, variant: np.ndarray, relaunch: int) -> Outcome:
    return "accepted" if variant[0] - reference[0] < LIMIT else "rejected"


def t_after_every_pair(reference: np.ndarray, variant: np.ndarray, relaunch: int) -> Outcome:
    d = variant - reference
    n = np.arange(1, len(d) + 1)
    centre = np.cumsum(d) / n
    spread = np.sqrt(np.maximum(np.cumsum(d**2) / n - centre**2, 0) / np.maximum(n - 1, 1))
    half = stdtrit(np.maximum(n - 1, 1), 0.975) * spread
    clear = np.flatnonzero((np.abs(centre - LIMIT) > half) & (n >= 5))
    if not len(clear):
        return "inconclusive"
    return "accepted" if centre[clear[0]] < LIMIT else "rejected"


def default(reference: np.ndarray, variant: np.ndarray, relaunch: int) -> Outcome:
    """As a recipe runs by default: up to 60 blocks, and no further than the planner sees a point in."""
    d = variant - reference
    for look in stats.LOOKS:
        if (found := stats.race(d[:look], LIMIT, launches=launches(look, relaunch))).outcome != "inconclusive":
            return found.outcome
        if stats.out_of_reach(d[:look], LIMIT, stats.LOOKS[-1]):
            return "inconclusive"
    return "inconclusive"


def five_looks(reference: np.ndarray, variant: np.ndarray, relaunch: int) -> Outcome:
    last = stats.LOOKS[-1]
    return stats.race((variant - reference)[:last], LIMIT, launches=launches(last, relaunch)).outcome


def resumed(reference: np.ndarray, variant: np.ndarray, relaunch: int) -> Outcome:
    return stats.race(variant - reference, LIMIT, launches=launches(len(variant), relaunch)).outcome


def betting(reference: np.ndarray, variant: np.ndarray, relaunch: int) -> Outcome:
    labels = launches(len(variant), relaunch)
    return stats.race(variant - reference, LIMIT, open_ended=True, launches=labels).outcome


RULES: dict[str, tuple[Callable[..., tuple[np.ndarray, np.ndarray]], Judge]] = {
    "one run each": (interleaved, one_run),
    "median of 20, one after the other": (sequential, medians),
    "median of 20, interleaved": (interleaved, medians),
    "95 % t interval after every pair": (interleaved, t_after_every_pair),
    "peftopt, 60 blocks": (interleaved, five_looks),
    "peftopt, 60 blocks, planner stops": (interleaved, default),
    f"peftopt, --more to {LONGEST} blocks": (interleaved, resumed),
    f"peftopt, open-ended to {LONGEST} blocks": (interleaved, betting),
}
OURS = [name for name in RULES if name.startswith("peftopt")]


@dataclass(frozen=True)
class Counts:
    """Outcomes at a gain of 12, exactly 15 and 18 %, of so many replications each."""

    n: int
    low: Counter[Outcome]
    exact: Counter[Outcome]
    high: Counter[Outcome]

    def shares(self) -> dict[str, tuple[float, int]]:
        """Each share, and how many trials it is of."""
        decided = 2 * self.n - self.low["inconclusive"] - self.high["inconclusive"]
        return {
            "accepts 12 %": (self.low["accepted"] / self.n, self.n),
            "accepts 15 %": (self.exact["accepted"] / self.n, self.n),
            "rejects 18 %": (self.high["rejected"] / self.n, self.n),
            "wrong": ((self.low["accepted"] + self.high["rejected"]) / 2 / self.n, 2 * self.n),
            "right": ((self.low["rejected"] + self.high["accepted"]) / 2 / self.n, 2 * self.n),
            "decided": (decided / 2 / self.n, 2 * self.n),
        }


def simulate(world: World, replications: int, seed: int) -> dict[str, Counts]:
    """What each rule makes of `replications` machines of this world."""
    found: dict[str, list[Counter[Outcome]]] = {name: [] for name in RULES}
    for gain in (0.12, 0.15, 0.18):
        rng = np.random.default_rng([seed, round(gain * 100)])
        drawn = [{how: how(world, gain, rng) for how in (interleaved, sequential)} for _ in range(replications)]
        for name, (how, rule) in RULES.items():
            found[name].append(Counter(rule(*data[how], world.relaunch) for data in drawn))
    return {name: Counts(replications, *counters) for name, counters in found.items()}


def shown(share: float, n: int) -> str:
    """A share and its standard error; 0 of n says no more than "below 3 / n"."""
    error = math.sqrt(share * (1 - share) / n) if 0 < share < 1 else 3 / n
    return f"{share:.2%} ±{error:.2%}"


# ---- several variants in one race --------------------------------------------------------------

VARIANTS, FIXED, RACED = 12, 40, 60
EAGER, COMPILED = Step("eager", "engine", ""), Step("compiled", "engine", "compile")
MERGE, INT8 = Step("merge", "transform", "merge"), Step("int8", "transform", "quantize")
GPTQ, AWQ = Step("gptq", "transform", "quantize"), Step("awq", "transform", "quantize")


def merges(count: int) -> Plan:
    """A plan of so many merges under one rule. What they differ in does not matter here."""
    names = [f"v{n}" for n in range(count)]
    variants = {"adapter": Variant("adapter", (), EAGER)}
    variants |= {name: Variant(name, (Step("merge", "transform", "merge", {"n": name}),), EAGER) for name in names}
    return a_plan(variants, (Rule("merge", "gain", 0.15),), RACED)


DEMO = {"merged": 0.38, "int8": 0.32, "gptq4": 0.19, "awq4": 0.15, "compiled": 0.74, "int8_compiled": 0.71}
"""What each variant of the demo gains."""


def demo() -> Plan:
    """The demo's variants, with its rules on times."""
    chains: dict[str, tuple[Step, ...]] = {
        "adapter": (),
        **{"merged": (MERGE,), "int8": (MERGE, INT8), "gptq4": (MERGE, GPTQ), "awq4": (MERGE, AWQ)},
        **{"compiled": (MERGE,), "int8_compiled": (MERGE, INT8)},
    }
    variants = {
        name: Variant(name, chain, COMPILED if name.endswith("compiled") else EAGER) for name, chain in chains.items()
    }
    quantizers = [Rule(step.plugin, "not_slower", 0.02) for step in (INT8, GPTQ, AWQ)]
    return a_plan(variants, (Rule("merge", "gain", 0.15), Rule("compile", "gain", 0.0), *quantizers), RACED)


def a_plan(variants: dict[str, Variant], table: tuple[Rule, ...], most: int, **measure: Any) -> Plan:
    recipe = Recipe(
        name="decision",
        path="decision.yaml",
        base="",
        adapter="",
        variants=variants,
        baseline="adapter",
        workloads={"chat": Workload("chat", "prompts.jsonl", 16)},
        quality=None,
        calibration=None,
        rules=table,
        require=(),
        minimize=Metric("latency.p50", "chat"),
        measure=replace(Measure(max_blocks=most), **measure),
    )
    return planning.plan(recipe, {"base": "", "adapter": "", "calibration": ""}, {})


Logs = dict[str, np.ndarray]
"""What each arm would take in each block, log time, whether it is run or not."""


def log_times(world: World, gains: dict[str, float], rng: np.random.Generator) -> Logs:
    """Blocks of the baseline and these arms, in random order."""
    truth = {"adapter": 0.0} | {arm: math.log1p(-gain) for arm, gain in gains.items()}
    load = machine(world, RACED * len(truth), rng).reshape(RACED, len(truth))
    process = np.arange(RACED) // world.relaunch
    own = {arm: turns(world, process, rng) for arm in truth}
    order = np.array([rng.permutation(len(truth)) for _ in range(RACED)])
    return {arm: load[np.arange(RACED), order[:, n]] + own[arm] + truth[arm] for n, arm in enumerate(truth)}


def raced(plan: Plan, world: World, logs: Logs) -> list[Measured]:
    """What a run of this plan measures on this machine: the turns that `stopping` asks for, the A/A arm's if it has
    one."""
    seen = [Measured(Built(id=build.id, size_bytes=0, tier0=(), seconds=0, cached=True)) for build in plan.builds]
    hidden = {arm for arm in logs if arm.endswith(TWIN)}
    for block in range(RACED):
        if not (wants := stopping.blocks(Evidence(plan, seen), "chat")):
            break
        for arm in sorted(wants | hidden):
            if block % world.relaunch == 0:
                seen.append(Measured(Launch(model_loading_time=1.0), arm, "chat"))
            ms = 100 * math.exp(logs[arm][block])
            request = Request(request_duration_ms=ms, ttft_ms=ms, tpot_ms=ms, cpu_ms=ms, new_tokens=16, warmup=False)
            seen.append(Measured(Turn(block=block, requests=(request,)), arm, "chat"))
    return seen


def turns_of(seen: list[Measured]) -> list[tuple[str, Turn]]:
    """The turns among these measurements, each with its arm."""
    return [(each.variant, each.values) for each in seen if isinstance(each.values, Turn)]


def race_of_twelve(plan: Plan, world: World, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(turns run, undecided, wrong) of the race, and undecided of a fixed design of 40 blocks on the same machine."""
    gains = {f"v{n}": gain for n, gain in enumerate(rng.uniform(0, 0.35, VARIANTS))}
    logs = log_times(world, gains, rng)
    seen = raced(plan, world, logs)
    evidence = Evidence(plan, seen)
    found = {v: table_verdicts(evidence, plan.recipe.variants[v])[0].outcome for v in gains}
    wrong = sum(found[v] == ("rejected" if math.log1p(-gain) < LIMIT else "accepted") for v, gain in gains.items())
    level = 1 - stats.ALPHA / VARIANTS
    intervals = (stats.hodges_lehmann((logs[v] - logs["adapter"])[:FIXED], level) for v in gains)
    fixed = sum(stats.judge(i, LIMIT) == "inconclusive" for i in intervals)
    return len(turns_of(seen)), list(found.values()).count("inconclusive"), wrong, fixed


# ---- a race for the winner ---------------------------------------------------------------------

DESIGNS: dict[str, tuple[Callable[[], Plan], dict[str, float]]] = {
    "the demo's variants and rules": (demo, DEMO),
    "the demo's gains, each a merge's": (partial(merges, len(DEMO)), {f"v{n}": g for n, g in enumerate(DEMO.values())}),
    "six merges, 2 % apart": (partial(merges, 6), {f"v{n}": 0.30 - 0.02 * n for n in range(6)}),
    "six merges that gain the same": (partial(merges, 6), {f"v{n}": 0.30 for n in range(6)}),
}
"""Plans, and what their variants gain."""


@dataclass(frozen=True)
class Ended:
    """How a race ended: its turns, the seconds that they take, the choice, the variants that were left open for it, and
    the verdicts of the others."""

    turns: int
    seconds: float
    chosen: str | None
    beaten: frozenset[str]
    outcomes: dict[str, Outcome]


def ended(plan: Plan, world: World, logs: Logs, race: str) -> Ended:
    """The race of `all` or for the `winner` on one machine."""
    recipe = replace(plan.recipe, measure=replace(plan.recipe.measure, race=race))
    asked = replace(plan, recipe=recipe)
    seen = raced(asked, world, logs)
    decision = decide(Evidence(asked, seen), {})
    lost = frozenset(v.name for v in decision.variants if v.decided_by == WINNER)
    outcomes = {v.name: v.outcome for v in decision.variants if v.name not in lost}
    requests = [request for _, turn in turns_of(seen) for request in turn.requests]
    seconds = sum(request.request_duration_ms or 0.0 for request in requests) / 1e3
    return Ended(len(turns_of(seen)), seconds, decision.chosen, lost, outcomes)


def for_the_winner(world: World, races: int, seed: int) -> None:
    """What a race for the winner saves on the same machines, and how often it chooses another variant."""
    for n, (name, (plan, gains)) in enumerate(DESIGNS.items()):
        pairs = []
        for number in range(races):
            rng = np.random.default_rng([seed, n, number])
            logs = log_times(world, {"adapter" + TWIN: 0.0, **gains}, rng)
            pairs.append([ended(plan(), world, logs, race) for race in ("all", "winner")])
        told(name, gains, pairs)


def told(name: str, gains: dict[str, float], pairs: list[list[Ended]]) -> None:
    """Print what pairs of races (of all, for the winner) come to."""
    best = {variant for variant, gain in gains.items() if gain == max(gains.values())}
    n = len(pairs)
    print(f"\n{name}, {n} races of at most {RACED} blocks, each for all and for the winner:")
    for what in ("turns", "seconds"):
        left = np.array([getattr(winner, what) / getattr(all_, what) for all_, winner in pairs])
        mean = np.mean([[getattr(each, what) for each in pair] for pair in pairs], axis=0)
        saves = f"{1 - left.mean():.1%} ±{left.std() / math.sqrt(n):.1%}"
        print(f"  {what}: {mean[0]:.4g} and {mean[1]:.4g}: saves {saves}")
    for label, which in (("all", 0), ("the winner", 1)):
        wrong = sum(pair[which].chosen is not None and pair[which].chosen not in best for pair in pairs)
        none = sum(pair[which].chosen is None for pair in pairs)
        print(f"  race for {label}: not the fastest {shown(wrong / n, n)}, none chosen {shown(none / n, n)}")
    other = sum(all_.chosen != winner.chosen for all_, winner in pairs)
    lost = sum(len(winner.beaten) for _, winner in pairs)
    best_lost = sum(len(winner.beaten & best) for _, winner in pairs)
    changed = sum(all_.outcomes.get(v) != o for all_, winner in pairs for v, o in winner.outcomes.items())
    print(f"  another choice {shown(other / n, n)}; left open {lost / n:.2f} of {len(gains)} variants,")
    print(f"  of the fastest {best_lost} of {n * len(best)}; other verdicts {changed}")


def beaten_by_equals(world: World, replications: int, seed: int) -> tuple[float, float]:
    """How often a variant that is as fast as five others is ever beaten by one of them, over all looks and bets, and
    its standard error: the stated error is below 1 %."""
    gains = dict.fromkeys((f"v{n}" for n in range(6)), 0.3)
    labels = launches(RACED, world.relaunch)
    shares = []
    for number in range(replications):
        logs = log_times(world, gains, np.random.default_rng([seed, number]))
        lost: set[str] = set()
        for one, other in itertools.combinations(gains, 2):
            outcome = stats.race(logs[one] - logs[other], 0.0, len(gains), launches=labels).outcome
            lost |= {one} if outcome == "rejected" else {other} if outcome == "accepted" else set()
        shares.append(len(lost) / len(gains))
    return float(np.mean(shares)), float(np.std(shares)) / math.sqrt(replications)


# ---- this machine, live ------------------------------------------------------------------------

SLOWED = '''
"""Makes the eager engine of a worker do more work at every token, if its parameters say so. Only benchmarks use it."""
import dataclasses, importlib, time

real = importlib.import_module


def import_module(name, package=None):
    found = real(name, package)
    if name == "peftopt.engines.eager" and not hasattr(found, "Slowed"):
        slow_down(found)
    return found


def slow_down(eager):
    @dataclasses.dataclass(frozen=True)
    class Slowed(eager.Params):
        slowdown: float = 0.0

    class Clock(eager._Clock):
        def __init__(self):
            super().__init__()
            self.last = time.process_time_ns()

        def put(self, value):
            until = time.process_time_ns()
            until += (until - self.last) * share[0]
            while time.process_time_ns() < until:
                pass
            super().put(value)
            self.last = time.process_time_ns()

    def open(model, params):
        share[0] = params.slowdown
        return opened(model, params)

    share, opened = [0.0], eager.open
    eager.Slowed, eager.Params, eager._Clock, eager.open = Slowed, Slowed, Clock, open


importlib.import_module = import_module
'''


class Silent:
    """A listener that keeps the warnings."""

    def done(self, *_: object, **__: object) -> None: ...
    def warn(self, text: str) -> None: ...
    def tell(self, text: str) -> None: ...
    def progress(
        self, title: str, total: int, unit: str
    ) -> contextlib.AbstractContextManager[Callable[[int, str], None]]:
        return contextlib.nullcontext(lambda done, what: None)


def live(rounds: int, most: int, clock: str, seed: int) -> None:
    """Copies of a tiny model and its adapter, raced on this machine; the slowed ones spin for a share of each token."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_base, make_lora  # type: ignore[import-not-found]

    from peftopt.decision.decide import decide
    from peftopt.runner import recipe_run

    def arm(technique: str, n: int, slowdown: float) -> Variant:
        name = f"{technique}-{n}"
        params = {"device": "cpu", "slowdown": slowdown + n * 1e-9}  # two variants are never the same chain
        return Variant(name, (), Step("eager", "engine", technique, params))

    baseline = Variant("adapter", (), Step("eager", "engine", "", {"device": "cpu"}))
    kinds = {"identical": ("gain", 0.0), "slowed 12 %": ("not_slower", 0.12), "slowed 18 %": ("not_slower", 0.18)}
    right: dict[str, Outcome] = {"identical": "rejected", "slowed 12 %": "accepted", "slowed 18 %": "rejected"}
    names = {kind: re.sub("[^a-z0-9]", "", kind) for kind in kinds}
    variants = [arm(names[kind], n, slowdown) for kind, (_, slowdown) in kinds.items() for n in range(2)]
    table = tuple(Rule(names[kind], rule, 0.15) for kind, (rule, _) in kinds.items())
    outcomes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    withheld: Counter[str] = Counter()
    warned: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "base", "bfloat16")
        make_lora(folder / "base", folder / "lora")
        (folder / "sitecustomize.py").write_text(SLOWED)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        lines = (f'{{"id": "{n}", "prompt": "the lazy dog counts {n} stars"}}\n' for n in range(40))
        (folder / "prompts.jsonl").write_text("".join(lines))
        measure = {"requests": 3, "relaunch": most, "threads": 1, "clock": clock}
        plan = a_plan({v.name: v for v in (baseline, *variants)}, table, most, **measure)
        chat = Workload("chat", str(folder / "prompts.jsonl"), 16)
        recipe = replace(plan.recipe, base=str(folder / "base"), adapter=str(folder / "lora"), workloads={"chat": chat})
        print(f"{rounds} rounds of up to {most} blocks raced on the {clock} clock, judged on both", flush=True)
        for number in range(rounds):
            seeded = replace(recipe, seed=seed + number)
            with recipe_run.prepare(seeded, "", folder / "results", Silent(), fresh=True) as run:
                recipe_run.execute(run)
            moments = [moment for each in run.evidence.machine.values() for moment in each]
            loads = [moment.load for moment in moments if moment.load is not None]
            print(f"\nround {number + 1}: load average {min(loads):.1f} to {max(loads):.1f}")
            for judge in ("wall", "cpu"):
                judged = replace(run.recipe, measure=replace(run.recipe.measure, clock=judge))
                decision = decide(Evidence(replace(run.plan, recipe=judged), run.measurements), {})
                withheld[judge] += any("A/A" in warning for warning in decision.warnings)
                warned.update({re.sub("[0-9.]+", "N", warning): 1 for warning in decision.warnings})
                for kind, (rule, _) in kinds.items():
                    verdicts = (v for d in decision.variants for v in d.verdicts)
                    found = [v.outcome for v in verdicts if v.rule == f"{names[kind]}.{rule}"]
                    said = ("right" if o == right[kind] else "open" if o == "inconclusive" else "wrong" for o in found)
                    outcomes[kind, judge].update(said)
            print(f"{'so far':18}{'right':>8}{'wrong':>8}{'open':>8}   clock")
            for (kind, judge), counts in outcomes.items():
                print(f"{kind:18}{counts['right']:>8}{counts['wrong']:>8}{counts['open']:>8}   {judge}", flush=True)
    print(f"\nthe A/A arm withheld every accept in {dict(withheld)} of {rounds} rounds; warnings of both:")
    for warning, n in warned.most_common(5):
        print(f"  {n}x {warning}")


# ---- the tables --------------------------------------------------------------------------------


def goals(found: dict[str, dict[str, Counts]]) -> Iterator[tuple[str, str, float, int, bool]]:
    """The rows of "What must hold": (goal, figure asked for, what was found, of how many, whether it holds)."""
    looks, more, bets = (OURS[n] for n in (0, 2, 3))

    def share(world: str, rule: str, which: str) -> tuple[float, int]:
        return found[world][rule].shares()[which]

    for rule, most in ((bets, 0.01), (looks, 0.015), (more, 0.015)):
        for world in found:
            value, n = share(world, rule, "accepts 15 %")
            yield f"false accept at exactly 15 %, {world}, {rule}", f"<= {most:.1%}", value, n, value <= most
    wanted = [
        ("CI", looks, "wrong", 0.0015, "<="),
        ("CI", looks, "decided", 0.99, ">="),
        ("hostile", bets, "right", 0.85, ">="),
        ("hostile", bets, "wrong", 0.0015, "<="),
        ("hostile", more, "right", 0.85, ">="),
        ("hostile", more, "wrong", 0.0015, "<="),
        ("overloaded", looks, "wrong", 0.01, "<="),
        ("overloaded", bets, "wrong", 0.01, "<="),
    ]
    for world, rule, which, limit, op in wanted:
        if world in found:
            value, n = share(world, rule, which)
            holds = value <= limit if op == "<=" else value >= limit
            yield f"{which}, true 12 or 18 %, {world}, {rule}", f"{op} {limit:.2%}", value, n, holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--races", type=int, default=60, help="races of twelve variants")
    parser.add_argument("--winner", type=int, default=0, help="instead: so many races for the winner a design, and all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", action="append", choices=[w.name for w in WORLDS], help="default: all")
    parser.add_argument("--relaunch", type=int, default=Measure.relaunch, help="blocks between fresh processes")
    parser.add_argument("--launch", type=float, default=1.0, help="factor on every launch effect")
    parser.add_argument("--live", action="store_true", help="race copies of a real engine on this machine")
    parser.add_argument("--rounds", type=int, default=8, help="of --live")
    parser.add_argument("--blocks", type=int, default=16, help="most of each round of --live", choices=stats.LOOKS)
    parser.add_argument("--clock", choices=["wall", "cpu", "auto"], default="wall", help="of --live")
    parser.add_argument("--trust", nargs="*", choices=list(trust.WORLDS), help="worlds that try to fool a verdict")
    options = parser.parse_args()
    if options.trust is not None:
        trust.main(options.trust, options.replications if "--replications" in sys.argv else None)
        return
    if options.live:
        live(options.rounds, options.blocks, options.clock, options.seed)
        return
    began, found = time.monotonic(), {}
    worlds = [replace(w, relaunch=options.relaunch, launch=w.launch * options.launch) for w in WORLDS]
    if options.winner:
        for world in (w for w in worlds if not options.world or w.name in options.world):
            beaten, sd = beaten_by_equals(world, options.replications, options.seed)
            print(f"\n{world.name}: one of six equal variants is ever beaten: {beaten:.2%} ±{sd:.2%} (stated: < 1 %)")
            for_the_winner(world, options.winner, options.seed)
        print(f"\n{time.monotonic() - began:.0f} s")
        return
    for world in (w for w in worlds if not options.world or w.name in options.world):
        rng = np.random.default_rng(options.seed)
        gaps = [np.std(np.subtract(*interleaved(world, 0.15, rng))) for _ in range(100)]
        found[world.name] = simulate(world, options.replications, options.seed)
        print(f"\n{world.name}: paired log-ratio sd {np.mean(gaps):.3f}")
        columns = ("accepts 12 %", "accepts 15 %", "rejects 18 %", "decided")
        print(f"{'rule':38}" + "".join(f"{column:>17}" for column in columns))
        for name, counts in found[world.name].items():
            print(f"{name:38}" + "".join(f"{shown(*counts.shares()[column]):>17}" for column in columns), flush=True)
    print(f"\n{'what must hold':74}{'asked':>11}{'found':>17}")
    for goal, asked, value, n, holds in goals(found):
        print(f"{goal:74}{asked:>11}{shown(value, n):>17}  {'yes' if holds else 'NO'}")
    if options.races:
        rng, plan = np.random.default_rng(options.seed), merges(VARIANTS)
        raced = np.array([race_of_twelve(plan, worlds[1], rng) for _ in range(options.races)])
        share = raced[:, 0] / (FIXED * (VARIANTS + 1))
        error = share.std() / math.sqrt(len(share))
        print(f"\ntwelve variants, gains of 0 to 35 %, CI, {options.races} races of at most {RACED} blocks:")
        print(f"  turns of a fixed design's of {FIXED} blocks: {share.mean():.0%} ±{error:.1%} (asked: 75 % at most)")
        print(f"  undecided of {VARIANTS}: {raced[:, 1].mean():.2f}; by the fixed design {raced[:, 3].mean():.2f}")
        print(f"  wrong: {raced[:, 2].sum()} of {VARIANTS * options.races} verdicts")
    print(f"\n{options.replications} replications a cell, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
