"""Where nothing is decided yet: the one command that gets nearest to a decision, and what to do before it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from peftopt.decision import stopping
from peftopt.decision.evidence import Evidence
from peftopt.decision.rules.table import A_A
from peftopt.metrics import known
from peftopt.records import Recipe, VariantDecision, Verdict
from peftopt.stats import MOST_BLOCKS


def next_step(evidence: Evidence, variants: Sequence[VariantDecision]) -> str:
    """ "peftopt run chat.yaml --more", with what has to change before it where more of the same does not decide:
    of the open variant that is nearest to a decision. "" where none is open."""
    recipe = evidence.plan.recipe
    still_open = [v for v in variants if v.outcome == "inconclusive" and v.name != recipe.baseline]
    if not still_open:
        return ""
    nearest = min(still_open, key=_distance)
    run = f"peftopt run {Path(recipe.path).name}"
    verdicts = _open(nearest)
    if evidence.apart:
        return f"measure {nearest.name} again, with what it is compared with: peftopt load, then peftopt import"
    if nearest.decided_by == A_A:
        return f"on a quieter machine: {run} --fresh"
    if prompts := _prompts(recipe, verdicts):
        return f"{prompts}: {run}"
    if any(map(_can_be_raced, verdicts)):
        return f"{run} --more"
    stuck = next((v for v in verdicts if v.blocks_needed), None)
    if stuck:
        change = f"leave {nearest.name} out, or change the limit of {stuck.rule}, which blocks can hardly show"
        return f"{change}: peftopt decide --recipe {Path(recipe.path).name}"
    return run


def _open(variant: VariantDecision) -> list[Verdict]:
    return [verdict for verdict in variant.verdicts if verdict.outcome == "inconclusive"]


def _can_be_raced(verdict: Verdict) -> bool:
    """Whether more blocks are likely to settle it."""
    return bool(verdict.blocks_needed) and not verdict.hopeless and (verdict.blocks_needed or 0) < MOST_BLOCKS


def _distance(variant: VariantDecision) -> tuple[int, float]:
    """What more blocks settle is nearest, by its minutes; then what takes more prompts; then what takes another
    limit."""
    verdicts = _open(variant)
    if verdicts and all(map(_can_be_raced, verdicts)):
        return 0, max(math.inf if v.minutes_needed is None else v.minutes_needed for v in verdicts)
    return (2 if any(v.blocks_needed and not _can_be_raced(v) for v in verdicts) else 1), float(len(verdicts))


def _prompts(recipe: Recipe, verdicts: Iterable[Verdict]) -> str:
    """What to change so that enough answers are checked, "" where more of them would not help."""
    short = [v for v in verdicts if _on_answers(recipe, v)]
    if not short:
        return ""
    if recipe.quality is None:
        return "add a section quality, whose prompts have their answers checked"
    asked = max((v.value.n for v in short if v.value), default=0)
    needed = max(stopping.prompts_for(recipe, v.rule) for v in short)
    many = f"{needed} prompts, not {asked}" if asked < needed < stopping.MOST_PROMPTS else f"more than {asked} prompts"
    where = "raise quality.rows" if recipe.quality.rows else f"add to {Path(recipe.quality.prompts).name}"
    return f"check the answers to {many} ({where})"


def _on_answers(recipe: Recipe, verdict: Verdict) -> bool:
    """Whether more answers could settle it: a rule on answers, or a requirement on a figure of them."""
    if verdict.rule.rpartition(".")[2] in stopping.ANSWERED:
        return True
    required = [t.metric for t in recipe.require if verdict.rule == f"require: {t.text}"]
    return any(not metric.workload and not known(metric).reads and metric.name != "size" for metric in required)
