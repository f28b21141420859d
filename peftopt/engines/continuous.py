"""transformers' continuous batching, in process: a paged cache, and rows that join and leave a running batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftopt import plugins
from peftopt.engines import Generation, Scores, _starting, eager
from peftopt.engines._prefix import Reuse
from peftopt.engines._text import trimmed
from peftopt.errors import BadInput, WorkerFailed
from peftopt.records import Model

SILENT_S = 600.0
"""Without a finished row for so long, it is taken to be stuck."""


@dataclass(frozen=True)
class Params:
    """`cache_tokens`: tokens that the paged cache holds, over all rows; `block` tokens a page; `step_tokens`: the most
    tokens, of prompts and of rows that go on, in one forward pass. `prefix_sharing`: rows with the same first page
    share it; off, since a benchmark that asks a prompt twice would find its answer half made, and impossible after a
    baked prompt. `device` as in `eager`.
    """

    cache_tokens: int = 8192
    block: int = 32
    step_tokens: int = 512
    prefix_sharing: bool = False
    device: str = "auto"


PLUGIN = plugins.engine(Params, needs=eager.PLUGIN.needs, reuses=True)


prepare = eager.prepare


def open(model: Model, params: Params, reuse: Reuse | None = None) -> Continuous:
    """Load the model and its adapters. Raises BadInput for a folder or an adapter that cannot be served this way."""
    engine = Continuous(model, reusing(params, reuse) if reuse else params)
    engine.reuses = reuse is not None
    return engine


def reusing(params: Params, reuse: Reuse) -> Params:
    """The parameters of one whose rows share pages of so many tokens: its cache is what bounds them."""
    return replace(params, prefix_sharing=True, block=reuse.block)


class Continuous(eager.Transformers):
    """Rows go through transformers' manager, which runs in a thread of this process while it generates."""

    def __init__(self, model: Model, params: Params) -> None:
        super().__init__(model, params.device)
        if self._one_by_one:
            what = "the virtual tokens of a live prompt method (p-tuning, prefix, …) cannot be batched by this engine"
            raise BadInput(what, "bake them first (peftopt bake), or use the eager engine")
        if self._prefix and params.prefix_sharing:
            what = "rows after a baked prompt cannot share pages: these are found by token ids, and it has none"
            raise BadInput(what, "leave out prefix_sharing, or take the baked prompt away")
        self._params = params
        self._inner = self._owners[-1]  # below PEFT's wrapper, whose own forward adds nothing to LoRA's layers
        self._manager: Any = None

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """Hand all prompts to the manager, which joins them into batches.

        Raises BadInput for a row that is longer than the cache, WorkerFailed when a row fails or none ends within
        SILENT_S seconds.
        """
        self._check_room(prompts, new_tokens)
        room = self._params.cache_tokens
        if (longest := self.virtual_tokens + max(map(len, prompts)) + new_tokens) > room:
            raise BadInput(f"a row of {longest} tokens does not fit a cache of {room}", "raise cache_tokens")
        manager = self._running()
        eos = sorted(self.eos) if stop else -1
        names = [
            manager.add_request(list(p), max_new_tokens=new_tokens, record_timestamps=True, eos_token_id=eos)
            for p in prompts
        ]
        done: dict[str, Any] = {}
        while len(done) < len(names):
            answer = manager.get_result(timeout=SILENT_S)
            if answer is None or answer.error:
                raise WorkerFailed("request failed", answer.error if answer else "continuous batching has stopped")
            done[answer.request_id] = answer
        return [self._generation(done[name], stop) for name in names]

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """As `eager`, whose attention is put back for it: nothing is generated here, so nothing is batched."""
        self._rest()
        return super().score(prompts, answers)

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The base alone answers and scores, for as long as this context lasts."""
        self._rest()  # its rows begin after the baked prompt
        with super().without_adapters():
            try:
                yield
            finally:
                self._rest()

    def close(self) -> None:
        """End the manager's thread, and free the model."""
        self._rest()
        self._inner = None
        super().close()

    def _generation(self, answer: Any, stop: bool) -> Generation:
        times = [round(seconds * 1e9) for seconds in answer.timestamps]
        return trimmed(list(answer.generated_tokens), times, self.eos if stop else frozenset())

    def _running(self) -> Any:
        """The manager, at work."""
        from transformers import ContinuousBatchingConfig

        if self._manager is None:
            scheduler = {"scheduler_type": _starting.register(self._prefix)} if self._prefix else {}
            params = self._params
            settings = ContinuousBatchingConfig(
                block_size=params.block,
                num_blocks=-(-params.cache_tokens // params.block),
                max_batch_tokens=params.step_tokens,
                allow_block_sharing=params.prefix_sharing,
                **scheduler,
            )
            self._manager = self._inner.init_continuous_batching(self._stopping, settings)
            self._manager.start()
        return self._manager

    def _rest(self) -> None:
        """End the manager's thread, and give the model its own attention back."""
        if self._manager is not None:
            self._manager.stop()
            self._manager.destroy()
            self._manager = None
            _starting.unregister(self._prefix)
