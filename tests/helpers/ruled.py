"""Plans and answers for tests of one rule: a table of few rules, a policy, answers that differ in some rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from helpers.records import CHAINS, EAGER, INT8, MERGE, evidence_of, plan_of, quality
from peftopt.decision.rules import parents
from peftopt.decision.rules.case import Case
from peftopt.recipe import plan as planning
from peftopt.records import Json, Measurement, Plan, Rule, Step, Variant, Workload

NEVER = math.inf
Rows = Mapping[str, Mapping[str, Json]]
TRUNCATE = Step("truncate", "policy", "truncate", {"over": 2048, "keep": "tail"})
CAP = Step("cap", "policy", "shorten", {"max_new_tokens": 48})


def ruled(plan: Plan, *table: Rule) -> Plan:
    """The plan with these rules in place of its table."""
    return replace(plan, recipe=replace(plan.recipe, rules=table))


def policed(step: Step, *table: Rule, **workloads: Workload) -> Plan:
    """A plan with the variant `cut`: the merge with the policy, by these rules, on these workloads beside `chat`."""
    plan = plan_of("merged")
    variants = {**plan.recipe.variants, "cut": Variant("cut", (MERGE,), EAGER, (step,))}
    recipe = replace(plan.recipe, variants=variants, rules=table)
    recipe = replace(recipe, workloads={"chat": Workload("chat", "p"), **workloads})
    return planning.plan(recipe, {"base": "b", "adapter": "a", "calibration": ""}, {})


def case(
    measurements: Sequence[Measurement], limit: float, name: str = "int8", family: int = 1, step: Step | None = None
) -> Case:
    """A rule of the last step of the variant."""
    plan = plan_of("merged", "int8", "compiled")
    step = step or {"int8": INT8, "merged": MERGE}.get(name, CHAINS[name].engine)
    parent = parents.parent_of(plan.recipe, CHAINS[name], step)
    return Case(evidence_of(plan, measurements), name, step, limit, parent, family)


def asked(first: Rows = {}, second: Rows | None = None, n: int = 60, **variants: Rows) -> list[Measurement]:  # noqa: B006
    """What the adapter answers in its two runs and each variant in its own: all the same, but for these rows."""
    found = quality("adapter", n, **first) + quality("adapter", n, launch=2, **(first if second is None else second))
    return found + [m for name, rows in variants.items() for m in quality(name, n, **rows)]


def rows(*numbers: int, **values: Json) -> dict[str, dict[str, Json]]:
    """What is changed in the rows of these numbers."""
    return {f"p{n}": dict(values) for n in numbers}


def launched(measurements: Sequence[Measurement], every: int) -> list[Measurement]:
    """A launch of each arm before every so many of its turns."""
    found: list[Measurement] = []
    for m in measurements:
        if m.probe == "speed" and m.values["block"] % every == 0:
            found.append(Measurement("launch", m.variant, "chat", values={"model_loading_time": 1.0}))
        found.append(m)
    return found
