"""Rows of transformers' continuous batching that start after a baked prompt: a scheduler of ours writes it into their
pages."""

from __future__ import annotations

from typing import Any

from peftopt.models.baked import Prefix


def register(prefix: Prefix) -> str:
    """Make a scheduler whose rows start after this prompt known to transformers, by the name that is returned."""
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

    class Starting(FIFOScheduler):  # type: ignore[misc]  # transformers has no types here
        """First come, first served; a row has the virtual tokens behind it when it begins."""

        def add_waiting_request(self, state: Any) -> None:
            """Queue a row, at the position of its own first token. One whose pages were moved away keeps its place."""
            if not state.is_cpu_offloaded:
                state.position_offset = prefix.tokens
            super().add_waiting_request(state)

        def _allocate_blocks_if_needed(self, state: Any, len_next_tokens: int) -> bool:
            begins = state.allocated_blocks == 0 and not state.is_cpu_offloaded
            allocated: bool = super()._allocate_blocks_if_needed(state, len_next_tokens)
            if allocated and begins:
                _write(self.cache, state.request_id, prefix)
            return allocated

    SCHEDULER_MAPPING[_name(prefix)] = Starting
    return _name(prefix)


def unregister(prefix: Prefix | None) -> None:
    """Remove its scheduler again."""
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

    if prefix:
        SCHEDULER_MAPPING.pop(_name(prefix), None)


def _name(prefix: Prefix) -> str:
    return f"peftopt_{id(prefix)}"


def _write(cache: Any, request: str, prefix: Prefix) -> None:
    """Copy keys and values [1, heads, virtual tokens, size] to the first places of a row's pages, whose tensors are
    [places, heads, size] for the layers of each group.

    On a GPU the batch that is under way, on a stream of its own, may still write to pages that were another row's, and
    the next one must find the copy: both are waited for.
    """
    import torch

    _wait(cache)
    places = [
        torch.tensor(group.get_write_indices(request, 0, prefix.tokens), device=cache.device)
        for group in cache.group_cache_managers
    ]
    for number, (keys, values) in enumerate(prefix.layers):
        group, place = cache.layer_index_to_group_indices[number]
        for pages, states in ((cache.key_cache, keys), (cache.value_cache, values)):
            pages[place].index_copy_(0, places[group], states[0].transpose(0, 1))
    _wait(cache)


def _wait(cache: Any) -> None:
    import torch

    if torch.device(cache.device).type == "cuda":
        torch.cuda.synchronize()
