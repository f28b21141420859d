"""How often is a gate wrong? On simulated runs, hundreds of them; and on this machine, with the demo's model.

    python benchmarks/gate.py                     # simulated: a minute or two on one core
    python benchmarks/gate.py --live results/gates    # 40 real gates; stopped, the same command goes on from there

Simulated: pairs of runs, one accepted and one gated, through peftopt's own gate (gate.judging). Their speed is that of
benchmarks/decision.py's machines, in fresh processes every block. Their answers are those of adapters that lose and win
some prompts. What is not worse must not fail, what is worse by the tolerance must not pass, each in 1 % at most.

Live: gates of an unchanged adapter, each against the run before it, and of one made worse, against that same run. One
half are gates of answers: worse is the adapter with its rank cut, by singular values. The other half are gates of
speed: worse is a merged model that does a quarter more work at every token. A wrong gate fails the unchanged, or passes
what is worse. Undecided is not wrong; why is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import decision
import worse

from peftopt.gate import judging
from peftopt.gate.records import Baseline, Hashes, Race, RuleFigure, Scores, Snapshot, Tolerances
from peftopt.records import Outcome

ROOT = Path(__file__).resolve().parents[1]

RACE = "latency.p50@chat over adapter"

SAID: dict[int, str] = {0: "accepted", 1: "rejected", 3: "inconclusive"}

# ---- simulated -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One line of the table: what is simulated, and whether failing or passing it is wrong."""

    what: str
    wrong: tuple[Outcome, ...]


def bare() -> Snapshot:
    """A snapshot in which nothing is measured yet."""
    hashes = Hashes("base", "adapter", "shape", "tokenizer", "answers", {"chat": "chat"})
    return Snapshot("simulated", "merged", False, "accepted", "", "merged", hashes=hashes, machine={"cpu": "A"})


def gated(then: Snapshot, now: Snapshot) -> Outcome:
    """What the gate says of a run, where that other one was accepted."""
    return judging.judge(Baseline("2026-01-31", then), now, "simulated").outcome


def raced(world: decision.World, ratio: float, blocks: int, between: float, rng: np.random.Generator) -> Snapshot:
    """A run's race. `between`: how far the true ratio itself wanders from one run to the next, in log units."""
    reference, variant = decision.interleaved(replace(world, relaunch=1), 0.0, rng)
    logs = (variant - reference)[:blocks] + math.log(ratio) + between * rng.normal()
    return replace(bare(), races={RACE: Race("wall", tuple((float(log),) for log in logs))}, rules=_ruled())


def _ruled() -> dict[str, RuleFigure]:
    return {"merge.gain": RuleFigure("accepted", None, "x", 0.85, "adapter", RACE)}


def speed(blocks: int, between: float, replications: int, seed: int) -> Iterator[str]:
    """Gates of speed: the ratio stays, becomes worse by the tolerance, or by a quarter."""
    limit = 1 + Tolerances().speed
    cells = {1.0: Cell("unchanged", ("rejected",)), limit: Cell("10 % slower", ("accepted", "rejected"))}
    cells[1.25] = Cell("25 % slower", ("accepted",))
    for world in decision.WORLDS[:3]:
        for ratio, cell in cells.items():
            rng = np.random.default_rng(seed)
            outcomes: Counter[Outcome] = Counter()
            for _ in range(replications):
                then = raced(world, 0.5, blocks, between, rng)
                now = raced(world, 0.5 * ratio, blocks, between, rng)
                outcomes[gated(then, now)] += 1
            yield line(f"{world.name}, {blocks} blocks, {cell.what}", outcomes, cell.wrong)


def answered(right: np.ndarray) -> Snapshot:
    """A run's answers."""
    below = {f"p{number}": 0.0 for number in np.flatnonzero(~right)}
    return replace(bare(), scores={"accuracy": Scores(len(right), "rows", below)})


ANSWERS: tuple[tuple[str, float, float, tuple[Outcome, ...]], ...] = (
    ("unchanged", 0.0, 0.0, ("rejected",)),
    ("retrained, 2 % lost and won", 0.02, 0.02, ("rejected",)),
    ("retrained, 5 % lost and won", 0.05, 0.05, ("rejected",)),
    ("5 % fewer right", 0.06, 0.01, ("accepted", "rejected")),
    ("10 % fewer right", 0.11, 0.01, ("accepted",)),
    ("20 % fewer right", 0.21, 0.01, ("accepted",)),
)
"""What is simulated, the shares of the accepted right answers that are lost and won, and which outcomes are wrong."""


def answers(prompts: int, replications: int, seed: int) -> Iterator[str]:
    """Gates of answers, where nine in ten were right."""
    for what, lost, won, wrong in ANSWERS:
        rng = np.random.default_rng(seed)
        outcomes: Counter[Outcome] = Counter()
        for _ in range(replications):
            right = rng.uniform(size=prompts) < 0.9
            chance = rng.uniform(size=prompts)
            now = np.where(right, chance >= lost, chance < won * 9)  # as many right answers again as there are wrong
            outcomes[gated(answered(right), answered(now))] += 1
        yield line(f"{prompts} prompts, {what}", outcomes, wrong)


def line(what: str, outcomes: Counter[Outcome], wrong: tuple[Outcome, ...]) -> str:
    """A row of shares with their Monte-Carlo errors; a star marks what is wrong."""
    n = outcomes.total()
    cells = []
    for outcome in ("accepted", "rejected", "inconclusive"):
        share = outcomes[outcome] / n
        error = math.sqrt(max(share * (1 - share), 1 / n) / n)
        mark = "*" if outcome in wrong else " "
        cells.append(f"{f'{100 * share:.1f} ±{100 * error:.1f} %{mark}':>17}")
    return f"{what:48}{''.join(cells)}"


def simulate(replications: int, seed: int, between: float) -> None:
    """Print the table."""
    began = time.monotonic()
    print(f"{'':48}{'passes':>17}{'fails':>17}{'undecided':>17}")
    for blocks in (10, 24, 60):
        for row in speed(blocks, between, replications, seed):
            print(row, flush=True)
    for prompts in (96, 200, 400, 1000):
        for row in answers(prompts, replications, seed):
            print(row, flush=True)
    print(f"* is wrong. {replications} pairs of runs a row, {time.monotonic() - began:.0f} s")


# ---- this machine --------------------------------------------------------------------------------

ANSWERS_RECIPE = """
model: {{base: {base}, adapter: {adapter}}}
workloads: {{chat: {{prompts: {prompts}, new_tokens: 2}}}}
quality: {{prompts: {prompts}, schema: {schema}, new_tokens: 48}}
measure: {{requests: 1, warmup: 0, relaunch: 6, max_blocks: 10, threads: 1}}
variants: {{adapter: [], merged: [{{merge: {{certify: blocks}}}}]}}
tradeoffs: {{merge: {{gain: off, parity: 5 %, lost: 20 %, critical_errors: 15 %}}, variant: {{critical_errors: 20 %}}}}
minimize: latency.p50@chat
"""

SPEED_RECIPE = """
model: {{base: {base}, adapter: {adapter}}}
workloads: {{chat: {{prompts: {prompts}, new_tokens: 4}}}}
measure: {{requests: 1, warmup: 1, relaunch: 3, min_blocks: 16, max_blocks: 16, threads: 1}}
variants: {{adapter: [], merged: [{{merge: {{certify: blocks}}}}]}}
tradeoffs: {{merge: {{gain: 0 %, parity: off, lost: off, critical_errors: off}}, variant: {{critical_errors: off}}}}
minimize: latency.p50@chat
"""

SLOWED = decision.SLOWED.replace(
    "params.slowdown", "0.0 if model.adapters else float(__import__('os').environ.get('SLOWED_MERGED', '0'))"
)
"""Slows a model down that has no adapter apart, in workers that are told to by their environment."""

RECIPES = {"answers": ANSWERS_RECIPE, "speed": SPEED_RECIPE}
TOLERANCES = {"answers": 0.2, "speed": 0.1, "size": 0.1}
PROMPTS = 32
"""So few and short, for gates of a minute or two; and what so few can show."""


@dataclass(frozen=True)
class Live:
    """The folder of real gates, and what is run in it."""

    home: Path
    rank: int
    slower: float

    def prepare(self) -> None:
        """Recipes, the adapter with its rank cut, and what slows workers down; what is there is kept."""
        self.home.mkdir(parents=True, exist_ok=True)
        cut = self.home / f"rank-{self.rank}"
        if not cut.exists():
            worse.write(ROOT / "demo" / "adapter", cut, rank=self.rank)
        (self.home / "site").mkdir(exist_ok=True)
        (self.home / "site" / "sitecustomize.py").write_text(SLOWED)
        data = ROOT / "demo" / "data"
        prompts = self.home / "prompts.jsonl"
        rows = sorted((data / "eval.jsonl").read_text().splitlines(), key=len)
        prompts.write_text("".join(f"{row}\n" for row in rows[:PROMPTS]))
        for tier, text in RECIPES.items():
            for name, adapter in (("same", ROOT / "demo" / "adapter"), ("cut", cut)):
                files = {"prompts": prompts, "schema": data / "schema.json"}
                base = ROOT / "models" / "smollm2-135m-instruct"
                recipe = self.home / f"{tier}-{name}.yaml"
                recipe.write_text(text.format(base=base, adapter=adapter.resolve(), **files))

    def gate(self, tier: str, is_worse: bool, number: int) -> dict[str, Any]:
        """One gate: of the run before this one, where there is one, and of this number's unchanged run where worse."""
        baseline = self.home / f"{tier}.json"
        recipe = self.home / f"{tier}-{'cut' if is_worse and tier == 'answers' else 'same'}.yaml"
        slowed = self.slower if is_worse and tier == "speed" else 0.0
        began = time.monotonic()
        code = self._peftopt(recipe, baseline, slowed)
        seconds = time.monotonic() - began
        answer = json.loads((self.home / "out" / "gate.json").read_text())
        run = sorted((self.home / "results" / "runs").glob(f"*-{recipe.stem}-*"))[-1]
        why = {
            case["name"]: case["reason"]
            for case in answer["cases"]
            if case["outcome"] not in ("accepted", "not judged")
        }
        changes = {case["name"]: case["change"] for case in answer["cases"] if case["change"]}
        if not is_worse:
            self.accept(tier, run)
        found = {"tier": tier, "worse": is_worse, "number": number, "code": code, "seconds": round(seconds, 1)}
        return {**found, "run": run.name, "why": why, "changes": changes}

    def first(self, tier: str) -> None:
        """The run that the first gate is compared with."""
        if not (self.home / f"{tier}.json").exists():
            code = self._peftopt(self.home / f"{tier}-same.yaml", self.home / f"{tier}.json", 0.0, "--update")
            if code:
                raise SystemExit(f"the first run of {tier} is not decided: exit {code}")
            self._tolerate(tier)

    def accept(self, tier: str, run: Path) -> None:
        """An undecided run is not accepted: the one before it stays the baseline."""
        self._peftopt(run, self.home / f"{tier}.json", 0.0, "--update")

    def _tolerate(self, tier: str) -> None:
        file = self.home / f"{tier}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tolerances": TOLERANCES}))

    def _peftopt(self, target: Path, baseline: Path, slowed: float, *options: str) -> int:
        path = os.pathsep.join(filter(None, [str(self.home / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": path, "SLOWED_MERGED": str(slowed), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "peftopt.cli", "gate", str(target), "--baseline", str(baseline), "--quiet"]
        command += ["--no-forecast", "--results", str(self.home / "results"), "--out", str(self.home / "out"), *options]
        with (self.home / "log.txt").open("a") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False, timeout=1800)
        if done.returncode not in SAID:
            raise SystemExit(f"exit {done.returncode}: see {self.home / 'log.txt'}")
        return done.returncode


def live(home: Path, rounds: int, rank: int, slower: float, tiers: list[str]) -> None:
    """`rounds` gates of the unchanged and as many of the worse, on each tier; those that are on record stay."""
    machine = Live(home.resolve(), rank, slower)
    machine.prepare()
    file = home / "gates.jsonl"
    done = [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []
    known = {(row["tier"], row["worse"], row["number"]) for row in done}
    for tier in tiers:
        machine.first(tier)
    for number in range(rounds):
        for tier in tiers:
            for is_worse in (False, True):
                if (tier, is_worse, number) in known:
                    continue
                row = machine.gate(tier, is_worse, number)
                with file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                done.append(row)
                print(f"{tier:8} {'worse' if is_worse else 'same':6} {number:3} {SAID[row['code']]}", flush=True)
    table(done)


def table(done: list[dict[str, Any]]) -> None:
    """How many gates of each kind said what, and why the undecided were."""
    print(f"\n{'gates of':10}{'adapter':10}{'n':>4}{'pass':>6}{'fail':>6}{'undecided':>11}{'wrong':>7}{'seconds':>9}")
    for tier in RECIPES:
        for is_worse in (False, True):
            mine = [row for row in done if row["tier"] == tier and row["worse"] is is_worse]
            said = Counter(SAID[row["code"]] for row in mine)
            wrong = said["accepted"] if is_worse else said["rejected"]
            middle = float(np.median([row["seconds"] for row in mine])) if mine else math.nan
            name = "worse" if is_worse else "unchanged"
            counts = f"{said['accepted']:>6}{said['rejected']:>6}{said['inconclusive']:>11}{wrong:>7}"
            print(f"{tier:10}{name:10}{len(mine):>4}{counts}{middle:>9.0f}")
    for row in done:
        if row["code"] == 3:
            which = "worse" if row["worse"] else "unchanged"
            print(f"undecided: {row['tier']}, {which}, {row['number']}: {row['why']}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--between", type=float, default=0.0, help="standard deviation between runs, log units")
    parser.add_argument("--live", type=Path, help="folder of real gates on this machine")
    parser.add_argument("--rounds", type=int, default=10, help="of --live: four gates each")
    parser.add_argument(
        "--tiers", nargs="+", default=list(RECIPES), choices=list(RECIPES), help="of --live: which gates"
    )
    parser.add_argument("--rank", type=int, default=1, help="of --live: what is left of the adapter's rank 8")
    parser.add_argument("--slower", type=float, default=0.25, help="of --live: more work at every token")
    options = parser.parse_args()
    if options.live:
        live(options.live, options.rounds, options.rank, options.slower, options.tiers)
    else:
        simulate(options.replications, options.seed, options.between)


if __name__ == "__main__":
    main()
