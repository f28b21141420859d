"""transformers `generate` as most services call it: PyTorch eager, adapters unmerged, prompts baked or live."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftopt import plugins
from peftopt.engines import TOP_K, Generation, Scores
from peftopt.engines._prefix import Kept, Reuse, check_alone
from peftopt.engines._speculation import Speculation
from peftopt.engines._text import Text, trimmed
from peftopt.errors import BadInput
from peftopt.models import baked, hf, importing
from peftopt.models.adapter import open_adapter, task_of
from peftopt.records import Json, Model


@dataclass(frozen=True)
class Params:
    """`device`: "auto" (CUDA where there is one), "cpu" or "cuda". `task`: which task of a multitask prompt the live
    adapter gives, -1 for none."""

    device: str = "auto"
    task: int = -1


PLUGIN = plugins.engine(
    Params, needs=("torch", "transformers", "peft"), speculates=("prompts", "draft"), reuses=True, pads=True
)


def prepare(model: Model) -> None:
    """Import PyTorch, transformers and PEFT: seconds of work that belong to no model."""
    importing.torch_side(model.path, adapters=not all(map(baked.is_baked, model.adapters)))


def open(
    model: Model, params: Params, speculation: Speculation | None = None, reuse: Reuse | None = None
) -> Transformers:
    """Load the model and its adapters. Raises BadInput for a folder or an adapter that cannot be read."""
    check_alone(speculation, reuse)
    if speculation:
        return Speculating(model, params, speculation)
    return Transformers(model, params.device, task=params.task, reuse=reuse)


class Transformers(Text):
    """A loaded model that answers through `generate`; see `peftopt.engines.Engine` for what each method promises."""

    scores = True

    def __init__(
        self, model: Model, device: str, unpacked: bool = False, task: int = -1, reuse: Reuse | None = None
    ) -> None:
        import torch

        prompt = baked.of_model(model)
        adapters = () if prompt else model.adapters
        number = task_of(open_adapter(Path(adapters[0])).config, task) if adapters else None
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self.device, self.threads = str(self._device), torch.get_num_threads()
        tokenizer = hf.tokenizer(hf.tokenizer_home(model), model.path)
        loaded = hf.load(model.path, unpacked=unpacked or bool(adapters), device=self.device)
        words = loaded.get_input_embeddings().num_embeddings
        started = time.perf_counter()
        for index, adapter in enumerate(adapters):
            # PEFT's default would hold the adapter in fp32 on a bf16 base, and convert at every layer and token. A
            # service that minds its latency does not, and against it a merge would gain more than it is worth.
            loaded = hf.attach(loaded, adapter, f"adapter{index}", keep_dtype=True)
        if len(adapters) > 1:
            loaded.base_model.set_adapter([f"adapter{index}" for index in range(len(adapters))])
        self._prefix = baked.load(prompt, loaded) if prompt else None
        self._bare = False
        self.adapter_switch_time = time.perf_counter() - started if model.adapters else None
        self._model = loaded
        self._owners = [loaded, loaded.get_base_model()] if adapters else [loaded]
        self._one_by_one = bool(adapters) and loaded.active_peft_config.is_prompt_learning
        self._task = None if number is None else torch.tensor([number], device=self._device)
        self.virtual_tokens = prompt.tokens if prompt else 0
        """How many virtual tokens stand before every prompt."""
        if self._one_by_one:
            self.virtual_tokens = loaded.active_peft_config.num_virtual_tokens
        self._stopping, self._endless = _greedy(self._model.generation_config, tokenizer, words)
        self._draft: Any = None
        if reuse and self._one_by_one:
            what = "the virtual tokens of a live prompt method (p-tuning, prefix, …) come anew before every prompt"
            raise BadInput(what, "bake them first (peftopt bake), or leave prefix out")
        self._kept = Kept(reuse, model, loaded.config) if reuse else None
        self.reuses = reuse is not None
        if prompt or reuse:  # the cache is the one that holds it
            self._stopping.cache_implementation = self._endless.cache_implementation = None
        self._window = baked.smallest_window(loaded.config)
        self.positions = hf.positions(self._model, self.virtual_tokens)
        super().__init__(tokenizer, _as_list(self._stopping.eos_token_id))

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """By the `generate` of transformers, with the prompts padded on the left.

        Raises BadInput where the model has too few positions.
        """
        self._check_room(prompts, new_tokens)
        answers: dict[int, Generation] = {}
        for rows in self._together(prompts, new_tokens):
            answers |= zip(rows, self._generated([prompts[row] for row in rows], new_tokens, stop), strict=True)
        return [answers[row] for row in range(len(prompts))]

    def _generated(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        import torch

        start = self._kept.match(prompts, self._prefix, self._bare) if self._kept else None
        before = self._prefix.tokens if self._prefix else 0
        reused = start.tokens - before if start else 0
        ids, mask = self._left_padded([prompt[reused:] for prompt in prompts])
        begun = self._begun(mask, start or self._prefix)
        settings = self._stopping if stop else self._endless
        # `generate` fills what a config leaves None from the model's own, so the model's own must be without EOS too;
        # PEFT hands its own to the base model for LoRA, and for prompt methods leaves the base model's in force.
        for owner in self._owners:
            owner.generation_config = settings
        clock = _Clock()
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                max_new_tokens=new_tokens,
                streamer=clock,
                assistant_model=self._draft,
                **begun,
            )
            if self._kept:
                self._keep(prompts, begun["past_key_values"], reused + ids.shape[1])
        rows = output[:, ids.shape[1] :].tolist()
        answers = [trimmed(row, clock.times, self.eos if stop else frozenset()) for row in rows]
        # of what is proposed transformers tells what it took, and no more
        steps, accepted = (clock.steps - 1, len(clock.times) - clock.steps) if self.speculates else (0, 0)
        told = reused if self._kept else None
        return [replace(answer, steps=steps, accepted=accepted, reused=told) for answer in answers]

    def _keep(self, prompts: Sequence[Sequence[int]], cache: Any, longest: int) -> None:
        """Keep the keys and values of these rows from a cache of transformers, in which they take so many columns."""
        assert self._kept
        before = self._prefix.tokens if self._prefix else 0
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        self._kept.keep(prompts, layers, before + longest, self._bare)

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """Score in one forward pass, with a common beginning computed once. Live prompt methods take a row at a time.

        Raises BadInput where the model has too few positions.
        """
        longest = max(map(len, answers))
        self._check_room(prompts, longest)
        # PEFT puts the virtual tokens before the padding and drops `position_ids`: only a lone row is exact.
        lone = [[row] for row in range(len(prompts))]
        scores: dict[int, Scores] = {}
        for rows in lone if self._one_by_one else self._together(prompts, longest):
            scores |= zip(
                rows, self._scored(*([each[row] for row in rows] for each in (prompts, answers))), strict=True
            )
        return [scores[row] for row in range(len(prompts))]

    def _scored(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        import torch

        longest = max(map(len, answers))
        shared = shared_prefix(prompts) if self._within_window(prompts, longest) and not self._one_by_one else 0
        before = shared + (self._prefix.tokens if self._prefix else 0)
        ids, mask = self._left_padded([prompt[shared:] for prompt in prompts])
        rows = torch.zeros(len(answers), longest, dtype=torch.long)
        for row, answer in zip(rows, answers, strict=True):
            row[: len(answer)] = torch.tensor(answer)
        rows = rows.to(self._device)
        # Padding after an answer needs no mask: a causal model never looks ahead. The last token predicts nothing.
        ids = torch.cat([ids, rows[:, :-1]], dim=1)
        mask = torch.cat([torch.ones_like(ids[:, :1]).expand(-1, before), mask, torch.ones_like(rows[:, :-1])], dim=1)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": before > 0, "logits_to_keep": longest}
        if not self._one_by_one:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, before:]
        if self._task is not None:
            inputs["task_ids"] = self._task
        with torch.inference_mode(), contiguous_inputs(self._model.get_output_embeddings()):
            if shared:  # the system prompt, say: computed once, its keys and values repeated for every row
                cache = self._prefix.start(1) if self._prefix else None
                prefix = torch.tensor([prompts[0][:shared]], device=self._device)
                begun = {"past_key_values": cache, "use_cache": True}
                cache = self._model(input_ids=prefix, **begun, logits_to_keep=1).past_key_values
                cache.batch_repeat_interleave(len(prompts))
                inputs["past_key_values"] = cache
            elif self._prefix:
                inputs["past_key_values"] = self._prefix.start(len(prompts))
            logits = self._model(**inputs).logits
            return [scored(logits[i, : len(answer)], answer) for i, answer in enumerate(answers)]

    @property
    def model(self) -> Any:
        """The loaded model with its adapters, for probes."""
        return self._model

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """A context in which the base alone answers and scores."""
        owner, prefix, task = self._owners[0], self._prefix, self._task
        adapted = hasattr(owner, "peft_config")
        self._prefix = self._task = None
        self._bare = adapted or prefix is not None
        try:
            with owner.disable_adapter() if adapted else contextlib.nullcontext():
                yield
        finally:
            self._prefix, self._task, self._bare = prefix, task, False

    def facts(self) -> dict[str, Json]:
        """The memory of kept keys and values, if it reuses prefixes."""
        return {"prefix_bytes": self._kept.nbytes} if self._kept else {}

    def close(self) -> None:
        """Drop the model; on a GPU, also free the memory that torch caches."""
        import gc

        import torch

        self._model, self._owners, self._kept, self._draft = None, [], None, None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _together(self, prompts: Sequence[Sequence[int]], more: int) -> list[list[int]]:
        """Which rows can be padded to one length, by their numbers: all, but for a baked prompt before padding that a
        sliding window counts."""
        if self._prefix is None or self._within_window(prompts, more):
            return [list(range(len(prompts)))]
        by_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)
        return list(by_length.values())

    def _within_window(self, prompts: Sequence[Sequence[int]], more: int) -> bool:
        """Whether padding between the tokens of a row hides none of them: a sliding window counts it as tokens."""
        lengths = set(map(len, prompts))
        return not self._window or len(lengths) == 1 or self.virtual_tokens + max(lengths) + more <= self._window

    def _begun(self, mask: Any, before: baked.Prefix | None) -> dict[str, Any]:
        """What `generate` takes besides the prompts' ids, whose `mask` [prompts, longest prompt] is 0 for padding: a
        cache of what comes `before` them, or one to keep, or a multitask prompt's task."""
        from transformers import DynamicCache

        if before:  # a mask longer than the ids tells `generate` that these come after the cache
            return before.inputs(mask)
        if self._kept:
            return {"attention_mask": mask, "past_key_values": DynamicCache(config=self._model.config)}
        task = {} if self._task is None else {"task_ids": self._task}
        return {"attention_mask": mask, **task}

    def _check_room(self, prompts: Sequence[Sequence[int]], more: int) -> None:
        """Raises BadInput for prompts that, with `more` tokens, need more positions than the model has."""
        if self.positions and (longest := max(map(len, prompts)) + more) > self.positions:
            what = f"a prompt and its answer of {longest} tokens are longer than the model's {self.positions} positions"
            what += f" after {self.virtual_tokens} virtual tokens" if self.virtual_tokens else ""
            raise BadInput(what, "give shorter prompts, or ask for fewer new tokens")

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """Token ids and attention mask, each [prompts, longest prompt], on the model's device."""
        import torch

        longest = max(map(len, prompts))
        pad = self._stopping.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        return ids.to(self._device), mask.to(self._device)


class Speculating(Transformers):
    """Eager with transformers' own prompt lookup, or its assisted generation by a draft model. Both take one prompt at
    a time."""

    speculates = True

    def __init__(self, model: Model, params: Params, speculation: Speculation) -> None:
        super().__init__(model, params.device, task=params.task)
        if self.virtual_tokens:
            what = "transformers proposes nothing for prompts that virtual tokens come before"
            raise BadInput(what, "bake them and let the compiled engine look tokens up; or merge an adapter of weights")
        if speculation.draft:
            self._draft = self._opened(speculation)
            room = [room for room in (self.positions, hf.positions(self._draft)) if room]
            self.positions = min(room, default=0)
            return
        for settings in (self._stopping, self._endless):
            settings.update(prompt_lookup_num_tokens=speculation.tokens, max_matching_ngram_size=speculation.ngram)

    def _opened(self, speculation: Speculation) -> Any:
        """The draft model, which proposes greedily, and always as many tokens. Models of one family may differ in the
        padding after their last token: it gets the model's number of tokens, which transformers asks for."""
        import copy

        draft = hf.load(speculation.draft, device=self.device)
        words = self._model.get_input_embeddings().num_embeddings
        if draft.get_input_embeddings().num_embeddings != words:
            draft.resize_token_embeddings(words, mean_resizing=False)
        draft.generation_config = copy.deepcopy(self._endless)  # `generate` takes from it what the model's leaves None
        draft.generation_config.update(
            num_assistant_tokens=speculation.tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        return draft

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """One prompt after the other."""
        self._check_room(prompts, new_tokens)
        return [answer for prompt in prompts for answer in self._generated([prompt], new_tokens, stop)]


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """The number of first tokens that all prompts share, at least one less than the shortest; 0 for a lone prompt."""
    if len(prompts) < 2:
        return 0
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    same = (n for n, column in enumerate(columns) if len(set(column)) > 1)
    return next(same, min(map(len, prompts)) - 1)


@contextlib.contextmanager
def contiguous_inputs(head: Any) -> Iterator[None]:
    """Hand the output head rows of their own, where it is asked for a slice of the sequence.

    PEFT freezes a base's weights, and of a frozen weight PyTorch on a CPU makes a copy for every row of such a slice,
    twelve times the work of the product itself: `matmul` goes by strides. So it does for a lone row, which passes for
    contiguous and keeps the strides of its slice; hence a copy of the rows, not `contiguous`.
    """
    import torch

    def own(_: Any, inputs: tuple[Any, ...]) -> tuple[Any]:
        return (inputs[0].clone(memory_format=torch.contiguous_format),)

    hook = head.register_forward_pre_hook(own)
    try:
        yield
    finally:
        hook.remove()


class _Clock:
    """A streamer for `generate` that only looks at the clock: one reading per step, whatever the batch. A step that
    looks up gives several tokens of its one row."""

    def __init__(self) -> None:
        self.times: list[int] = []
        self.steps = 0
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.times += [time.perf_counter_ns()] * (value.shape[1] if value.dim() == 2 else 1)
            self.steps += 1
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to flush."""


def _greedy(settings: Any, tokenizer: Any, words: int) -> tuple[Any, Any]:
    """The model's generation config made greedy: as it is, and without end of sequence, so that all lengths are equal.

    No EOS is cheaper than `min_new_tokens`, which masks the logits at every step.
    """
    import copy

    stopping = copy.deepcopy(settings)
    stopping.update(do_sample=False, num_beams=1, max_length=None, use_cache=True)
    stopping.update(temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)  # unused, and warned of
    ids = [id_ for id_ in _as_list(stopping.eos_token_id) if id_ is not None and id_ >= 0]
    ids = ids or [id_ for id_ in [tokenizer.eos_token_id] if id_ is not None]
    if not ids:
        raise BadInput("the model has no end-of-sequence token", "set eos_token_id in its generation_config.json")
    stopping.eos_token_id = ids
    if stopping.pad_token_id is None or not 0 <= stopping.pad_token_id < words:  # -1 is written for "none"
        stopping.pad_token_id = next((id_ for id_ in ids if id_ < words), 0)  # it is masked: any will do
    endless = copy.deepcopy(stopping)
    endless.eos_token_id = None
    return stopping, endless


def _as_list(ids: Any) -> list[int]:
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]


def scored(logits: Any, answer: Sequence[int]) -> Scores:
    """Scores of one answer from its logits [answer, vocabulary]."""
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    given = logprobs.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
    top = logprobs.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    finite = all(torch.isfinite(bound).item() for bound in torch.aminmax(logits))
    return Scores(given.tolist(), top.indices[:, 0].tolist(), top.indices.tolist(), top.values.tolist(), finite)
