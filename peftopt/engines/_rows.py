"""Rows that are decoded together, token by token, per adapter. Rows may join and leave between two tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftopt.engines import compiled, eager
from peftopt.errors import BadInput
from peftopt.models import baked, hf
from peftopt.models.adapter import NO_DELTA, PLAIN_INITS, is_embedding, open_adapter
from peftopt.records import Model

VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""PEFT types that put virtual tokens before a prompt: one row at a time, unless they are baked."""

UNAPPLIED = ("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")
"""Settings of a generation config that rows do not support."""


ALONE = "the compiled engine serves a model alone, without adapters or baked prompts"
BESIDE = "merge an adapter and serve the result (peftopt merge), or use --engine eager, which serves baked prompts too"
"""The message of a refusal, and its hint."""


class Rows:
    """The rows of one adapter, and the cache behind them. `logits` [rows, vocabulary]: what the model says next of
    each. A row's tokens are the last columns of the cache; what is left of them is padding."""

    def __init__(self, engine: Served, adapter: str, cache: Any, logits: Any, lengths: Sequence[int]) -> None:
        self.logits = logits
        self._engine, self._adapter, self._cache = engine, adapter, cache
        self._lengths = list(lengths)
        self._width = max(lengths)
        self.joins = all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)
        """Whether other rows of the adapter can join: not after a sliding window has lost its first columns."""

    def step(self, tokens: Sequence[int]) -> None:
        """Give every row its next token."""
        import torch

        self._lengths = [length + 1 for length in self._lengths]
        self._width += 1
        device = self.logits.device
        lengths = torch.tensor(self._lengths, device=device)[:, None]
        mask = torch.arange(self._width, device=device) >= self._width - lengths
        self.logits = self._engine.forward(
            self._adapter,
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=mask.long(),
            position_ids=lengths - 1,
            past_key_values=self._cache,
        ).logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and the columns that are then padding for all."""
        import torch

        kept = torch.tensor(rows, device=self.logits.device)
        for layer in self._cache.layers:
            layer.batch_select_indices(kept)
        self.logits = self.logits[kept]
        self._lengths = [self._lengths[row] for row in rows]
        if self.joins:
            self._widen(max(self._lengths))

    def join(self, others: Rows) -> None:
        """Add other rows of the adapter. The other batch must not be used afterwards."""
        import torch

        width = max(self._width, others._width)
        self._widen(width)
        others._widen(width)
        for mine, theirs in zip(self._cache.layers, others._cache.layers, strict=True):
            mine.keys = torch.cat([mine.keys, theirs.keys])
            mine.values = torch.cat([mine.values, theirs.values])
        self.logits = torch.cat([self.logits, others.logits])
        self._lengths += others._lengths

    def _widen(self, width: int) -> None:
        """Add columns of padding on the left, or cut them."""
        from torch.nn.functional import pad

        if width != self._width:
            for layer in self._cache.layers:  # a negative number of columns cuts them
                layer.keys = pad(layer.keys, (0, 0, width - self._width, 0))
                layer.values = pad(layer.values, (0, 0, width - self._width, 0))
        self._width = width


class Limits(eager.Transformers):
    """Facts on a loaded model that a server needs."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        return int(self._owners[-1].get_input_embeddings().num_embeddings)

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer; 0 where that is not known."""
        longest = getattr(self._owners[-1].config.get_text_config(), "max_position_embeddings", None) or 0
        return min(filter(None, (self.positions, longest)), default=0)

    @property
    def repetition_penalty(self) -> float:
        """What the generation config asks for, as `generate` and vLLM apply it. Raises BadInput for what it asks for
        besides."""
        settings = self._stopping
        if asked := [name for name in UNAPPLIED if getattr(settings, name, None)]:
            what = f"the generation config asks for {', '.join(asked)}, which our server does not apply"
            raise BadInput(what, "take it out of generation_config.json, or serve the model with vLLM")
        return float(settings.repetition_penalty or 1.0)


class Served(Limits):
    """A base and any number of adapters by name, of which one at a time is in force. "" names the base alone. Of a
    baked prompt nothing has to be in force: its rows are the base's, and begin with its keys and values."""

    batches = 0
    """How many batches can be under way at once; 0 = any number."""

    def __init__(self, base: str, device: str) -> None:
        super().__init__(Model(base), device, unpacked=True)
        _check_cache(self._model.config)
        self._base = base
        self._names: list[str] = []
        self._baked: dict[str, baked.Prefix] = {}
        self._in_force: str | None = ""
        self._virtual = False

    # ---- adapters

    def add(self, name: str, folder: str) -> Any:
        """Add an adapter or a baked prompt, and return its tokenizer. A name is a word without dots. Raises
        BadInput for one that cannot share the base with others."""
        model = Model(self._base, (folder,))
        tokenizer = hf.tokenizer(hf.tokenizer_home(model), self._base)
        if prompt := baked.of_model(model):
            self._baked[name] = baked.load(prompt, self._owners[-1])
            return tokenizer
        kind = check_shareable(Path(folder), self.vocabulary)
        self._in_force = None
        try:
            self._model = hf.attach(self._model, folder, name, keep_dtype=True)
        except BaseException:
            self._drop(name)
            raise
        self._names.append(name)
        self._virtual = kind in VIRTUAL
        self._owners = [self._model, self._model.get_base_model()]
        return tokenizer

    def remove(self, name: str) -> None:
        """Remove an adapter or a baked prompt, and free its memory."""
        if self._baked.pop(name, None):
            return
        self._in_force = None
        self._names.remove(name)
        self._drop(name)

    def _drop(self, name: str) -> None:
        """Remove what there is of an adapter; with the last one, every layer of PEFT's."""
        if self._names:
            if name in self._model.peft_config:
                with hf.quiet():  # it warns that another one is in force, and none is meant to be
                    self._model.delete_adapter(name)
            return
        self._model = self._owners[-1]
        _strip(self._model)
        self._owners, self._in_force, self._virtual, self._one_by_one = [self._model], "", False, False

    def most_rows(self, name: str) -> int:
        """The most rows of a batch; 0 = any number. A sliding window counts the padding after a baked prompt."""
        if name in self._baked:
            return 1 if self._window else 0
        return 1 if self._virtual and name else 0

    def virtual(self, name: str) -> int:
        """How many virtual tokens stand before each prompt of an adapter."""
        if name in self._baked:
            return self._baked[name].tokens
        return int(self._model.peft_config[name].num_virtual_tokens) if self._virtual and name else 0

    def _use(self, name: str) -> None:
        name = "" if name in self._baked else name
        if name == self._in_force:
            return
        if name:
            if not self._virtual:
                self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(name, inference_mode=True)
        elif not self._virtual:
            self._model.base_model.disable_adapter_layers()
        self._in_force, self._one_by_one = name, self._virtual and bool(name)

    # ---- rows

    def begin(self, prompts: Sequence[Sequence[int]], adapter: str = "") -> Rows:
        """Run prompts of one adapter."""
        from transformers import DynamicCache

        self._use(adapter)
        ids, mask = self._left_padded(prompts)
        inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 1}
        lengths = [len(prompt) for prompt in prompts]
        with eager.contiguous_inputs(self._owners[-1].get_output_embeddings()):
            if prefix := self._baked.get(adapter):
                out = self.forward(adapter, **{**inputs, **prefix.inputs(mask)})
                _close_up(out.past_key_values, prefix, lengths)
                lengths = [prefix.tokens + length for length in lengths]
            elif not self._one_by_one:
                cache = DynamicCache(config=self._owners[-1].config)
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                out = self.forward(adapter, **inputs, past_key_values=cache, position_ids=positions)
            else:
                out = self.forward(adapter, **inputs, through=self._model)  # it puts the virtual tokens in front
                lengths = [out.past_key_values.get_seq_length()]
        return Rows(self, adapter, out.past_key_values, out.logits[:, -1], lengths)

    def forward(self, adapter: str, through: Any = None, **inputs: Any) -> Any:
        """One pass with an adapter in force. PEFT's wrapper adds nothing to layers that hold the adapter."""
        import torch

        self._use(adapter)
        with torch.inference_mode():
            return (through or self._owners[-1])(**inputs, use_cache=True)


class Steps:
    """Rows of a compiled engine. A graph has a fixed number of rows: rows that left are still computed and ignored."""

    joins = False

    def __init__(self, graph: Callable[..., Any], rows: int, logits: Any) -> None:
        self._graph, self._live = graph, list(range(rows))
        self.logits = logits[:rows]

    def step(self, tokens: Sequence[int]) -> None:
        """Give every row its next token."""
        self.logits = self._graph(self._live, tokens)[self._live]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows. The others are ignored from now on."""
        self._live = [self._live[row] for row in rows]
        self.logits = self.logits[list(rows)]

    def join(self, others: Any) -> None:
        raise NotImplementedError("a graph's rows begin together")


class CompiledServed(compiled.Compiled, Limits):
    """A merged model with its step compiled, for one row and for `max_batch`; prompts run eagerly, so that short ones
    stay short. The cache has `context` tokens."""

    batches = 1

    def __init__(self, base: str, device: str, max_batch: int, context: int, backend: str = "inductor") -> None:
        # with a long cache a graph of all layers is several times slower than one of each: docs/decisions/compile.md
        params = compiled.Params(cache_len=context, prompt_buckets=compiled.EAGERLY, regions=True, device=device)
        super().__init__(Model(base), params, backend)
        for rows in (1, max_batch):
            self.warm([1], rows, self.context - 1, timed=True)

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer: those that the cache holds."""
        return min(filter(None, (self._params.cache_len, self._longest, super().context)))

    def add(self, name: str, folder: str) -> Any:
        raise BadInput(ALONE, BESIDE)

    def remove(self, name: str) -> None:
        raise NotImplementedError("it has no adapters")

    def most_rows(self, name: str) -> int:
        """The most rows of a batch; 0 = any number."""
        return 0

    def virtual(self, name: str) -> int:
        """How many virtual tokens stand before each prompt: it has no adapters."""
        return 0

    def begin(self, prompts: Sequence[Sequence[int]], adapter: str = "") -> Steps:
        """Run prompts, no more than `max_batch`. The longest and what is then asked of any must fit the cache."""
        import torch

        shape = self._shape(len(prompts), self.context, timed=False)
        assert not isinstance(shape, str), shape
        with torch.inference_mode():
            step, state = self._step(shape)
            logits = self._prefill(compiled.filled_up(prompts, shape), shape, state, timed=False)

        def graph(rows: Sequence[int], tokens: Sequence[int]) -> Any:
            with torch.inference_mode(), self._decoding():
                state.token[list(rows), 0] = torch.tensor(tokens, device=state.token.device)
                return step(self._inner, *state)

        return Steps(graph, len(prompts), logits)


def _close_up(cache: Any, prefix: baked.Prefix, lengths: Sequence[int]) -> None:
    """Let the padding of a new cache, which lies between the virtual tokens and the shorter prompts, come first: a
    row's tokens are the last columns. What is in a column of padding is never looked at."""
    import torch

    for row, length in enumerate(lengths):
        padding = max(lengths) - length
        columns = slice(padding, padding + prefix.tokens)
        with torch.inference_mode():
            for layer, (keys, values) in zip(cache.layers, prefix.layers, strict=True) if padding else ():
                layer.keys[row, :, columns] = keys[0]
                layer.values[row, :, columns] = values[0]


def check_shareable(folder: Path, vocabulary: int) -> str:
    """The kind of an adapter. Raises BadInput for one that cannot be on a base beside others: it would change the base
    for all of them, or needs more than a forward pass of its layers."""
    adapter = open_adapter(folder)
    config = adapter.config
    saved = config.get("modules_to_save") or ()
    embeddings = {name: entry.shape for name, entry in adapter.weights.entries.items() if is_embedding(name)}
    copies = [name for name in embeddings if not any(module in name for module in saved)]
    resized = [name for name, shape in embeddings.items() if shape[0] != vocabulary]
    reasons = {
        f"it is {adapter.kind}": adapter.kind in NO_DELTA and adapter.kind not in VIRTUAL,
        "it is an activated LoRA": bool(config.get("alora_invocation_tokens")),
        "it trained biases of the base": config.get("bias", "none") != "none",
        "it repeats layers of the base": bool(config.get("layer_replication")),
        "it changes the base's weights": adapter.kind == "LORA" and config.get("init_lora_weights") not in PLAIN_INITS,
        f"it brings embeddings ({', '.join([*copies, *resized][:1])})": bool(copies or resized),
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        hint = "merge it, and serve the merged model: peftopt merge"
        raise BadInput(f"{folder} cannot be served beside other adapters: {why[0]}", hint)
    return adapter.kind


def _check_cache(config: Any) -> None:
    """Raises BadInput for layers that keep something else than keys and values: rows cannot be taken out of it."""
    from transformers import DynamicCache

    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    if odd := kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise BadInput(f"its {', '.join(sorted(odd))} cannot be served by this engine", "serve it with vLLM")


def _strip(model: Any) -> None:
    """Remove all PEFT layers from a base, also those of an adapter that was only partly loaded."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    done: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if name.startswith(done):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            own = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
            model.set_submodule(name, own)
            done += (f"{name}.",)
    vars(model).pop("peft_config", None)
