"""Will this be slower? From the times of a few layers to what the whole model will take, and what to say of it. Pure.

A step of the whole model is what every request takes beside its layers (embeddings, output head, the loop around the
model), and the layers, which are alike: `fixed + layers x layer`. Both come from models cut to their first layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from peftopt import stats
from peftopt.decision.evidence import NOISIER
from peftopt.decision.rules.parents import parent_of
from peftopt.measurements import Forecast, Pass
from peftopt.metrics import percent
from peftopt.records import Interval, Recipe, Variant

SURE = 1.05
"""A variant that may be less slower than this is not warned of: the sum of layers is not exact to some per cent."""

IDLE = 2.0
"""How many times its matrix products a step must take to be called overhead: more than half of it is something else."""

LEAST = 0.05
"""The share of a time that is the layers' at least, where noise leaves less than nothing for them."""

LEVEL = 0.95

TYPICAL = 16
"""Tokens of a request whose times are compared to choose a clock."""

GROUPS = 8
"""What passes are put into, of each of which the least times count: from six on there is an exact interval."""

ROUNDED = ("plain transformers rounds the activations at every layer, and multiplies in full width", "run it on vllm")
PACKED = ("plain transformers has no kernel for packed weights, and unpacks them", "run it on vllm")

WHY: Mapping[str, tuple[str, str]] = {
    "int8": (
        "eager PyTorch has no fast product of a few rows with 8-bit weights",
        "run it on {engine: compiled}, or quantize with gguf for llamacpp",
    ),
    "w8a8": (
        "plain transformers rounds the activations at every layer, and multiplies in full width",
        "run it on vllm",
    ),
    "fp8": ("plain transformers rounds the activations at every layer, and multiplies in full width", "run it on vllm"),
    "bnb8": (
        "LLM.int8() rounds the activations at every layer, and takes outliers apart",
        "use int8 on {engine: compiled}",
    ),
    "nf4": (
        "4-bit weights are unpacked for every prompt, and for batches",
        "use it for one request at a time, or gguf for llamacpp",
    ),
    "gptq": PACKED,
    "awq": PACKED,
}
"""Quantizer -> why it is slower where it is, and what to do."""


# ---- weighing ----------------------------------------------------------------------------------


def whole(cut: Pass, fixed: Pass, few: int, layers: int) -> Pass:
    """What a model of `layers` takes where one cut to `few` of them takes `cut`, and `fixed` of that beside them."""
    return Pass(
        prompt_ms=_scaled(cut.prompt_ms, fixed.prompt_ms, few, layers),
        step_ms=_scaled(cut.step_ms, fixed.step_ms, few, layers),
    )


def _scaled(ms: float, fixed: float, few: int, layers: int) -> float:
    in_layers = max(ms - fixed, LEAST * ms)
    return ms - in_layers + in_layers * layers / few


def beside(one: Sequence[Pass], several: Sequence[Pass], few: int) -> Pass:
    """What a request takes beside its layers, from passes of the model cut to one layer and to `few`: the medians."""

    def fixed(short: float, long: float) -> float:
        return min(max(short - (long - short) / (few - 1), 0.0), short)

    return Pass(
        prompt_ms=fixed(stats.median(p.prompt_ms for p in one), stats.median(p.prompt_ms for p in several)),
        step_ms=fixed(stats.median(p.step_ms for p in one), stats.median(p.step_ms for p in several)),
    )


def least(passes: Sequence[Pass]) -> list[Pass]:
    """The least times of each of GROUPS groups of passes that followed each other, since whatever else goes on makes a
    time longer only; few passes are groups of their own. Groups of variants of the same rounds stay pairs."""
    size = max(1, len(passes) // GROUPS)
    groups = [passes[start : start + size] for start in range(0, len(passes) - size + 1, size)]
    return [
        Pass(prompt_ms=min(each.prompt_ms for each in group), step_ms=min(each.step_ms for each in group))
        for group in groups
    ]


def by_cpu(wall: Sequence[Pass], cpu: Sequence[Pass]) -> bool:
    """Whether CPU time tells more than the wall clock, by the passes of one model: where the wall clock's differ
    NOISIER times as much, since others keep the processors busy."""

    def spread(passes: Sequence[Pass]) -> float:
        logs = [math.log(p.request_ms(TYPICAL)) for p in passes]
        middle = stats.median(logs)
        return stats.median(abs(each - middle) for each in logs)

    return spread(wall) > NOISIER * spread(cpu)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Times over others', paired by round: the centre and the exact interval of Hodges and Lehmann. Raises ValueError
    for no times, and for others than positive ones."""
    logs = [math.log(mine / other) for mine, other in zip(ours, theirs, strict=True)]
    interval = stats.hodges_lehmann(logs, LEVEL)
    return Interval(math.exp(interval.estimate), math.exp(interval.low), math.exp(interval.high), interval.n, LEVEL)


def slower(interval: Interval) -> bool:
    """Whether it is surely slower, by more than the sum of layers may be wrong."""
    return interval.low > SURE


def faster(interval: Interval) -> bool:
    """Whether it is surely faster, by as much."""
    return interval.high < 1 / SURE


# ---- what is compared with what ----------------------------------------------------------------


def against(recipe: Recipe, variant: Variant, tried: Sequence[str]) -> list[str]:
    """The variants that a variant is compared with, of those that were tried: the one without its last technique first,
    then the baseline."""
    others = [parent_of(recipe, variant, variant.steps[-1])] if variant.steps else []
    return [name for name in dict.fromkeys([*others, recipe.baseline]) if name in tried and name != variant.name]


# ---- saying it ---------------------------------------------------------------------------------


def speed(variant: Variant, other: str, interval: Interval, prompt: float, step: float, how: str) -> Forecast:
    """A variant's time over another's. `prompt` and `step` are the ratios of the two parts, `how` says of what."""
    name = next((step.plugin for step in reversed(variant.steps) if step.plugin in WHY), "")
    cause, advice = WHY.get(name, ("", "")) if slower(interval) else ("", "")
    parts = f"a prompt {prompt:.2f}x, a token {step:.2f}x {how}"
    return Forecast(
        kind="speed",
        against=other,
        ratio=interval.estimate,
        low=interval.low,
        high=interval.high,
        warns=slower(interval),
        reason=f"{parts}; {cause}" if cause else parts,
        advice=advice or ("leave it out, or measure it on another engine" if slower(interval) else ""),
    )


def eager(interval: Interval, elsewhere: bool) -> Forecast:
    """A token's time over that of its matrix products. `elsewhere`: the recipe has another engine for the workload."""
    share = 1 - 1 / interval.estimate
    return Forecast(
        kind="eager",
        ratio=interval.estimate,
        low=interval.low,
        high=interval.high,
        warns=interval.low > IDLE and not elsewhere,
        reason=f"{percent(share)} of a token's time is not in its matrix products but in Python and small operations, "
        "which no quantizer shortens",
        advice="add a variant on {engine: compiled}, llamacpp or vllm",
    )


def rank(interval: Interval, own: int, padded: int) -> Forecast:
    """An adapter padded to the rank that a server takes, over its own."""
    return Forecast(
        kind="rank",
        ratio=interval.estimate,
        low=interval.low,
        high=interval.high,
        warns=slower(interval),
        reason=f"vLLM pads the adapter's rank {own} to {padded}; timed with PyTorch's products, not vLLM's kernels",
        advice=f"train it with rank {padded} or the next lower one, or merge it",
    )


def shapes(requests: float, prompts: float, graphs: int, padding: float, longest: int) -> Forecast:
    """Shares of a workload's requests that no graph takes, and of those whose prompt none does; the graphs that are
    compiled for the others, the tokens of a padded prompt over its own, and the tokens of the longest request."""
    whole_request = f"{percent(requests)} of the requests are answered uncompiled: they are longer than cache_len"
    prompt_alone = f"{percent(prompts)} of the prompts run eagerly: they are longer than prompt_buckets"
    lacks = whole_request if requests else prompt_alone if prompts else "every request has a graph"
    return Forecast(
        kind="shapes",
        warns=bool(requests or prompts),
        reason=f"{lacks}; {graphs} graphs to compile, prompts padded to {padding:.2f}x",
        advice=f"set cache_len to {longest} at least" if requests else "add a longer bucket" if prompts else "",
    )


def sentence(variant: str, workload: str, forecast: Forecast) -> str:
    """A forecast as a warning."""
    advice = f" ({forecast.advice})" if forecast.advice else ""
    if forecast.kind == "speed":
        what = f"{variant} is expected to take {times(forecast)} of {forecast.against}'s time on {workload}"
    elif forecast.kind == "rank":
        what = f"{variant} is expected to take {times(forecast)} of what its own rank takes, on {workload}"
    elif forecast.kind == "eager":
        what = f"{variant} on {workload} is expected to be eager PyTorch's overhead more than arithmetic"
    else:
        what = f"{variant} on {workload} will not run compiled throughout"
    return f"{what}: {forecast.reason}{advice}"


def times(forecast: Forecast) -> str:
    """The ratio and its interval, "2.10x (1.95–2.31)"; "" where there is none."""
    if forecast.ratio is None or forecast.low is None or forecast.high is None:
        return ""
    return f"{forecast.ratio:.2f}x ({forecast.low:.2f}–{forecast.high:.2f})"
