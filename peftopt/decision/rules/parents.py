"""What a technique's rule is called, the variant it is judged against, and how many variants share the error. Pure."""

from __future__ import annotations

from peftopt.records import Recipe, Step, Variant

SAME_MODEL = ("merge", "bake")
"""Techniques that give the same model without the adapter's cost: they are judged against the unmerged adapter."""


def rule_name(step: Step) -> str:
    """The word before the dot: the plug-in's name for quantizers ("int8"), else the technique ("merge")."""
    return step.plugin if step.technique == "quantize" else step.technique


def family(recipe: Recipe) -> int:
    """How many variants may be chosen: the error rates hold over all of them together, whatever their rules are
    called. They stay those that were run, also when the run is judged again for some of them."""
    return max(len(recipe.variants) - 1, 1)


def parent_of(recipe: Recipe, variant: Variant, step: Step) -> str:
    """The variant that is this one without the technique, as like it as the recipe has; else the baseline."""
    candidates = [v for v in recipe.variants.values() if v.name != variant.name]
    plain = recipe.variants[recipe.baseline].engine
    rest = tuple(s for s in variant.steps if s != step)
    engine = plain if step == variant.engine else variant.engine
    policies = tuple(s for s in variant.policies if s != step)
    prefix = variant.steps[: variant.steps.index(step)] if step in variant.steps else variant.steps
    chains = ((rest, engine, policies), (rest, engine, ()), (rest, plain, ()), (prefix, plain, ()))
    for chain in chains:
        for candidate in candidates:
            if (candidate.steps, candidate.engine, candidate.policies) == chain:
                return candidate.name
    return recipe.baseline


def by_itself(recipe: Recipe, variant: str, step: Step) -> str | None:
    """The variant that is this one's chain up to and including the step, without other techniques before it, on the
    baseline's engine."""
    chain = recipe.variants[variant].steps
    wanted = (*(s for s in chain[: chain.index(step)] if not s.technique), step)
    plain = recipe.variants[recipe.baseline].engine
    whole = (wanted, plain, ())
    return next((v.name for v in recipe.variants.values() if (v.steps, v.engine, v.policies) == whole), None)
