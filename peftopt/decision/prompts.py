"""What an adapter's virtual tokens are and cost, in words for a report. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from peftopt.decision.evidence import Evidence
from peftopt.decision.index import Field
from peftopt.metrics import counted, format_value
from peftopt.records import Metric, Recipe, Variant

BAKE = "bake"


def virtual_tokens(evidence: Evidence, variant: Variant) -> Iterator[str]:
    """How many virtual tokens a variant has, live or baked, and what they take of a sequence's cache; of live ones also
    what they cost against the same variant with the prompt baked, where the recipe has that. Nothing of a variant
    without virtual tokens."""
    launch = next(iter(evidence.launches.get(variant.name, ())), None)
    if launch is None or not launch.virtual_tokens:
        return
    tokens = counted(launch.virtual_tokens, "virtual token")
    how = "baked: computed once" if launch.baked else "live: computed by every request"
    cache = ""
    if launch.prompt_kv_bytes:
        cache = f"; their keys and values take {format_value('prompt_kv', launch.prompt_kv_bytes)} of each cache"
    yield f"{tokens}, {how}{cache}"
    twin = None if launch.baked else _baked_twin(evidence.plan.recipe, variant)
    if twin:
        yield from _cost(evidence, variant.name, twin)


def _baked_twin(recipe: Recipe, variant: Variant) -> str | None:
    """The variant that is this one with its prompt baked: the same other steps, engine and policies."""
    for other in recipe.variants.values():
        live = tuple(step for step in other.steps if step.technique != BAKE)
        same = (live, other.engine, other.policies) == (variant.steps, variant.engine, variant.policies)
        if same and live != other.steps:
            return other.name
    return None


def _cost(evidence: Evidence, live: str, baked: str) -> Iterator[str]:
    """A line for the time to the first token, which is where virtual tokens are computed, and one for what the recipe
    minimizes."""
    minimized = evidence.plan.recipe.minimize
    timed: dict[str, Field] = {
        str(Metric("ttft", minimized.workload)): "ttft_ms",
        str(minimized): evidence.field(minimized),
    }
    for name, field in timed.items():
        if ratio := evidence.ratio(live, baked, minimized.workload, field):
            yield (
                f"live virtual tokens: {name} is {ratio.estimate:.2f}x that of {baked}, where they are baked "
                f"({ratio.low:.2f} to {ratio.high:.2f}, {counted(ratio.n, 'block')})"
            )
