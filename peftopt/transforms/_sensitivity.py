"""Which layers suffer most from few bits: measured on calibration texts, one unit of layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peftopt import progress
from peftopt.transforms import _layers

TOKENS = 512
"""Calibration tokens that each unit is measured on. Units differ by more than what so few tokens leave unsure."""


def worst(damage: Sequence[float], weights: Sequence[int], share: float) -> list[int]:
    """Indices of the units to spare: those whose rounding hurts most per weight, while they fit into `share` of all
    weights. Greedy for a knapsack, so what is left of the budget is filled with what still fits."""
    budget, chosen = share * sum(weights), []
    for n in sorted(range(len(damage)), key=lambda n: -damage[n] / weights[n]):
        if damage[n] > 0 and weights[n] <= budget:
            chosen.append(n)
            budget -= weights[n]
    return sorted(chosen)


def measure(
    model: Any, rows: Sequence[Mapping[str, Any]], units: Sequence[Sequence[str]], weights: Mapping[str, Any]
) -> tuple[list[float], int]:
    """Damage of each unit: mean KL(model || model with only this unit rounded) per token, in nats; and the tokens.

    Rounding is to nearest, by compressed-tensors' own arithmetic with the arguments `weights`. What comes before the
    unit's decoder layer does not change, so it is not computed again: half the forward passes, on average.
    """
    import torch

    rows = _first(rows, TOKENS)
    layers = blocks(model)
    with torch.no_grad():
        outputs: list[dict[Any, Any]] = []
        expected = []
        for row in rows:
            with _remembered(layers) as output:
                expected.append(torch.log_softmax(model(**row, use_cache=False).logits.float(), -1))
            outputs.append(output)
        damage = []
        for n, unit in enumerate(units):
            progress.report("sensitivity", n, len(units), unit[0])
            before = _before(model, layers, unit)
            with _rounded(model, unit, weights):
                total = 0.0
                for row, output, reference in zip(rows, outputs, expected, strict=True):
                    with _replayed(before, output):
                        changed = torch.log_softmax(model(**row, use_cache=False).logits.float(), -1)
                    total += float((reference.exp() * (reference - changed)).sum())
            damage.append(total / sum(r.shape[1] for r in expected))
    return damage, sum(r.shape[1] for r in expected)


def blocks(model: Any) -> list[Any]:
    """The decoder layers, in order: what llm-compressor works through one by one."""
    kinds = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in kinds]


def _first(rows: Sequence[Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The first rows until there are so many tokens, the last one cut."""
    first = []
    for row in rows:
        if tokens > 1:
            first.append({name: value[:, :tokens] for name, value in row.items()})
            tokens -= row["input_ids"].shape[1]
    return first


def _before(model: Any, layers: Sequence[Any], unit: Sequence[str]) -> list[Any]:
    """The decoder layers before the one that holds the unit; none where it is in no decoder layer."""
    inside = [n for n, layer in enumerate(layers) if any(m is model.get_submodule(unit[0]) for m in layer.modules())]
    return list(layers[: inside[0]]) if inside else []


@contextmanager
def _remembered(layers: Sequence[Any]) -> Iterator[dict[Any, Any]]:
    """What each layer gives in one forward pass."""
    outputs: dict[Any, Any] = {}

    def keep(layer: Any, _: Any, output: Any) -> None:
        outputs[layer] = output

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        yield outputs


@contextmanager
def _replayed(layers: Sequence[Any], outputs: Mapping[Any, Any]) -> Iterator[None]:
    """Let layers give what they gave before, without computing it."""
    with ExitStack() as stack:
        for layer in layers:
            layer.forward = lambda *_, output=outputs[layer], **__: output
            stack.callback(delattr, layer, "forward")
        yield


@contextmanager
def _rounded(model: Any, unit: Sequence[str], weights: Mapping[str, Any]) -> Iterator[None]:
    """Round a unit's weights, in groups, and put them back."""
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(**weights)
    with ExitStack() as stack:
        for name in unit:
            parameter = model.get_submodule(name).weight
            whole = parameter.data
            groups = whole.unflatten(1, (-1, arguments.group_size))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
            parameter.data = fake_quantize(whole, scale, zero, arguments)
            stack.callback(setattr, parameter, "data", whole)
        yield


def spared(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    layers: _layers.Shapes,
    share: float,
    weights: Mapping[str, Any],
) -> tuple[list[str], dict[str, Any]]:
    """The layers to keep at 8 bits, at most `share` of all weights, and how they were found, for the record."""
    units = _layers.units(layers)
    damage, tokens = measure(model, rows, units, weights)
    counts = [_layers.costs(layers, unit) for unit in units]
    chosen = worst(damage, counts, share)
    figures = {
        "share": sum(counts[n] for n in chosen) / sum(counts),
        "tokens": tokens,
        "units": len(units),
        "kl_all": sum(damage),
        "kl_spared": sum(damage[n] for n in chosen),
        "spared": [{"layers": list(units[n]), "kl": damage[n]} for n in sorted(chosen, key=lambda n: -damage[n])],
    }
    return [name for n in chosen for name in units[n]], figures
