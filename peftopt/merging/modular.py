"""Write what a hollow model merges: each tensor of the checkpoint once all its parameters are there, some of them
checked in fp64, and embeddings kept one tensor exactly when both sides came out the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peftopt.merging import certificate
from peftopt.merging.blocks import Blocks, Written, read, read_tensor
from peftopt.merging.modules import Hollow, Tensors
from peftopt.models.checkpoint import Draft
from peftopt.records import Json

SAMPLED_MODULES, SAMPLED_ELEMENTS = 4, 1 << 26
"""Modules that are merged a second time in fp64, and the largest that is."""


class Rewrite:
    """One hollow model on its way to disk. Tied embeddings that an adapter touches are merged first, both sides: `held`
    are their values, `untied` says whether they differ now."""

    def __init__(self, hollow: Hollow) -> None:
        self.hollow = hollow
        self.held, self.untied = self._embeddings()
        self.apart = set(hollow.tied or ()) if self.held else set()

    def _embeddings(self) -> tuple[Tensors, bool]:
        import torch

        hollow = self.hollow
        if hollow.tied is None or not set(hollow.tied) & hollow.touched:
            return {}, False
        held = {name: hollow.value(name) for name in hollow.tied}
        for unit, names in hollow.units.items():
            if set(names) & held.keys():
                held |= hollow.merged(unit)
        untied = not torch.equal(*(held[name] for name in hollow.tied))
        if not untied and hollow.tied[1] not in hollow.groups:
            del held[hollow.tied[1]]  # written once, as the base has it
        return held, untied

    @property
    def stored(self) -> dict[str, tuple[int, ...] | None]:
        """The tensors of the checkpoint that are written here, with their shapes where those are a parameter's own."""
        hollow = self.hollow
        shapes: dict[str, tuple[int, ...] | None] = {}
        for name in hollow.touched & hollow.groups.keys():
            group = hollow.groups[name]
            shape = tuple(hollow.params[name].shape) if group.converter is None else None
            shapes |= dict.fromkeys((key for key, _ in group.tensors), shape)
        return shapes

    @property
    def added(self) -> dict[str, tuple[int, ...]]:
        """Tensors that the base's checkpoint does not have: an output head that is no longer the input embedding."""
        return {name: tuple(value.shape) for name, value in self.held.items() if name not in self.hollow.groups}

    def config(self, config: Mapping[str, Json]) -> dict[str, Json]:
        """The base's config with what the merge changes: embeddings no longer tied, or of another size."""
        rewritten = dict(config)
        if self.untied:
            rewritten["tie_word_embeddings"] = False
        size = self.hollow.config.get_text_config().vocab_size
        if "text_config" in rewritten:
            if rewritten["text_config"].get("vocab_size", size) != size:
                rewritten["text_config"] = {**rewritten["text_config"], "vocab_size": size}
        elif rewritten.get("vocab_size", size) != size:
            rewritten["vocab_size"] = size
        return rewritten

    def write(self, blocks: Blocks, draft: Draft) -> tuple[list[Written], list[tuple[str, float, int]]]:
        """Merge module by module into the draft; what was written, and the errors of the samples (certificate)."""
        hollow = self.hollow
        units = [unit for unit, names in hollow.units.items() if not self.apart & set(names)]
        sampled, fine = self._sampled(units), self._fine(draft, units)
        written: list[Written] = []
        samples: list[tuple[str, float, int]] = []
        waiting = dict(self.held)
        for unit in units:
            exact = hollow.merged(unit, exact=True) if unit in sampled | fine else {}
            waiting |= exact if unit in fine else hollow.merged(unit)
            written += self._flush(blocks, draft, waiting)
            samples += self._errors(draft, exact if unit in sampled else {})
        inside = {name for names in hollow.units.values() for name in names}
        for name in sorted(hollow.touched - inside - self.apart):
            waiting[name] = hollow.value(name)
            written += self._flush(blocks, draft, waiting)
        written += self._flush(blocks, draft, waiting, last=True)
        return written, samples

    def _fine(self, draft: Draft, units: Sequence[str]) -> set[str]:
        """Modules to merge in fp64: those whose result is kept in fp32, where fp32's own errors would show. How large
        they are depends on the type: RandLora adds up as many products as the layer is wide."""

        def kept(unit: str) -> bool:
            names = (name for name in self.hollow.units[unit] if name in draft.entries)
            return any(draft.entries[name].dtype in ("F32", "F64") for name in names)

        return {unit for unit in self._small(units) if kept(unit)}

    def _small(self, units: Sequence[str]) -> list[str]:
        """Modules that may be merged in fp64, which takes twice the room: of no more than half the elements of the
        largest, it is no more than what that one takes anyway."""
        sizes = {unit: sum(self.hollow.params[name].numel() for name in self.hollow.units[unit]) for unit in units}
        half = [unit for unit in units if sizes[unit] <= max(sizes.values(), default=0) // 2]
        return [unit for unit in half or units if sizes[unit] <= SAMPLED_ELEMENTS]

    def _sampled(self, units: Sequence[str]) -> set[str]:
        small = self._small(units)
        return set(small[:: max(1, len(small) // SAMPLED_MODULES)][:SAMPLED_MODULES])

    def _errors(self, draft: Draft, exact: Tensors) -> Iterator[tuple[str, float, int]]:
        """How far what is on disk is from the fp64 result, for parameters that are tensors of their own."""
        # A module's parameters may go into each other: GLoRA's bias holds products with the weight.
        values = [v for name, value in exact.items() for v in (value, self.hollow.value(name))]
        scale = max((float(value.abs().max()) for value in values if value.numel()), default=0.0)
        for name, value in exact.items():
            target = draft.entries.get(name)
            if target is not None and target.shape == tuple(value.shape):
                yield name, certificate.ulps(read(draft, target), value.numpy(), scale), value.numel()

    def _flush(self, blocks: Blocks, draft: Draft, waiting: Tensors, last: bool = False) -> Iterator[Written]:
        """Write what is complete: parameters that share tensors on disk wait for each other."""
        hollow = self.hollow
        for name in list(waiting):
            group = hollow.groups.get(name)
            if name not in waiting:
                continue
            if group is None:
                blocks.put(draft, name, waiting.pop(name))
                if name in hollow.adapted:
                    yield Written(name, True)
                continue
            if not last and not set(group.params) & hollow.touched <= waiting.keys():
                continue
            values = {n: waiting.pop(n) if n in waiting else hollow.value(n) for n in group.params}
            for key, value in hollow.stored(group, values).items():
                blocks.put(draft, key, value)
                if hollow.adapted & set(group.params):
                    yield Written(key, not self._same(draft, key, value))

    def _same(self, draft: Draft, key: str, value: Any) -> bool:
        """Whether a tensor on disk is what the base has."""
        import torch

        target = draft.entries[key]
        if target.shape != self.hollow.base.entries[key].shape:
            return False
        before = self.hollow.training.tensor(self.hollow.base, key)
        return torch.equal(read_tensor(draft, target).to(value.dtype), before.to(value.dtype))
