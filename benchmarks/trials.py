"""How often is a version on trial judged wrongly? Simulated trials through the gateway's own judge, no model.

python benchmarks/trials.py --trials 1000

Users' prompts that both versions were asked (`--shadow`), looked at after every tenth: the live version makes critical
errors by itself and changes its words from run to run; the new one does as much, or more.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import dataclass

from peftopt import stats
from peftopt.gateway import bets
from peftopt.gateway.bets import Tally
from peftopt.gateway.trial import ALPHA, Terms

LIVE_ERRORS, LIVE_CHANGES = 0.03, 0.05
"""Shares of the live version's answers that have a critical error, and of those that are others in a second run."""
RULES = 4
"""Rules that share the error: critical errors, changed answers, failures, times."""


@dataclass(frozen=True)
class Case:
    """A version that has so many more critical errors, and so many more of whose answers are others."""

    name: str
    errors: float = 0.0
    changes: float = 0.0


CASES = (
    Case("like the live version"),
    Case("critical errors at the limit", errors=Terms.critical),
    Case("5 % critical errors", errors=0.05),
    Case("10 % critical errors", errors=0.10),
    Case("changes at the limit", changes=0.05),
    Case("20 % of answers changed", changes=0.20),
)


def tried(case: Case, pairs: int, dice: random.Random) -> tuple[str, int]:
    """The first verdict of one trial, and after how many pairs."""
    critical, changed, alpha = Tally(), Tally(), ALPHA / RULES
    for n in range(1, pairs + 1):
        critical.add(dice.random() < LIVE_ERRORS + case.errors, dice.random() < LIVE_ERRORS)
        changed.add(dice.random() < LIVE_CHANGES + case.changes, dice.random() < LIVE_CHANGES)
        if n % 10:
            continue
        found = bets.judge(critical, Terms.critical, alpha), bets.judge(changed, 0.05, alpha)
        if "rejected" in found:
            return "rejected", n
        if found == ("accepted", "accepted"):
            return "accepted", n
    return "inconclusive", pairs


def main() -> None:
    """Command line: a line of Markdown for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| version | rejected | accepted | not decided | pairs until decided (median) |\n|---|---|---|---|---|")
    for case in CASES:
        dice = random.Random(arguments.seed)
        found = [tried(case, arguments.pairs, dice) for _ in range(arguments.trials)]
        shares = Counter(outcome for outcome, _ in found)
        told = [f"{shares[o] / len(found):.1%}" for o in ("rejected", "accepted", "inconclusive")]
        decided = stats.median(n for outcome, n in found if outcome != "inconclusive")
        print(f"| {case.name} | {' | '.join(told)} | {decided:.0f} |", flush=True)


if __name__ == "__main__":
    main()
