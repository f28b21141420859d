"""Outliers of the activations moved into the weights, only where that leaves the model what it is (SmoothQuant).

which linear layers read a norm's output, seen in one forward pass -> those of which nothing else reads it, tried out
    -> ranges of the outputs on the calibration texts -> norms divided, layers multiplied -> the same model, checked

No list of architectures: where a norm's output goes is seen, and whether anything else reads it is tried with powers of
two, which change not a bit of the logits where nothing does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from peftopt import progress
from peftopt.errors import WorkerFailed

TOKENS = 64
"""Tokens on which it is tried out that the model stays what it is."""

SAME = 1e-3
"""Of the largest logit: a difference below it comes from rounding; a reader that was not seen makes one of its size."""

LARGEST_KL = 0.05
"""Nats a token between the model and the smoothed one, whose weights are rounded to their type once more."""

SMALLEST = 1e-5
"""The least scale, as llm-compressor has it."""


class Group(NamedTuple):
    """A layer, and the linear layers that read what it gives, in full or its last features."""

    source: str
    readers: tuple[str, ...]


def smooth(
    model: Any, rows: Sequence[Mapping[str, Any]], layers: Collection[str], strength: float
) -> tuple[dict[str, Any], list[str]]:
    """SmoothQuant (arXiv:2211.10438) in place: s = max|X|^strength / max|W|^(1 - strength) per channel.

    `layers` are the names of those that may be changed. Returns what was done, for the record, and notices. Raises
    WorkerFailed ("unusable") where the smoothed model is another one.
    """
    import torch

    row = first_tokens(rows)
    offered = [group for group in readers(model, row) if set(group.readers) <= set(layers)]
    groups = [g for g in unchanged(model, row, offered) if _offset(model.get_submodule(g.source)) is not None]
    with torch.no_grad():
        before = torch.log_softmax(model(**row, use_cache=False).logits.float(), -1)
        for group, span in zip(groups, _spans(model, rows, groups), strict=True):
            _scale(model, group, span, strength)
        after = torch.log_softmax(model(**row, use_cache=False).logits.float(), -1)
        kl = float((before.exp() * (before - after)).sum(-1).mean())
    if not kl <= LARGEST_KL:
        detail = f"smoothing alone, with nothing rounded, changes the model's predictions (KL {kl:.2g} nats a token)"
        raise WorkerFailed("unusable", detail, "leave smoothing out (0)")
    figures = {"norms": len(groups), "layers": sum(len(g.readers) for g in groups), "kl": kl}
    return figures, _notices(groups, offered, layers)


def _notices(groups: Sequence[Group], offered: Sequence[Group], layers: Collection[str]) -> list[str]:
    if not groups:
        return ["nothing is smoothed: no norm of this model is read by linear layers alone"]
    if dropped := [g.source for g in offered if g not in groups]:
        more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
        return [f"not smoothed, since more than linear layers read it: {dropped[0]}{more}"]
    return []


def first_tokens(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The start of the longest row."""
    longest = max(rows, key=lambda row: int(row["input_ids"].shape[1]))
    return {name: value[:, :TOKENS] for name, value in longest.items()}


# ---- where it leaves the model what it is --------------------------------------------------------------


def readers(model: Any, row: Mapping[str, Any]) -> list[Group]:
    """Each layer with a vector of weights (a norm) whose very output linear layers take as their input, and those."""
    import torch

    given: dict[int, tuple[str, Any]] = {}
    by_source: dict[str, list[str]] = {}

    def gives(name: str) -> Any:
        def note(_: Any, __: Any, output: Any) -> None:
            if torch.is_tensor(output):
                given[output.data_ptr()] = name, output  # held, so that nothing else gets its place in memory

        return note

    def takes(name: str) -> Any:
        def note(_: Any, inputs: tuple[Any, ...]) -> None:
            if inputs and (output := given.get(inputs[0].data_ptr())) and output[1].numel() == inputs[0].numel():
                by_source.setdefault(output[0], []).append(name)

        return note

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                stack.callback(module.register_forward_pre_hook(takes(name)).remove)
            elif is_norm(module):
                stack.callback(module.register_forward_hook(gives(name)).remove)
        model(**row, use_cache=False)
    return [Group(source, tuple(dict.fromkeys(names))) for source, names in by_source.items()]


def is_norm(module: Any) -> bool:
    """Whether a module has a vector of weights, one per channel."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 1 and not list(module.children())


def unchanged(model: Any, row: Mapping[str, Any], groups: Sequence[Group]) -> list[Group]:
    """Those groups whose source may be divided by any scales where its readers are multiplied: the logits stay.

    No weight is touched: outputs are divided and inputs multiplied, by powers of two, so that nothing is rounded.
    Groups of the same kind, alike in all decoder layers, are tried together.
    """
    import torch

    with torch.no_grad():
        expected = model(**row, use_cache=False).logits.float()

        def same(some: Sequence[Group]) -> bool:
            with _scaled(model, some):
                logits = model(**row, use_cache=False).logits.float()
            return bool((logits - expected).abs().max() <= SAME * expected.abs().max())

        if same(groups):
            return list(groups)
        kinds: dict[tuple[str, ...], list[Group]] = {}
        for group in groups:
            kind = tuple(re.sub(r"\d+", "N", name) for name in (group.source, *group.readers))
            kinds.setdefault(tuple(dict.fromkeys(kind)), []).append(group)
        kept = {group for some in kinds.values() if same(some) for group in some}
    return [group for group in groups if group in kept]


@contextmanager
def _scaled(model: Any, groups: Sequence[Group]) -> Iterator[None]:
    """Sources divided by 2 in every other channel, their readers' inputs multiplied by it."""
    import torch

    def scales(width: int, like: Any) -> Any:
        factors = torch.ones(width, dtype=like.dtype, device=like.device)
        factors[::2] = 2
        return factors

    def divide(width: int) -> Any:
        def change(_: Any, __: Any, output: Any) -> Any:
            plain = torch.ones_like(output[..., : output.shape[-1] - width])
            return output / torch.cat([plain, scales(width, output).expand(*output.shape[:-1], width)], -1)

        return change

    def multiply(_: Any, inputs: tuple[Any, ...]) -> Any:
        return (inputs[0] * scales(inputs[0].shape[-1], inputs[0]), *inputs[1:])

    with ExitStack() as stack:
        for group in groups:
            layers = [model.get_submodule(name) for name in group.readers]
            hook = divide(layers[0].weight.shape[-1])
            stack.callback(model.get_submodule(group.source).register_forward_hook(hook).remove)
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(multiply).remove)
        yield


# ---- how much, and how ---------------------------------------------------------------------------------


def _offset(norm: Any) -> int | None:
    """What a norm adds to its weight before it multiplies by it: 0, or 1 (Gemma); None where it does neither."""
    import torch
    from torch.func import functional_call

    if norm.weight.dim() != 1:
        return None
    width = len(norm.weight)
    exact = {name: value.detach().double() for name, value in norm.named_parameters()}
    x = torch.linspace(-1, 1, 3 * width, dtype=torch.float64, device=norm.weight.device).reshape(3, width) + 0.1
    with torch.no_grad():
        whole = functional_call(norm, exact, (x,)).double()
        for offset in (0, 1):
            half = {n: (v + offset) / 2 - offset if n == "weight" else v / 2 for n, v in exact.items()}
            if torch.allclose(functional_call(norm, half, (x,)).double(), whole / 2, rtol=1e-3, atol=1e-6):
                return offset
    return None


def _spans(model: Any, rows: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> list[Any]:
    """For each group, the largest less the smallest that each channel of its source gives on the rows, [width]."""
    import torch

    low: dict[str, Any] = {}
    high: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def note(_: Any, __: Any, output: Any) -> None:
            least, most = torch.aminmax(output.float().flatten(0, -2), dim=0)
            low[name] = torch.minimum(low.get(name, least), least)
            high[name] = torch.maximum(high.get(name, most), most)

        return note

    with ExitStack() as stack:
        for group in groups:
            source = model.get_submodule(group.source)
            stack.callback(source.register_forward_hook(watch(group.source)).remove)
        for n, row in enumerate(rows if groups else ()):
            progress.report("smoothing", n, len(rows))
            model(**row, use_cache=False)
    return [high[group.source] - low[group.source] for group in groups]


def _scale(model: Any, group: Group, span: Any, strength: float) -> None:
    """Divide a norm by the scales of its channels and multiply its readers by them.

    The norm is rounded to its type first, and the readers get the scale that it really has then: a norm that adds 1 to
    its weight (Gemma) keeps few digits of a small one.
    """
    import torch

    norm, layers = model.get_submodule(group.source), [model.get_submodule(name) for name in group.readers]
    offset = _offset(norm) or 0
    largest = 2 * torch.stack([layer.weight.float().abs().amax(0) for layer in layers]).amax(0)
    wanted = torch.where(largest > 0, span**strength / largest.clamp(min=SMALLEST) ** (1 - strength), span)
    old = norm.weight.float() + offset
    new = (old / wanted.clamp(min=SMALLEST) - offset).to(norm.weight.dtype)
    scale = old / (new.float() + offset)
    sound = torch.isfinite(scale) & (scale > 0)
    scale = torch.where(sound, scale, 1.0)
    norm.weight.data = torch.where(sound, new, norm.weight)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = (norm.bias.float() / scale).to(norm.bias.dtype)
    for layer in layers:
        layer.weight.data = (layer.weight.float() * scale).to(layer.weight.dtype)
