"""A decode loop of our own around one compiled step: static key-value cache, arg-max inside the graph."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from peftopt import hf, identity, machine
from peftopt.engines import Generation, Scores, eager
from peftopt.errors import BadInput
from peftopt.records import Json, Model

TECHNIQUE = "compile"
NEEDS = eager.NEEDS
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
RECORDING = ("reduce-overhead", "max-autotune")
"""Modes that send a step to the GPU as one CUDA graph."""
ATTENTIONS = ("auto", "fused", "sdpa", "eager")
SHORTEST = 128
"""Tokens; the least length of a cache that sizes itself."""
FEW_ROWS = 16
"""Rows up to which INT8 weights are multiplied as they are; for more it pays to unpack them first."""
OPTIONS = {"cpp.dynamic_threads": True, "realize_reads_threshold": 0, "realize_opcount_threshold": 4}
"""Inductor's: kernels that serve any number of threads; and what several loops read is computed once, before them. By
default the normalized input of a projection was computed again for each of its outputs."""
FUSED = "peftopt_fused"


@dataclass(frozen=True)
class Params:
    """`mode` of torch.compile ("reduce-overhead" and "max-autotune" record CUDA graphs). `fullgraph`: refuse a model
    that breaks the graph; false counts the breaks. `dynamic`: one graph for all batch sizes and cache lengths, a slower
    one.

    `cache_len`: tokens the cache holds; a longer request is answered uncompiled, and counted. 0 takes the next power
    of two. `graphs`: the most shapes to compile for; further ones are answered uncompiled too.
    `regions`: trace and compile a layer once and use it for all: half the time to compile, and some 4 % slower tokens,
    since nothing is fused across layers.
    `attention`: "fused" (written out for one token), "sdpa", "eager" or "auto": on a CPU "fused" where the architecture
    is known to allow it, else "eager"; elsewhere the model's own.
    `device` as in `eager`.
    """

    mode: str = "default"
    fullgraph: bool = True
    dynamic: bool = False
    cache_len: int = 0
    graphs: int = 4
    regions: bool = False
    attention: str = "auto"
    device: str = "auto"


prepare = eager.prepare


def open(model: Model, params: Params) -> Compiled:
    """Load the model. The first request of each shape compiles, or loads what an earlier process compiled."""
    for name, value, known in (("mode", params.mode, MODES), ("attention", params.attention, ATTENTIONS)):
        if value not in known:
            raise BadInput(f"{name}: {value!r} is unknown", f"use one of {', '.join(known)}")
    return Compiled(model, params)


PLAIN = ("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "olmo2", "gemma")
"""Architectures whose attention is known to be the plain one."""

Shape = tuple[int, int]
"""Rows and cache length of a graph."""


class _State(NamedTuple):
    """What a step works on, in place: `token` and `position` [rows, 1], `mask` [rows, cache] with 0 for padding on the
    left, `slot` [1], the next token's place in the cache, and per layer `keys`, `values` [rows, heads, cache, size]."""

    token: Any
    mask: Any
    position: Any
    slot: Any
    keys: list[Any]
    values: list[Any]


class Compiled(eager.Transformers):
    """The prompt runs eagerly, as in `eager`; each further token is one call of a graph compiled for its shape.

    Where the graph is whole, it is compiled ahead of time, and kept in TORCHINDUCTOR_CACHE_DIR where that is set: a
    later process starts from it without tracing anything. Its guards are left out, since we know the shapes.
    """

    def __init__(self, model: Model, params: Params, backend: str = "inductor") -> None:
        super().__init__(model, params.device, unpacked=True)
        if self._one_by_one:
            raise BadInput("prompt methods (p-tuning, prefix, …) cannot be compiled here", "use the eager engine")
        self._params, self._backend = params, backend
        self._inner = self._owners[-1]  # below PEFT's wrapper, whose own forward adds nothing to LoRA's layers
        self._longest = _longest(self._inner.config)
        self._adapters = model.adapters
        self._attention = params.attention
        if params.attention == "auto":
            fused = self._inner.config.get_text_config().model_type in PLAIN
            self._attention = ("fused" if fused else "eager") if self._device.type == "cpu" else ""
        _bind_linears(self._inner)
        if params.regions:
            _share_layers(self._inner)
        self._steps: dict[Shape, tuple[Callable[..., Any], _State]] = {}
        self._any_shape: Callable[..., Any] | None = None
        self._uncompiled: Counter[str] = Counter()
        self._recompiled: Counter[str] = Counter()
        self._log: list[str] = []
        self._seconds = {"compile_time": 0.0, "warm_start": 0.0}
        self._before = _dynamo_counts()

    # ---- what it answers ------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        import torch

        shape = self._shape(len(prompts), max(map(len, prompts)) + new_tokens, timed=not stop)
        if shape is None:
            return super().generate(prompts, new_tokens, stop)
        with torch.inference_mode():
            step, state = self._step(shape)
            tokens = self._prefill(_filled_up(prompts, shape), state).argmax(-1)
            columns, times = [tokens.tolist()], [time.perf_counter_ns()]
            eos = self.eos if stop else frozenset()
            going = [row for row in range(len(prompts)) if columns[0][row] not in eos]
            with self._decoding():
                while going and len(columns) < new_tokens:
                    step(self._inner, *state)
                    columns.append(state.token[:, 0].tolist())  # on CUDA this waits for the step to be over
                    times.append(time.perf_counter_ns())
                    going = [row for row in going if columns[-1][row] not in eos]
        rows = list(zip(*columns, strict=True))[: len(prompts)]
        return [eager._trimmed(list(row), times, eos) for row in rows]

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """Feed the answers to the compiled step, token by token: these are the predictions of the graph itself."""
        import torch

        longest = max(map(len, answers))
        shape = self._shape(len(prompts), max(map(len, prompts)) + longest, timed=False)
        if shape is None:
            return super().score(prompts, answers)
        filled = _filled_up(answers, shape)
        given = torch.tensor([[*a, *[0] * (longest - len(a))] for a in filled], device=self._device)
        with torch.inference_mode():
            step, state = self._step(shape)
            shared = eager._shared_prefix(prompts)
            logits, columns = self._prefill(_filled_up(prompts, shape), state, shared), []
            with self._decoding():
                for column in range(longest):
                    columns.append(eager._scored(logits[: len(answers)], given[: len(answers), column].tolist()))
                    if column + 1 < longest:
                        state.token.copy_(given[:, column : column + 1])
                        logits = step(self._inner, *state)
        return [_row(columns[: len(answer)], row) for row, answer in enumerate(answers)]

    def switch(self, adapter: str) -> float:
        """Serve another LoRA from now on; seconds it took. Raises BadInput for one that this engine cannot take.

        Its weights are copied over those of the one before, which are inputs of the graphs, so nothing is compiled
        again. Where its scaling or a larger rank changes the graph itself, the graphs are dropped, and that is counted.
        """
        from peft.utils.hotswap import hotswap_adapter

        if len(self._adapters) != 1:
            raise BadInput("only a model with one adapter can switch it", "open the base with one --adapter on top")
        hf.adapter_weights(adapter)
        started = time.perf_counter()
        before = _lora_shape(self._inner)
        with hf.refusing(adapter):
            hotswap_adapter(self._model, adapter, adapter_name="adapter0", torch_device=str(self._device))
        self._adapters = (adapter,)
        if _lora_shape(self._inner) != before:
            self._recompiled["an adapter of another rank or scaling"] += len(self._steps)
            self._steps.clear()
        return time.perf_counter() - started

    def facts(self) -> dict[str, Json]:
        """How it got ready: seconds to compile and to load what was compiled before, graphs, breaks and recompiles
        with their reasons, requests answered uncompiled; `log` says the same to a reader."""
        graphs, breaks, recompiles = (now - then for now, then in zip(_dynamo_counts(), self._before, strict=True))
        recompiles += self._recompiled
        uncompiled = [f"{n} requests answered uncompiled: {why}" for why, n in self._uncompiled.items()]
        return {
            **{name: seconds for name, seconds in self._seconds.items() if seconds},
            "graphs": max(len(self._steps) if self._ahead else graphs.total(), 0),
            "graph_breaks": breaks.total(),
            "recompiles": recompiles.total(),
            "uncompiled": self._uncompiled.total(),
            "log": [
                *self._log,
                *(f"graph break ({n}): {why}" for why, n in breaks.items()),
                *(f"recompiled: {why}" for why in recompiles),
                *uncompiled,
            ],
        }

    def close(self) -> None:
        self._inner, self._any_shape = None, None
        self._steps.clear()
        super().close()

    # ---- shapes ---------------------------------------------------------------------------------

    def _shape(self, rows: int, length: int, timed: bool) -> Shape | None:
        """The shape that answers so many rows of at most `length` tokens: rows padded to a power of two, the cache to
        its set length or a power of two. What is not `timed` takes a graph for more rows rather than have one compiled
        for the last few. None for what has to run uncompiled: bounded shapes are bounded compiling."""
        batch = 2 ** (rows - 1).bit_length()
        room = self._params.cache_len or max(SHORTEST, 2 ** (length - 1).bit_length())
        fits = [s for s in self._steps if s[1] >= length and (s[0] == batch or (s[0] > batch and not timed))]
        if fits:
            return min(fits)
        if length > min(room, self._longest):
            self._uncompiled[f"longer than the cache of {min(room, self._longest)} tokens"] += 1
        elif len(self._steps) >= self._params.graphs:
            self._uncompiled[f"more shapes than graphs: {self._params.graphs}"] += 1
        else:
            return batch, min(room, self._longest)
        return None

    def _step(self, shape: Shape) -> tuple[Callable[..., Any], _State]:
        if shape not in self._steps:
            state = self._empty(shape)
            self._steps[shape] = self._ready(shape, state), state
        return self._steps[shape]

    def _empty(self, shape: Shape) -> _State:
        """The tensors that a graph of this shape works on, made once: CUDA graphs need them to stay where they are."""
        import torch
        from transformers import DynamicCache

        probe = DynamicCache(config=self._inner.config)
        one = torch.ones(1, 1, dtype=torch.long, device=self._device)
        self._inner(input_ids=one, past_key_values=probe, use_cache=True)  # tells heads and sizes of every layer
        rows, room = shape

        def whole(*size: int) -> Any:
            return torch.ones(size, dtype=torch.long, device=self._device)

        def slots(like: Any) -> Any:
            return torch.zeros(rows, like.shape[1], room, like.shape[3], dtype=like.dtype, device=self._device)

        keys, values = [slots(layer.keys) for layer in probe.layers], [slots(layer.values) for layer in probe.layers]
        if not self._ahead:  # torch records no CUDA graph that writes to inputs which might move
            for each in (*keys, *values):
                torch._dynamo.mark_static_address(each)
        return _State(whole(rows, 1), whole(rows, room), whole(rows, 1), whole(1), keys, values)

    def _prefill(self, prompts: Sequence[Sequence[int]], state: _State, shared: int = 0) -> Any:
        """Run the prompts eagerly, and put their keys and values in place; logits [rows, vocabulary] of the next token.

        Not compiled: it is all matrix products, which a graph does not make faster, and so any length will do. The
        first `shared` tokens of all prompts are run once.
        """
        import torch
        from transformers import DynamicCache

        ids, mask = self._left_padded([prompt[shared:] for prompt in prompts])
        cache = DynamicCache(config=self._inner.config)
        if shared:
            prefix = torch.tensor([prompts[0][:shared]], device=self._device)
            self._inner(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(prompts))
            mask = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, shared), mask], dim=1)
        out = self._inner(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, shared:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        length = mask.shape[1]
        for layer, keys, values in zip(cache.layers, state.keys, state.values, strict=True):
            keys[:, :, :length].copy_(layer.keys)
            values[:, :, :length].copy_(layer.values)
        state.mask[:, :length].copy_(mask)
        state.mask[:, length:].fill_(1)
        state.position.copy_(mask.sum(1, keepdim=True))
        state.slot.fill_(length)
        logits = out.logits[:, -1]
        state.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    # ---- compiling ------------------------------------------------------------------------------

    @property
    def _ahead(self) -> bool:
        """Whether graphs are compiled ahead of time. Those with breaks or free sizes only come just in time, with their
        guards; and so do all with a torch older than 2.10."""
        whole = self._params.fullgraph and not self._params.dynamic and self._backend == "inductor"
        return whole and _can_compile_ahead()

    def _ready(self, shape: Shape, state: _State) -> Any:
        """The step for a shape, run once. Raises BadInput for a model that torch.compile cannot take in one graph."""
        import torch

        build: Any = torch.compile  # its types promise no more than the function it is given
        step: Any
        started = time.perf_counter()
        file = self._kept(shape)
        warm = file is not None and file.exists()
        with self._attending(), _refusing():
            if not self._ahead:
                settings: dict[str, Any] = {"fullgraph": self._params.fullgraph, "dynamic": self._params.dynamic}
                settings |= {"mode": self._params.mode} if self._backend == "inductor" else {"backend": self._backend}
                self._any_shape = self._any_shape or build(_step, **settings)
                step = self._any_shape
            elif file is not None and warm:
                with file.open("rb") as handle:
                    step = torch.compiler.load_compiled_function(handle)
                step.disable_guard_check()
            else:
                # A mode and options exclude each other, but a mode is no more than options. CUDA graphs we record
                # ourselves: torch's own would look at every call whether its inputs are still the same.
                options = {**OPTIONS, **torch._inductor.list_mode_options(self._params.mode)}
                options["triton.cudagraphs"] = False
                options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
                step = build(_step, fullgraph=True, dynamic=False, options=options)
                step = step.aot_compile(((self._inner, *state), {}))
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    step.save_compiled_function(str(file))
                step.disable_guard_check()
            step(self._inner, *state)
            if self._ahead and self._device.type == "cuda" and self._params.mode in RECORDING:
                step = _recorded(step, self._inner, state)
        seconds = time.perf_counter() - started
        self._seconds["warm_start" if warm else "compile_time"] += seconds
        how = "started from the compile cache" if warm else f"compiled in {seconds:.1f} s"
        self._log.append(f"batch {shape[0]}, cache {shape[1]}: {how}")
        return step

    def _kept(self, shape: Shape) -> Path | None:
        """Where the compiled step for this shape is kept. Weights are inputs of a graph: their values do not matter."""
        home = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        if not home or not self._ahead:
            return None
        tensors = [
            (n, str(t.dtype), tuple(t.shape))
            for n, t in [*self._inner.named_parameters(), *self._inner.named_buffers()]
        ]
        shaping = {
            "shape": shape,
            "mode": self._params.mode,
            "regions": self._params.regions,
            "options": OPTIONS,
            "attention": self._attention,
            "config": self._inner.config.to_json_string(),
            "adapters": [identity.of_file(Path(a) / "adapter_config.json") for a in self._adapters],
            "tensors": tensors,
            "versions": machine.versions(),
            "device": str(self._device),
            "processor": machine.processor(),
            "code": [inspect.getsource(part) for part in (_step, _linear, _fused, _share_layers)],
        }
        return Path(home) / "steps" / f"{identity.of_value(shaping)[:32]}.step"

    def _decoding(self) -> contextlib.AbstractContextManager[None]:
        """A graph compiled ahead of time has its attention in it; one with guards looks at the model's setting."""
        return contextlib.nullcontext() if self._ahead else self._attending()

    @contextlib.contextmanager
    def _attending(self) -> Iterator[None]:
        """The model with the attention that is compiled; outside, prompts run with its own."""
        own = self._inner.config._attn_implementation
        if self._attention == "fused":
            _register_fused()
        try:
            self._inner.set_attn_implementation(FUSED if self._attention == "fused" else self._attention or own)
            yield
        finally:
            self._inner.set_attn_implementation(own)


# ---- the step: what is traced ------------------------------------------------------------------------


def _step(model: Any, token: Any, mask: Any, position: Any, slot: Any, keys: list[Any], values: list[Any]) -> Any:
    """One token for every row; the shapes are those of `_State`, all of which but the mask it moves on by one.

    Returns the logits [rows, vocabulary]: they cost nothing more, and scoring looks at them.
    """
    from transformers.cache_utils import Cache, StaticLayer

    layers = []
    for key, value in zip(keys, values, strict=True):
        layer = StaticLayer(max_cache_len=key.shape[2])
        # A copy, since a layer counts on by itself; nobody reads its count, so no graph holds it.
        layer.keys, layer.values, layer.cumulative_length = key, value, slot[0] + 0
        layer.device, layer.is_initialized = key.device, True
        layers.append(layer)
    logits = model(
        input_ids=token,
        attention_mask=mask,
        position_ids=position,
        past_key_values=Cache(layers=layers),
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    token.copy_(logits.argmax(-1, keepdim=True))
    position.add_(1)
    slot.add_(1)
    return logits


def _recorded(step: Callable[..., Any], model: Any, state: _State) -> Callable[..., Any]:
    """A compiled step as one CUDA graph: a single call sends all its kernels. It works on `state` where that lies."""
    import torch

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(model, *state)

    def replay(*_: Any) -> Any:
        graph.replay()
        return logits

    return replay


def _linear(linear: Any, x: Any) -> Any:
    """x @ W.T + b. For one row in a graph it is written as the sum of products that it is, because Inductor makes one
    pass over the weights of that, on a CPU two to three times faster than PyTorch's matrix product of one row."""
    import torch

    rows = x.numel() // x.shape[-1]
    weight, scale = (linear.weight, None) if linear.int8 is None else linear.int8
    if rows == 1 and torch.compiler.is_compiling():
        out = (x.reshape(1, -1).float() * weight.float()).sum(-1)
        out = (out if scale is None else out * scale.float()).to(x.dtype).view(*x.shape[:-1], -1)
    elif scale is None:
        return torch.nn.functional.linear(x, weight, linear.bias)
    elif rows <= FEW_ROWS and x.dtype == scale.dtype == torch.bfloat16 and x.device.type == "cpu":
        out = torch._weight_int8pack_mm(x.reshape(rows, -1), weight, scale).view(*x.shape[:-1], -1)
    else:
        out = torch.nn.functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
    return out if linear.bias is None else out + linear.bias


def _bind_linears(model: Any) -> None:
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
        # The scales in the weight's dtype, as torchao multiplies by them; Inductor's lowering needs them ready.
        linear.int8 = (weight.qdata, weight.scale.flatten().to(weight.dtype)) if packed else None
        linear.forward = types.MethodType(_linear, linear)


def _share_layers(model: Any) -> None:
    """Mark the decoder's layers as regions that torch.compile traces once and uses for each. A layer becomes an
    instance of a subclass of its class, so that no other model in this process is touched."""
    import torch

    made: dict[type, type] = {}
    for stack in (module for module in model.modules() if isinstance(module, torch.nn.ModuleList)):
        for layer in stack:
            if not hasattr(layer, "self_attn"):
                continue
            if (own := type(layer)) not in made:
                region = torch.compiler.nested_compile_region(own.forward)
                made[own] = type(own.__name__, (own,), {"forward": region})
            layer.__class__ = made[own]


def _fused(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Any, None]:
    """Attention of one new token, written out so that Inductor makes loops over the cache of it, without copying keys
    for the query heads that share them. Shapes: query [b, heads, 1, d], key and value [b, groups, cache, d]."""
    import torch

    rows, heads, _, size = query.shape
    groups = key.shape[1]
    query = query.reshape(rows, groups, heads // groups, 1, size).float()
    scores = (query * key[:, :, None].float()).sum(-1) * scaling + attention_mask[:, :, None, 0].float()
    weights = torch.softmax(scores, -1)[..., None]
    out = (weights * value[:, :, None].float()).sum(3)
    return out.to(value.dtype).reshape(rows, 1, heads, -1), None


def _register_fused() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(FUSED, _fused)
    AttentionMaskInterface.register(FUSED, eager_mask)


# ---- what can be compiled ----------------------------------------------------------------------------


def _longest(config: Any) -> int:
    """Tokens that a static cache may hold. Raises BadInput for layers that keep something else than keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=config).layers
    if odd := {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise BadInput(f"its {', '.join(sorted(odd))} cannot be held in a static cache", "use the eager engine")
    assert all(isinstance(layer, DynamicLayer) for layer in layers)
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return int(min([*windows, getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31]))


@lru_cache
def _can_compile_ahead() -> bool:
    """Whether this torch can; up to 2.11 it has to be told that it may."""
    import torch

    if hasattr(torch._dynamo.config, "enable_aot_compile"):
        torch._dynamo.config.enable_aot_compile = True
    return hasattr(torch.compiler, "load_compiled_function")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """A model that Dynamo cannot take in one graph, as bad input that names the cause."""
    import torch

    try:
        yield
    except torch._dynamo.exc.Unsupported as error:
        cause = " ".join(str(error).split())[:300]
        hint = "fullgraph: false compiles around the breaks and counts them; or use the eager engine"
        raise BadInput(f"torch.compile cannot take this model in one graph: {cause}", hint) from error


def _dynamo_counts() -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Graphs, breaks by cause and recompiles by reason, of this process so far."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    reasons = Counter(m.recompile_reason.splitlines()[0] for m in get_compilation_metrics() if m.recompile_reason)
    return Counter(graphs=counters["stats"]["unique_graphs"]), Counter(counters["graph_break"]), reasons


def _lora_shape(model: Any) -> list[Any]:
    """What of its LoRAs is part of a graph: the shapes of their weights, and the scalings, which are numbers in it."""
    shapes = [tuple(value.shape) for name, value in model.named_parameters() if ".lora_" in name]
    scalings = [getattr(module, "scaling", None) for module in model.modules()]
    return [*shapes, *(dict(scaling) for scaling in scalings if isinstance(scaling, dict))]


# ---- small parts -------------------------------------------------------------------------------------


def _filled_up(rows: Sequence[Sequence[int]], shape: Shape) -> list[Sequence[int]]:
    """As many rows as the graph has: the last one repeated."""
    return [*rows, *[rows[-1]] * (shape[0] - len(rows))]


def _row(columns: Sequence[Scores], row: int) -> Scores:
    """The scores of one answer out of those of its columns, each of which holds a token of every answer."""

    def pick(name: str) -> list[Any]:
        return [getattr(column, name)[row] for column in columns]

    logprobs = pick("logprobs")
    return Scores(logprobs, pick("best"), pick("top_ids"), pick("top_logprobs"), all(map(math.isfinite, logprobs)))
