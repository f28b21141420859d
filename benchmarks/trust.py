"""Worlds that try to fool a verdict, on the records a run leaves: broken models, launches, clocks, families.

    python benchmarks/decision.py --trust            # all of them: some ten minutes on one core
    python benchmarks/decision.py --trust answers    # one of them

Every figure is a share of verdicts with its Monte-Carlo error. What judges is peftopt's own `decide`, on records as the
runner writes them, so the same script can be run on any version.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peftopt.decision.decide import decide
from peftopt.decision.evidence import Evidence
from peftopt.measurements import measured
from peftopt.recipe import plan as planning
from peftopt.recipe.thresholds import parse
from peftopt.records import (
    Decision,
    Measure,
    Measurement,
    Metric,
    Plan,
    Quality,
    Recipe,
    Rule,
    Step,
    Variant,
    Workload,
)

EAGER = Step("eager", "engine", "")
TABLE = (
    Rule("variant", "critical_errors", 0.05),
    Rule("merge", "gain", 0.15),
    Rule("merge", "parity", 0.01),
    Rule("merge", "lost", 0.05),
    Rule("merge", "critical_errors", 0.05),
)
TWIN = "adapter~aa"


def shown(count: int, n: int) -> str:
    """A share in percent and its standard error; of none seen, what is still possible."""
    share = count / n
    error = math.sqrt(share * (1 - share) / n) if 0 < share < 1 else 3 / n
    return f"{share:6.1%} ±{error:.1%}"


def plan_of(
    variants: int, table: tuple[Rule, ...], require: tuple[str, ...] = (), quality: bool = True, **measure: Any
) -> Plan:
    """A plan of so many merges, which differ in nothing that matters here."""
    chains = {"adapter": Variant("adapter", (), EAGER)}
    for n in range(variants):
        name = f"v{n}" if n else "merged"
        chains[name] = Variant(name, (Step("merge", "transform", "merge", {"n": n}),), EAGER)
    recipe = Recipe(
        name="trust",
        path="trust.yaml",
        base="",
        adapter="",
        variants=chains,
        baseline="adapter",
        workloads={"chat": Workload("chat", "prompts.jsonl", 16)},
        quality=Quality("prompts.jsonl") if quality else None,
        calibration=None,
        rules=table,
        require=tuple(map(parse, require)),
        minimize=Metric("latency.p50", "chat"),
        measure=Measure(**{"max_blocks": 60, **measure}),
    )
    return planning.plan(recipe, {"base": "", "adapter": "", "calibration": ""}, {})


def decided(plan: Plan, found: list[Measurement]) -> Decision:
    return decide(Evidence(plan, map(measured, found)), {})


def turn(arm: str, block: int, times_ms: list[float]) -> Measurement:
    requests = [
        {"request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms, "cpu_ms": ms, "new_tokens": 16, "warmup": False}
        for ms in map(float, times_ms)
    ]
    return Measurement("speed", arm, "chat", values={"block": block, "requests": requests})


def launch(arm: str) -> Measurement:
    return Measurement("launch", arm, "chat", values={"model_loading_time": 1.0, "device": "cpu", "threads": 1})


def builds(plan: Plan) -> list[Measurement]:
    ids = ["", *(build.id for build in plan.builds)]
    return [Measurement("build", "", values={"id": i, "size_bytes": 1, "tier0": []}) for i in ids]


def raced(
    rng: np.random.Generator,
    arms: Mapping[str, float],
    blocks: int = 60,
    relaunch: int = 2,
    launch_sd: float = 0.0,
    noise: float = 0.05,
    step_ms: float = 0.0,
    base_ms: float = 50.0,
) -> list[Measurement]:
    """Blocks of three requests: each arm takes its ratio of `base_ms`, on a machine that drifts, with noise of a block,
    an effect of each launch, and a clock that only tells steps apart."""
    found, effect = [], dict.fromkeys(arms, 0.0)
    for block in range(blocks):
        drift = rng.normal(0, 0.05)
        for arm, ratio in arms.items():
            if block % relaunch == 0:
                found.append(launch(arm))
                effect[arm] = rng.normal(0, launch_sd)
            log = math.log(ratio) + drift + effect[arm] + rng.normal(0, noise) + rng.normal(0, noise / 2, 3)
            times = base_ms * np.exp(log)
            if step_ms:
                times = np.maximum(np.floor(times / step_ms), 1) * step_ms
            found.append(turn(arm, block, list(times)))
    return found


def outcome(decision: Decision, variant: str, rule: str) -> str:
    found = next(v for v in decision.variants if v.name == variant)
    return next((v.outcome for v in found.verdicts if v.rule == rule), "no such rule")


# ---- answers -----------------------------------------------------------------------------------

Break = Callable[[np.random.Generator, int, int], int | None]
"""(dice, prompt, tokens) -> the token from which the variant's answer to that prompt is gibberish; None = it is not."""

BROKEN: Mapping[str, Break] = {
    "gibberish from token 5": lambda rng, prompt, tokens: 5,
    "a quarter of prompts from token 3": lambda rng, prompt, tokens: 3 if prompt % 4 == 0 else None,
    "all prompts from 3/4 of the answer": lambda rng, prompt, tokens: tokens * 3 // 4,
}


def answered(
    rng: np.random.Generator,
    variant: str,
    run: int,
    prompts: int,
    tokens: int,
    noise: float,
    scored: str,
    breaks: Break | None = None,
    critical: str = "",
) -> list[Measurement]:
    """One run's answers: each token leaves the adapter's with the chance `noise`, and for good from where it breaks. A
    scored token, at which the model is told what came before, differs with the same chance, one by one. `scored` is
    "yes", "no", or "blind" where the scores do not see that the answers are broken."""
    found = []
    for prompt in range(prompts):
        at = breaks(rng, prompt, tokens) if breaks else None
        parted = int(rng.geometric(noise)) - 1 if noise and run else tokens
        parted = min(parted, tokens if at is None else at)
        said = [*range(parted), *(int(1000 + t) for t in rng.integers(0, 10**6, tokens - parted))]
        wrong = bool(critical) and prompt % 10 == 0
        values: dict[str, Any] = {
            "row": f"p{prompt}",
            "critical": prompt % 10 == 0,
            "slices": ["q" if prompt % 4 == 0 else "r"],
        }
        values |= {"tokens": said, "stopped": True, "new_tokens": tokens + 1, "output": "", "expected": ""}
        flags = [critical] if critical not in ("", "wrong") and wrong else []
        values |= {"correct": not wrong, "valid": True, "score": float(not wrong), "flags": flags}
        if scored != "no":
            odd = int(rng.binomial(tokens, noise)) if run else 0
            odd += int(rng.binomial(tokens - at, 0.9)) if at is not None and scored == "yes" else 0
            values |= {
                "nll": 1.0,
                "scored_tokens": tokens,
                "kl": 0.001,
                "kl_worst": 0.001,
                "agree": tokens - min(odd, tokens),
            }
        found.append(Measurement("quality", variant, "", 1 if run < 2 else 2, values))
    return found


def answers(replications: int) -> Iterator[str]:
    """Whether broken merges are shipped, and faithful ones turned down: 64 prompts, half the adapter's time; broken
    ones a third as often."""
    plan = plan_of(1, TABLE)
    kinds: dict[str, tuple[Break | None, str]] = {"faithful": (None, "")}
    kinds |= {name: (breaks, "") for name, breaks in BROKEN.items()}
    kinds |= {f"critical prompts {what}": (None, what) for what in ("wrong", "empty", "special token")}
    yield f"{'':36} {'tokens':>6} {'noise':>6} {'scored':>6}   shipped           rejected"
    speed = raced(np.random.default_rng(0), {"adapter": 1.0, TWIN: 1.0, "merged": 0.5}, blocks=16, noise=0.01)
    for kind, (breaks, critical) in kinds.items():
        n = replications if kind == "faithful" else max(replications // 3, 1)
        for tokens in (40,) if critical else (40, 200):
            for noise in (0.0, 0.002, 0.01):
                for scored in ("yes", "no", *(["blind"] if breaks else [])):
                    rng, seen = np.random.default_rng(1), Counter[str]()
                    for _ in range(n):
                        common = (64, tokens, noise, scored)
                        found = [m for run in (0, 2) for m in answered(rng, "adapter", run, *common)]
                        found += answered(rng, "merged", 1, *common, breaks, critical)
                        decision = decided(plan, [*builds(plan), *speed, *found])
                        seen[next(v.outcome for v in decision.variants if v.name == "merged")] += 1
                    cells = (shown(seen[o], n) for o in ("accepted", "rejected"))
                    yield f"{kind:36} {tokens:6} {noise:6.1%} {scored:>6}   {'   '.join(cells)}"


# ---- times -------------------------------------------------------------------------------------


def launches(replications: int) -> Iterator[str]:
    """A gain of exactly 15 %, a launch effect as large as the noise of blocks, 60 blocks."""
    for relaunch in (1, 2, 4, 8, 16, 60):
        for gain, said in ((0.15, "accepted"), (0.30, "accepted")):
            plan, rng, seen = (
                plan_of(1, TABLE, quality=False, relaunch=relaunch),
                np.random.default_rng(2),
                Counter[str](),
            )
            for _ in range(replications):
                found = raced(rng, {"adapter": 1.0, "merged": 1 - gain}, relaunch=relaunch, launch_sd=0.05)
                seen[outcome(decided(plan, found), "merged", "merge.gain")] += 1
            yield f"relaunch {relaunch:2}, gain {gain:.0%}: {said} {shown(seen[said], replications)}"


def clocks(replications: int) -> Iterator[str]:
    """A gain of exactly 15 % of 50 ms, on a clock of coarse steps, 60 blocks."""
    for step in (0.0, 1.0, 5.0, 10.0):
        plan, rng, seen = plan_of(1, TABLE, quality=False), np.random.default_rng(3), Counter[str]()
        for _ in range(replications):
            found = raced(rng, {"adapter": 1.0, "merged": 0.85}, step_ms=step)
            seen[outcome(decided(plan, found), "merged", "merge.gain")] += 1
        yield f"steps of {step:4.0f} ms: accepted {shown(seen['accepted'], replications)}"


def quantiles(replications: int) -> Iterator[str]:
    """A limit on a time at its true value, blocks and launches that differ as much as requests do, 60 blocks."""
    draws = np.random.default_rng(4).normal(0, 1, 1_000_000)
    spread = math.sqrt(0.05**2 + 0.05**2 + 0.05**2 + 0.025**2)  # drift, launch, block, request
    for name, q in (("p50", 0.5), ("p95", 0.95)):
        true_ms = 50 * math.exp(spread * float(np.quantile(draws, q)))
        text = f"latency.{name}@chat <= {true_ms:.4f} ms"
        for relaunch in (1, 2, 8):
            plan = plan_of(1, TABLE, (text,), quality=False, relaunch=relaunch)
            rng, seen = np.random.default_rng(5), Counter[str]()
            for _ in range(replications):
                found = raced(rng, {"adapter": 1.0, "merged": 1.0}, relaunch=relaunch, launch_sd=0.05)
                seen[outcome(decided(plan, found), "merged", f"require: {text}")] += 1
            cells = ", ".join(f"{o} {shown(seen[o], replications)}" for o in ("accepted", "rejected"))
            yield f"latency.{name} at its true value, relaunch {relaunch}: {cells}"


def chosen(replications: int) -> Iterator[str]:
    """Whether the interval in the sentence holds the truth of the variant that was chosen among six equal ones."""
    plan, rng, holds, n = plan_of(6, TABLE, quality=False), np.random.default_rng(6), 0, 0
    plan = replace(plan, recipe=replace(plan.recipe, rules=(Rule("merge", "gain", 0.15),)))
    arms = {"adapter": 1.0, **{name: 0.7 for name in plan.recipe.variants if name != "adapter"}}
    for _ in range(replications):
        sentence = decided(plan, [*builds(plan), *raced(rng, arms, blocks=24)]).sentence
        if bounds := re.search(r"x, ([\d.]+) to ([\d.]+)", sentence):
            n += 1
            holds += float(bounds[1]) - 0.005 <= 0.7 <= float(bounds[2]) + 0.005
    yield f"the interval of the chosen of six holds the truth: {shown(holds, max(n, 1))} of {n}"


def families(replications: int) -> Iterator[str]:
    """Any false accept among variants that gain exactly 15 %, 24 blocks."""
    for variants in (1, 4, 12):
        plan, rng, wrong = plan_of(variants, TABLE, quality=False), np.random.default_rng(7), 0
        names = [name for name in plan.recipe.variants if name != "adapter"]
        for _ in range(replications):
            decision = decided(plan, raced(rng, {"adapter": 1.0, **dict.fromkeys(names, 0.85)}, blocks=24))
            wrong += any(outcome(decision, name, "merge.gain") == "accepted" for name in names)
        yield f"{variants:2} variants at exactly 15 %: any accepted {shown(wrong, replications)}"


def accuracy(replications: int) -> Iterator[str]:
    """`accuracy >= 0.95x` for a variant that keeps exactly 95 % of the adapter's right answers."""
    text = "accuracy >= 0.95x"
    for prompts in (5, 10, 20, 60, 200):
        plan, rng, seen = plan_of(1, (), (text,)), np.random.default_rng(8), Counter[str]()
        for _ in range(replications):
            found = [m for run in (0, 2) for m in answered(rng, "adapter", run, prompts, 8, 0.0, "no")]
            for m in answered(rng, "merged", 1, prompts, 8, 0.0, "no"):
                found.append(replace(m, values={**m.values, "correct": bool(rng.uniform() < 0.95), "critical": False}))
            seen[outcome(decided(plan, [*builds(plan), *found]), "merged", f"require: {text}")] += 1
        yield f"{prompts:3} prompts: accepted {shown(seen['accepted'], replications)}"


def loads_apart(replications: int) -> Iterator[str]:
    """12 loads of the adapter on a slow machine and 12 of a copy on a fast one, or both in turn on either."""
    for name, interleaved in (("one after the other", False), ("alternating", True)):
        plan, rng, seen = plan_of(1, TABLE, quality=False), np.random.default_rng(9), Counter[str]()
        for _ in range(replications):
            order = [("adapter", n) for n in range(12)] + [("merged", n) for n in range(12, 24)]
            if interleaved:
                order = [(("adapter", "merged")[n % 2], n) for n in range(24)]
            found = []
            for variant, n in order:
                slow = 1.0 if n >= 12 else 1.5
                requests = turn(variant, 0, list(50 * slow * np.exp(rng.normal(0, 0.02, 8)))).values["requests"]
                timed = [{**r, "scheduled": 0.0, "done": r["request_duration_ms"] / 1e3} for r in requests]
                found.append(Measurement("load", variant, "chat", values={"requests": timed}))
            seen[outcome(decided(plan, found), "merged", "merge.gain")] += 1
        yield f"a copy, loads {name}: accepted {shown(seen['accepted'], replications)}"


WORLDS: Mapping[str, tuple[Callable[[int], Iterator[str]], int]] = {
    "answers": (answers, 300),
    "launches": (launches, 500),
    "clocks": (clocks, 500),
    "quantiles": (quantiles, 500),
    "chosen": (chosen, 300),
    "families": (families, 300),
    "accuracy": (accuracy, 1000),
    "loads": (loads_apart, 200),
}
"""World -> what it simulates, and how often."""


def main(names: list[str], replications: int | None) -> None:
    for name in names or list(WORLDS):
        world, usual = WORLDS[name]
        n = replications or usual
        print(f"\n{name}: {(world.__doc__ or '').strip()} {n} replications a line.", flush=True)
        for line in world(n):
            print(" ", line, flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:], None)
