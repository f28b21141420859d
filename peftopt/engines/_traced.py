"""What the compiled engine has traced: the prompt, the step, and the parts of a model that are written for Inductor."""

from __future__ import annotations

from typing import Any

FEW_ROWS = 16
"""Rows up to which INT8 weights are multiplied as they are; for more it pays to unpack them first."""
TOGETHER = 8
"""Rows of tokens that are verified together, up to which a graph sums their products in one loop over the weights."""
VECTOR = 16
"""Bytes that PyTorch's kernel for INT8 weights loads at a time, from addresses that are multiples of it."""
FUSED = "peftopt_fused"
"""What `_fused` attention is registered as."""


def step(model: Any, token: Any, mask: Any, position: Any, slot: Any, keys: list[Any], values: list[Any]) -> Any:
    """One token for every row; the shapes are those of `compiled.State`, all of which but the mask it moves on by one.

    Returns the logits [rows, vocabulary]: they cost nothing more, and scoring looks at them.
    """
    logits = model(
        input_ids=token,
        attention_mask=mask,
        position_ids=position,
        past_key_values=_cache(slot, keys, values),
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    token.copy_(logits.argmax(-1, keepdim=True))
    position.add_(1)
    slot.add_(1)
    return logits


def verify(
    model: Any, tokens: Any, chosen: Any, mask: Any, position: Any, slot: Any, keys: list[Any], values: list[Any]
) -> Any:
    """Several tokens for every row: `tokens` [rows, width], the first of which is the next one. `chosen` becomes the
    model's choice after each. The state is left as it is: which of them stay is for others to say.

    Returns the logits [rows, width, vocabulary].
    """
    import torch

    after = torch.arange(tokens.shape[1], device=tokens.device)
    logits = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=(position + after).clamp(max=mask.shape[1] - 1),  # a place that a model has, for what fills up
        past_key_values=_cache(slot, keys, values),
        use_cache=True,
    ).logits
    chosen.copy_(logits.argmax(-1))
    return logits


def _cache(slot: Any, keys: list[Any], values: list[Any]) -> Any:
    """A static cache of these tensors, whose next token is at `slot`."""
    from transformers.cache_utils import Cache, StaticLayer

    layers = []
    for key, value in zip(keys, values, strict=True):
        layer = StaticLayer(max_cache_len=key.shape[2])
        # A copy, since a layer counts on by itself; nobody reads its count, so no graph holds it.
        layer.keys, layer.values, layer.cumulative_length = key, value, slot[0] + 0
        layer.device, layer.is_initialized = key.device, True
        layers.append(layer)
    return Cache(layers=layers)


def read(model: Any, ids: Any, mask: Any, position: Any, last: Any, keys: list[Any], values: list[Any]) -> Any:
    """The prompts, whose shapes are those of `compiled.Prompt`: fills the cache's places after the virtual tokens, and
    returns the logits [rows, vocabulary] of each prompt's next token."""
    from transformers.cache_utils import Cache, DynamicLayer

    virtual = mask.shape[1] - ids.shape[1]
    cache = Cache(layers=[DynamicLayer() for _ in keys])
    begin(cache, len(ids), keys, values, virtual)
    logits = model(
        input_ids=ids,
        attention_mask=mask if len(ids) > 1 else None,  # a lone prompt has no padding before it
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last,
    ).logits[:, -1]
    keep(cache, keys, values, virtual)
    return logits


def begin(cache: Any, rows: int, keys: list[Any], values: list[Any], virtual: int) -> None:
    """Let a cache that grows begin with the virtual tokens, the first places of a static one."""
    if virtual:
        for number, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key[:rows, :, :virtual], value[:rows, :, :virtual], number)


def keep(cache: Any, keys: list[Any], values: list[Any], start: int = 0) -> None:
    """Copy a cache that has grown into the first places of a static one, from the place `start` on."""
    for layer, key, value in zip(cache.layers, keys, values, strict=True):
        length = layer.keys.shape[2]
        key[:, :, start:length].copy_(layer.keys[:, :, start:])
        value[:, :, start:length].copy_(layer.values[:, :, start:])


def _linear(linear: Any, x: Any) -> Any:
    """Compute x @ W.T + b. For one row in a graph it is written as the sum of products that it is, because Inductor
    makes one pass over the weights of that, on a CPU two to three times faster than PyTorch's matrix product of one
    row. So it does for the few tokens of a row that are verified, where each is a sum of its own: Inductor fuses these,
    as long as what they read of the weights is not a tensor that they share."""
    import torch

    rows = x.numel() // x.shape[-1]
    weight, scale = (linear.weight, None) if linear.int8 is None else linear.int8
    if rows == 1 and torch.compiler.is_compiling():
        out = (x.reshape(1, -1).float() * weight.float()).sum(-1)
        out = (out if scale is None else out * scale.float()).to(x.dtype).view(*x.shape[:-1], -1)
    elif torch.compiler.is_compiling() and x.device.type == "cpu" and x.shape[-2] > 1 and rows <= TOGETHER:
        several = x.reshape(rows, -1).float()
        out = torch.stack([(several[row : row + 1] * weight).sum(-1) for row in range(rows)])
        out = (out if scale is None else out * scale.float()).to(x.dtype).view(*x.shape[:-1], -1)
    elif scale is None:
        return torch.nn.functional.linear(x, weight, linear.bias)
    elif rows <= FEW_ROWS and x.dtype == scale.dtype == torch.bfloat16 and x.device.type == "cpu" and _packs(weight):
        out = torch._weight_int8pack_mm(x.reshape(rows, -1), weight, scale).view(*x.shape[:-1], -1)
    else:
        # Scaled in fp32, the same number: else Inductor puts `_weight_int8pack_mm`, made for few rows, in its place.
        out = (torch.nn.functional.linear(x, weight.to(x.dtype)).float() * scale.float()).to(x.dtype)
    return out if linear.bias is None else out + linear.bias


def _packs(weight: Any) -> bool:
    """Whether PyTorch's kernel for INT8 weights [out, in] may be used: it reads past the end of rows that are no
    multiple of its vectors, which gives garbage or ends the process."""
    return bool(weight.shape[1] % VECTOR == 0)


def aligned(tensor: Any) -> Any:
    """The tensor, or a copy of one that does not begin where a vector of the processor may: a file's weights lie behind
    its header, and PyTorch's kernel for INT8 weights ends the process then."""
    return tensor.clone() if tensor.data_ptr() % VECTOR else tensor


def bind_linears(model: Any) -> None:
    """Let every plain linear layer, also those with torchao's INT8 weights, compute through `_linear`.

    Weights, names and adapters stay as they are. An Int8Tensor is taken apart once: a graph would do so at every call.
    """
    import types

    import torch

    linears: list[Any] = [module for module in model.modules() if type(module) is torch.nn.Linear]
    for linear in linears:
        weight = linear.weight
        packed = type(weight).__name__ == "Int8Tensor"
        if packed and (weight.act_quant_kwargs is not None or weight.scale.numel() != len(weight)):
            continue  # activations in INT8 too, or groups: torchao's own way
        if packed:
            weight.qdata = aligned(weight.qdata)  # in its place, so that it is not held twice
        # The scales in the weight's dtype, as torchao multiplies by them; Inductor's lowering needs them ready.
        linear.int8 = (weight.qdata, weight.scale.flatten().to(weight.dtype)) if packed else None
        linear.forward = types.MethodType(_linear, linear)


def share_layers(model: Any) -> None:
    """Mark the decoder's layers as regions that torch.compile traces once and uses for each. A layer becomes an
    instance of a subclass of its class, so that no other model in this process is touched."""
    import torch

    regions: dict[type, type] = {}
    for stack in (module for module in model.modules() if isinstance(module, torch.nn.ModuleList)):
        for layer in stack:
            if not hasattr(layer, "self_attn"):
                continue
            if (own := type(layer)) not in regions:
                region = torch.compiler.nested_compile_region(own.forward)
                regions[own] = type(own.__name__, (own,), {"forward": region})
            layer.__class__ = regions[own]


def _fused(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Any, None]:
    """Attention of a few new tokens, written out so that Inductor makes loops over the cache of it, without copying
    keys for the query heads that share them. Shapes: query [b, heads, new, d], key and value [b, groups, cache, d]."""
    import torch

    rows, heads, new, size = query.shape
    groups = key.shape[1]
    query = query.reshape(rows, groups, heads // groups, new, 1, size).float()
    scores = (query * key[:, :, None, None].float()).sum(-1) * scaling + attention_mask[:, :, None].float()
    weights = torch.softmax(scores, -1)[..., None]
    out = (weights * value[:, :, None, None].float()).sum(-2)
    return out.to(value.dtype).reshape(rows, heads, new, -1).transpose(1, 2), None


def register_fused() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(FUSED, _fused)
    AttentionMaskInterface.register(FUSED, eager_mask)
