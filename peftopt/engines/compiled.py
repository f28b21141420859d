"""peftopt's decode loop around a compiled prompt and a compiled step: static cache, arg-max in the graph."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from peftopt import plugins
from peftopt.engines import Generation, Scores, _graphs, _traced, eager
from peftopt.engines._prefix import Reuse, check_alone
from peftopt.engines._speculation import Lookup, Speculation, decode, indexed
from peftopt.engines._text import trimmed
from peftopt.errors import BadInput
from peftopt.models import baked, hf
from peftopt.records import Json, Model

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
ATTENTIONS = ("auto", "fused", "sdpa", "eager")
AUTO, EAGERLY = "auto", "none"
SHORTEST = 128
"""The least length of a cache of automatic size, in tokens."""
SELDOM = 0.01
"""Prompt lengths of at most this share of a workload's requests are not compiled for."""


@dataclass(frozen=True)
class Params:
    """`mode` of torch.compile ("reduce-overhead" and "max-autotune" record CUDA graphs). `fullgraph`: refuse a model
    that breaks the graph; false counts the breaks. `dynamic`: one graph for all batch sizes and cache lengths, a slower
    one.

    `cache_len`: tokens the cache holds; a longer request is answered uncompiled, and counted. 0 takes the next power
    of two. `graphs`: the most shapes to compile for; further ones are answered uncompiled too.
    `prompt_buckets`: the lengths that prompts are padded to, each compiled for: "128, 192"; "auto" takes powers of two
    and the lengths half way between them; "none" runs prompts eagerly. So do prompts longer than the longest, and
    those of further lengths after `prompt_graphs` of them; they are counted.
    `regions`: trace and compile a layer once and use it for all: half the time to compile, and some 4 % slower tokens,
    since nothing is fused across layers.
    `attention`, of the step: "fused" (written out for one token), "sdpa", "eager" or "auto": on a CPU "fused" where the
    architecture is known to allow it, else "eager"; elsewhere the model's own. Prompts always run with the model's own.
    `device` as in `eager`.
    """

    mode: str = "default"
    fullgraph: bool = True
    dynamic: bool = False
    cache_len: int = 0
    graphs: int = 4
    prompt_buckets: str = AUTO
    prompt_graphs: int = 4
    regions: bool = False
    attention: str = "auto"
    device: str = "auto"


PLUGIN = plugins.engine(
    Params,
    technique="compile",
    needs=eager.PLUGIN.needs,
    speculates=("prompts", "batches", "shortest", "answers"),
    reuses=True,
)


prepare = eager.prepare


def open(model: Model, params: Params, speculation: Speculation | None = None, reuse: Reuse | None = None) -> Compiled:
    """Load the model. The first request of each shape compiles, or loads what an earlier process compiled.

    Raises BadInput for parameters that mean nothing, and for models that no graph can hold.
    """
    for name, value, known in (("mode", params.mode, MODES), ("attention", params.attention, ATTENTIONS)):
        if value not in known:
            raise BadInput(f"{name}: {value!r} is unknown", f"use one of {', '.join(known)}")
    buckets(params.prompt_buckets, 1)
    check_alone(speculation, reuse)
    return Compiled(model, params, speculation=speculation, reuse=reuse)


def buckets(asked: str, room: int) -> list[int]:
    """The lengths that prompts are padded to in a cache of `room` tokens, ascending. Raises BadInput for no lengths."""
    if asked == EAGERLY:
        return []
    if asked == AUTO:
        lengths = [room, *(size for power in range(5, 31) for size in (2**power, 3 * 2 ** (power - 1)))]
    else:
        try:
            lengths = [int(text) for text in asked.split(",")]
        except ValueError:
            lengths = [0]
        if min(lengths) < 2:
            raise BadInput(f"prompt_buckets: {asked!r} holds no lengths", 'write "128, 256", or auto, or none')
    return sorted({length for length in lengths if length <= room})


PLAIN = ("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "olmo2", "gemma")
"""Architectures whose attention is known to be the plain one."""

Shape = tuple[int, int]
"""Rows and cache length of a graph."""

PromptShape = tuple[int, int, int]
"""Rows, cache length, and the length that prompts are padded to."""


class State(NamedTuple):
    """What a step works on, in place: `token` and `position` [rows, 1], `mask` [rows, cache] with 0 for padding before
    prompts, `slot` [1], the next token's place in the cache, and per layer `keys`, `values` [rows, heads, cache, size].
    A baked prompt has the first slots, in which nothing is written again."""

    token: Any
    mask: Any
    position: Any
    slot: Any
    keys: list[Any]
    values: list[Any]


class Prompt(NamedTuple):
    """What a prompt's graph works on: `ids` and `position` [rows, bucket], padded on the left to the longest prompt and
    on the right to the bucket; `mask` [rows, virtual tokens + bucket]; `last` [1], the place of the last token."""

    ids: Any
    mask: Any
    position: Any
    last: Any


class Draft(NamedTuple):
    """What is verified: the `tokens` that are fed, and those that the model has `chosen` after each, both [rows, 1 +
    proposed]."""

    tokens: Any
    chosen: Any


Verified = tuple[Callable[..., Any], Draft]
"""A graph for several tokens at once, and its tensors."""


class Compiled(eager.Transformers):
    """The prompt is one call of a graph compiled for its rows and its length, padded to a bucket; each further token is
    one call of another.

    Where the graph is whole, it is compiled ahead of time, and kept in TORCHINDUCTOR_CACHE_DIR where that is set: a
    later process starts from it without tracing anything. Its guards are left out, since we know the shapes.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        backend: str = "inductor",
        speculation: Speculation | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        super().__init__(model, params.device, unpacked=True, reuse=reuse)
        if self._one_by_one:
            what = "the virtual tokens of a live prompt method (p-tuning, prefix, …) cannot be compiled"
            raise BadInput(what, "bake them first (peftopt bake), or use the eager engine")
        if any(type(module).__name__ == "Linear8bitLt" for module in self._model.modules()):
            what = "LLM.int8() (bnb8) sets its weights anew at every call, which no graph can hold"
            raise BadInput(what, "quantize with int8 to compile, or use the eager engine")
        self._params = params
        self._inner = self._owners[-1]  # below PEFT's wrapper, whose own forward adds nothing to LoRA's layers
        self._longest = _longest(self._inner.config)
        self._adapters = () if self._prefix else model.adapters
        self._attention = params.attention
        if params.attention == "auto":
            fused = self._inner.config.get_text_config().model_type in PLAIN
            self._attention = ("fused" if fused else "eager") if self._device.type == "cpu" else ""
        _traced.bind_linears(self._inner)
        if params.regions:
            _traced.share_layers(self._inner)
        self._graphs = _graphs.Graphs(self._inner, params, self._device, backend)
        self._steps: dict[Shape, tuple[Callable[..., Any], State]] = {}
        self._prompts: dict[PromptShape, tuple[Callable[..., Any], Prompt]] = {}
        self._verifiers: dict[Shape, Verified] = {}
        self._speculation = speculation
        self._answers: Lookup | None = None
        self.speculates = speculation is not None
        self._ahead = speculation.tokens if speculation else 0
        self._warmed: set[Shape] = set()
        self._eager_prompts: Counter[str] = Counter()
        self._uncompiled: Counter[str] = Counter()
        self._recompiled: Counter[str] = Counter()
        self._before = _graphs.dynamo_counts()

    # ---- what it answers ------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """By the graphs of the batch's shape; as `eager`, and counted, where no graph takes it."""
        import torch

        if self._bare:  # the graphs have the adapters in them
            return super().generate(prompts, new_tokens, stop)
        shape = self._shape(len(prompts), max(map(len, prompts)) + new_tokens, timed=not stop)
        if isinstance(shape, str):
            self._uncompiled[shape] += 1
            return super().generate(prompts, new_tokens, stop)
        eos = self.eos if stop else frozenset()
        with torch.inference_mode():
            step, state = self._step(shape)
            start = self._kept.match(prompts, self._prefix, bare=False) if self._kept else None
            tokens = self._prefill(filled_up(prompts, shape), shape, state, timed=not stop, start=start).argmax(-1)
            if self._speculation:
                return self._speculated(shape, prompts, tokens.tolist()[: len(prompts)], new_tokens, eos)
            columns, times = [tokens.tolist()], [time.perf_counter_ns()]
            going = [row for row in range(len(prompts)) if columns[0][row] not in eos]
            with self._decoding():
                while going and len(columns) < new_tokens:
                    step(self._inner, *state)
                    columns.append(state.token[:, 0].tolist())  # on CUDA this waits for the step to be over
                    times.append(time.perf_counter_ns())
                    going = [row for row in going if columns[-1][row] not in eos]
            if self._kept:
                layers = list(zip(state.keys, state.values, strict=True))
                self._kept.keep(prompts, layers, self.virtual_tokens + max(map(len, prompts)), bare=False)
        rows = list(zip(*columns, strict=True))[: len(prompts)]
        told = None if self._kept is None else start.tokens - self.virtual_tokens if start else 0
        return [replace(trimmed(list(row), times, eos), reused=told) for row in rows]

    def _speculated(
        self,
        shape: Shape,
        prompts: Sequence[Sequence[int]],
        first: Sequence[int],
        new_tokens: int,
        eos: frozenset[int],
    ) -> list[Generation]:
        """Decode with speculation. Rejected tokens of a row stay in the cache and are masked."""
        assert self._speculation
        lookups = [Lookup(self._speculation, self._answers) for _ in prompts]
        for lookup, prompt in zip(lookups, prompts, strict=True):
            lookup.extend(prompt)
        used = self.virtual_tokens + max(map(len, prompts)) + self._ahead
        step, state = self._step(shape)
        batch = _Batch(self._inner, shape[1] - used, state, step, self._verifier(shape))
        with self._decoding():
            return decode(batch, lookups, first, new_tokens, eos, self._ahead)

    def remember(self, answers: Sequence[Sequence[int]]) -> None:
        """Look up proposals in these answers, after a row's own tokens."""
        assert self._speculation
        self._answers = indexed(answers, self._speculation)

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """Feed the answers to the compiled step, token by token: these are the predictions of the graphs themselves.
        One that speculates feeds as many tokens at once as it verifies."""
        import torch

        if self._bare:  # the graphs have the adapters in them
            return super().score(prompts, answers)
        longest = max(map(len, answers))
        shape = self._shape(len(prompts), max(map(len, prompts)) + longest, timed=False)
        if isinstance(shape, str):
            self._uncompiled[shape] += 1
            return super().score(prompts, answers)
        filled = filled_up(answers, shape)
        given = torch.tensor([[*a, *[0] * (longest - len(a))] for a in filled], device=self._device)
        with torch.inference_mode():
            _, state = self._step(shape)
            shared, columns = eager.shared_prefix(prompts), []
            logits = self._prefill(filled_up(prompts, shape), shape, state, timed=False, shared=shared)[:, None]
            width = 1 + self._ahead
            with self._decoding():
                for column in range(longest):
                    at = (column - 1) % width if column else 0
                    columns.append(eager.scored(logits[: len(answers), at], given[: len(answers), column].tolist()))
                    if column + 1 < longest and column % width == 0:
                        logits = self._fed(shape, given[:, column : column + width])
        return [_row(columns[: len(answer)], row) for row, answer in enumerate(answers)]

    def _fed(self, shape: Shape, tokens: Any) -> Any:
        """Feed tokens [rows, at most as many as are verified], and keep them; logits [rows, width, vocabulary]."""
        step, state = self._step(shape)
        if not self._speculation:
            state.token.copy_(tokens)
            return step(self._inner, *state)[:, None]
        verify, draft = self._verifier(shape)
        draft.tokens[:, : tokens.shape[1]].copy_(tokens)
        logits = verify(self._inner, *draft, *state[1:])
        state.position.add_(1 + self._ahead)
        state.slot.add_(1 + self._ahead)
        return logits

    def warm(self, lengths: Sequence[int], rows: int, new_tokens: int, timed: bool) -> None:
        """Get ready for requests of `rows` prompts out of some of these lengths: compile, or load what an earlier
        process compiled, for every bucket that the longest of them is likely to fall in. The largest serves what is
        left, and what is not `timed`."""
        import torch

        self._warmed.clear()
        seldom = math.ceil(len(lengths) * SELDOM ** (1 / rows))  # that many of all are in no batch the longest
        for longest in reversed(sorted(lengths)[max(min(rows, len(lengths)), seldom) - 1 :]):
            if isinstance(shape := self._shape(rows, longest + new_tokens, timed), str):
                continue
            with torch.inference_mode():
                self._step(shape)
                if self._speculation:
                    self._verifier(shape)
                if not isinstance(bucket := self._bucket(shape, longest, timed), str):
                    self._prompt(bucket)
            if not timed:
                break
        self._warmed |= self._steps.keys()

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
        if self._kept:
            self._kept.switched(adapter)
        if _lora_shape(self._inner) != before:
            self._recompiled["an adapter of another rank or scaling"] += self._made
            self._drop()
            self._warmed.clear()
        return time.perf_counter() - started

    def facts(self) -> dict[str, Json]:
        """How it got ready: seconds to compile and to load what was compiled before, graphs, breaks and recompiles
        with their reasons, requests answered uncompiled; `log` says the same to a reader."""
        graphs, breaks, recompiles = (
            now - then for now, then in zip(_graphs.dynamo_counts(), self._before, strict=True)
        )
        recompiles += self._recompiled
        uncompiled = [f"{n} requests answered uncompiled: {why}" for why, n in self._uncompiled.items()]
        uncompiled += [f"{n} requests with an eager prompt: {why}" for why, n in self._eager_prompts.items()]
        return {
            **super().facts(),
            **{name: seconds for name, seconds in self._graphs.seconds.items() if seconds},
            "graphs": max(self._made if self._graphs.ahead else graphs.total(), 0),
            "graph_breaks": breaks.total(),
            "recompiles": recompiles.total(),
            "uncompiled": self._uncompiled.total(),
            "eager_prompts": self._eager_prompts.total(),
            "log": [
                *self._graphs.log,
                *(f"graph break ({n}): {why}" for why, n in breaks.items()),
                *(f"recompiled ({n}): {why}" for why, n in recompiles.items()),
                *uncompiled,
            ],
        }

    def close(self) -> None:
        """Free the graphs and the model."""
        self._inner = None
        self._graphs.close()
        self._drop()
        super().close()

    @property
    def _made(self) -> int:
        """The number of graphs."""
        return len(self._steps) + len(self._prompts) + len(self._verifiers)

    def _drop(self) -> None:
        """Drop all graphs."""
        for graphs in (self._steps, self._prompts, self._verifiers):
            graphs.clear()

    # ---- shapes ---------------------------------------------------------------------------------

    def _shape(self, rows: int, length: int, timed: bool) -> Shape | str:
        """The shape that answers so many rows of at most `length` tokens after the virtual ones: rows padded to a power
        of two, the cache to its set length or a power of two. What is not `timed` takes a graph for more rows rather
        than have one compiled for the last few. Or why it has to run uncompiled: bounded shapes are bounded compiling.
        """
        length += self.virtual_tokens + self._ahead
        batch = 2 ** (rows - 1).bit_length()
        room = self._params.cache_len or max(SHORTEST, 2 ** (length - 1).bit_length())
        fits = [s for s in self._steps if s[1] >= length and (s[0] == batch or (s[0] > batch and not timed))]
        if fits:
            return min(fits)
        if length > min(room, self._longest):
            return f"longer than the cache of {min(room, self._longest)} tokens"
        if len(self._steps) >= self._params.graphs:
            return f"more shapes than graphs: {self._params.graphs}"
        return batch, min(room, self._longest)

    def _bucket(self, shape: Shape, length: int, timed: bool) -> PromptShape | str:
        """The graph for prompts of that length, in front of a step of that shape. What is not `timed` takes one for
        longer prompts rather than have another compiled. Or why the prompts have to run eagerly, "" where they are
        meant to."""
        asked = self._params.prompt_buckets
        enough = [bucket for bucket in buckets(asked, shape[1] - self.virtual_tokens) if bucket >= length]
        there = [bucket for bucket in enough if (*shape, bucket) in self._prompts]
        if not enough:
            return "" if asked == EAGERLY else f"longer than the longest of prompt_buckets: {asked}"
        full = len(self._prompts) >= self._params.prompt_graphs or shape in self._warmed
        if there and (there[0] == enough[0] or full or not timed):
            return *shape, there[0]
        if len(self._prompts) >= self._params.prompt_graphs:
            return f"more lengths than prompt_graphs: {self._params.prompt_graphs}"
        return *shape, enough[0]

    def _step(self, shape: Shape) -> tuple[Callable[..., Any], State]:
        if shape not in self._steps:
            state = self._empty(shape)
            with self._attending():
                what = f"batch {shape[0]}, cache {shape[1]}"
                graph = self._graphs.ready(_traced.step, shape, state, self._adapters, what)
            self._steps[shape] = graph, state
        return self._steps[shape]

    def _verifier(self, shape: Shape) -> Verified:
        import torch

        if shape not in self._verifiers:
            _, state = self._step(shape)
            sizes = (*shape, 1 + self._ahead)
            tokens, chosen = (torch.ones(shape[0], sizes[2], dtype=torch.long, device=self._device) for _ in range(2))
            draft = Draft(tokens, chosen)
            with self._attending():
                what = f"batch {shape[0]}, cache {shape[1]}, {self._ahead} tokens proposed"
                graph = self._graphs.ready(_traced.verify, sizes, (*draft, *state[1:]), self._adapters, what)
            self._verifiers[shape] = graph, draft
        return self._verifiers[shape]

    def _prompt(self, shape: PromptShape) -> tuple[Callable[..., Any], Prompt]:
        import torch

        if shape not in self._prompts:
            rows, room, bucket = shape
            ids, position = (torch.ones(rows, bucket, dtype=torch.long, device=self._device) for _ in range(2))
            mask = torch.ones(rows, self.virtual_tokens + bucket, dtype=torch.long, device=self._device)
            prompt = Prompt(ids, mask, position, torch.zeros(1, dtype=torch.long, device=self._device))
            state = self._steps[rows, room][1]
            what = f"batch {rows}, cache {room}, prompts up to {bucket}"
            arguments = (*prompt, state.keys, state.values)
            sizes = (*shape, self.virtual_tokens)
            graph = self._graphs.ready(_traced.read, sizes, arguments, self._adapters, what)
            self._prompts[shape] = graph, prompt
        return self._prompts[shape]

    def _empty(self, shape: Shape) -> State:
        """The tensors that a graph of this shape works on, made once: CUDA graphs need them to stay where they are. A
        baked prompt is copied into them here, and never again."""
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
        if self._prefix:
            _traced.keep(self._prefix.start(rows), keys, values)
        if not self._graphs.ahead:  # torch records no CUDA graph that writes to inputs which might move
            for each in (*keys, *values):
                torch._dynamo.mark_static_address(each)
        slot = whole(1) + self.virtual_tokens  # a graph runs once when it is made, and must not write over these
        return State(whole(rows, 1), whole(rows, room), whole(rows, 1), slot, keys, values)

    def _prefill(
        self,
        prompts: Sequence[Sequence[int]],
        shape: Shape,
        state: State,
        timed: bool,
        shared: int = 0,
        start: baked.Prefix | None = None,
    ) -> Any:
        """Run the prompts, and put their keys and values in place; logits [rows, vocabulary] of the next token.

        Where they run eagerly, the first `shared` tokens of all of them are run once. Where they `start` after what an
        earlier prompt has left, they do: the rest is short.
        """
        longest, virtual = max(map(len, prompts)), self.virtual_tokens
        if start:
            logits, mask = self._read_after(prompts, state, start.tokens - virtual, start.start(len(prompts)))
        elif isinstance(bucket := self._bucket(shape, longest, timed), tuple):
            ids, mask = self._left_padded(prompts)
            logits = self._read_compiled(ids, mask, bucket, state)
        else:
            self._eager_prompts.update([bucket] if bucket else [])
            logits, mask = self._read_eagerly(prompts, state, shared)
        state.mask[:, virtual : virtual + longest].copy_(mask)
        state.mask[:, virtual + longest :].fill_(1)
        state.position.copy_(mask.sum(1, keepdim=True) + virtual)
        state.slot.fill_(virtual + longest)
        state.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def _read_compiled(self, ids: Any, mask: Any, bucket: PromptShape, state: State) -> Any:
        """No token sees the padding on its right, and the steps overwrite what that leaves in the cache."""
        graph, prompt = self._prompt(bucket)
        longest, virtual = ids.shape[1], self.virtual_tokens
        prompt.ids[:, :longest].copy_(ids)
        prompt.ids[:, longest:].fill_(0)
        prompt.mask[:, virtual : virtual + longest].copy_(mask)
        prompt.mask[:, virtual + longest :].fill_(1)
        prompt.position.copy_((prompt.mask.cumsum(1) - 1).clamp(min=0)[:, virtual:])
        prompt.last.fill_(longest - 1)
        return graph(self._inner, *prompt, state.keys, state.values)

    def _read_eagerly(self, prompts: Sequence[Sequence[int]], state: State, shared: int) -> tuple[Any, Any]:
        """Logits, and the mask [rows, longest prompt] of the rows' own tokens."""
        import torch

        cache = self._begun_cache(1 if shared else len(prompts), state)
        if shared:
            prefix = torch.tensor([prompts[0][:shared]], device=self._device)
            self._inner(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(prompts))
        return self._read_after(prompts, state, shared, cache)

    def _read_after(self, prompts: Sequence[Sequence[int]], state: State, shared: int, cache: Any) -> tuple[Any, Any]:
        """The same, where a cache of all rows holds the virtual tokens and the first `shared` ones of each."""
        import torch

        ids, mask = self._left_padded([prompt[shared:] for prompt in prompts])
        before = self.virtual_tokens + shared
        mask = torch.cat([mask.new_ones(len(prompts), before), mask], dim=1)
        out = self._inner(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, before:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        _traced.keep(cache, state.keys, state.values, self.virtual_tokens)
        return out.logits[:, -1], mask[:, self.virtual_tokens :]

    def _begun_cache(self, rows: int, state: State) -> Any:
        """A growing cache that holds the virtual tokens."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._inner.config)
        _traced.begin(cache, rows, state.keys, state.values, self.virtual_tokens)
        return cache

    # ---- attention ------------------------------------------------------------------------------

    def _decoding(self) -> contextlib.AbstractContextManager[None]:
        """A graph compiled ahead of time has its attention in it; one with guards looks at the model's setting."""
        return contextlib.nullcontext() if self._graphs.ahead else self._attending()

    @contextlib.contextmanager
    def _attending(self) -> Iterator[None]:
        """The model with the attention that is compiled; outside, prompts run with its own."""
        own = self._inner.config._attn_implementation
        if self._attention == "fused":
            _traced.register_fused()
        try:
            self._inner.set_attn_implementation(_traced.FUSED if self._attention == "fused" else self._attention or own)
            yield
        finally:
            self._inner.set_attn_implementation(own)


class _Batch:
    """A batch in a static cache, for `_speculation.decode`: a step where nothing is proposed, else all at once."""

    def __init__(self, model: Any, slots: int, state: State, step: Callable[..., Any], verifier: Verified) -> None:
        self.slots = slots
        self._model, self._state, self._step = model, state, step
        self._verify, self._draft = verifier
        self._alone = False

    def choose(self, given: Sequence[Sequence[int]]) -> list[list[int]]:
        """The model's choice after each token; rows that fill the graph up are fed what the last one is."""
        import torch

        fed = self._state.token if len(given[0]) == 1 else self._draft.tokens
        fed[: len(given)].copy_(torch.tensor(given))
        self._alone = len(given[0]) == 1
        if self._alone:
            self._step(self._model, *self._state)
            chosen = self._state.token
        else:
            self._verify(self._model, *self._draft, *self._state[1:])
            chosen = self._draft.chosen
        return [list(row) for row in chosen[: len(given)].tolist()]

    def keep(self, counts: Sequence[int]) -> None:
        """The next token goes behind the row that keeps most; a step has moved on by itself."""
        import torch

        if self._alone:
            return
        state, places = self._state, max(counts)
        start = int(state.slot)
        for row, count in enumerate(counts):
            if count < places:
                state.mask[row, start + count : start + places] = 0
        state.position[: len(counts)] += torch.tensor(counts, device=state.position.device)[:, None]
        state.slot.add_(places)


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


def _lora_shape(model: Any) -> list[Any]:
    """What of its LoRAs is part of a graph: the shapes of their weights, and the scalings, which are numbers in it."""
    shapes = [tuple(value.shape) for name, value in model.named_parameters() if ".lora_" in name]
    scalings = [getattr(module, "scaling", None) for module in model.modules()]
    return [*shapes, *(dict(scaling) for scaling in scalings if isinstance(scaling, dict))]


# ---- small parts -------------------------------------------------------------------------------------


def filled_up(rows: Sequence[Sequence[int]], shape: Shape) -> list[Sequence[int]]:
    """Rows padded to the graph's number: the last row is repeated."""
    return [*rows, *[rows[-1]] * (shape[0] - len(rows))]


def _row(columns: Sequence[Scores], row: int) -> Scores:
    """The scores of one answer out of those of its columns, each of which holds a token of every answer."""

    def pick(name: str) -> list[Any]:
        return [getattr(column, name)[row] for column in columns]

    logprobs = pick("logprobs")
    return Scores(logprobs, pick("best"), pick("top_ids"), pick("top_logprobs"), all(map(math.isfinite, logprobs)))
