"""What a rule sees: one half-row of the trade-off table, asked of one technique of one variant. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from peftopt.decision.evidence import Evidence
from peftopt.decision.rules.parents import SAME_MODEL, by_itself
from peftopt.records import Step, Verdict


@dataclass(frozen=True)
class Case:
    """One rule asked of one variant's technique. `parent` is what it is compared with for speed and size."""

    evidence: Evidence
    variant: str
    step: Step
    limit: float
    parent: str
    family: int

    @property
    def baseline(self) -> str:
        """The name of the run's baseline."""
        return self.evidence.baseline


def judged_on(case: Case) -> tuple[str | None, str]:
    """(the variant on which a technique's answers are judged, the one it is compared with). A merge, or a baked prompt,
    is judged on the variant that is nothing but that, if the recipe has it, not by what else was done to it."""
    if case.step.technique not in SAME_MODEL:
        return case.variant, case.parent
    return by_itself(case.evidence.plan.recipe, case.variant, case.step), case.baseline


def not_alone(case: Case) -> Verdict:
    """What is said of a merge, or a baked prompt, where no variant of the recipe is nothing but that."""
    reason = f"no variant of the recipe is the {case.step.technique} alone"
    return Verdict("", "not judged", reason, case.baseline)
