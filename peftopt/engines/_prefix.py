"""Prefixes that requests share: the tokens at a prompt's start that an earlier prompt had, and their kept cache.

Pure but for `Kept`, which copies keys and values into and out of transformers' caches.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, Generic, TypeVar

from peftopt import identity
from peftopt.errors import BadInput
from peftopt.models import baked
from peftopt.records import Model

Block = TypeVar("Block")


@dataclass(frozen=True)
class Reuse:
    """`block`: tokens that are kept and found together; what a prompt shares beyond its last whole block is computed
    again. `memory_gb`: GiB that keys and values of prompts may take; what was not asked for longest goes first.
    """

    block: int = 32
    memory_gb: float = 1.0

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be 1 or more, not {self.block}")
        if not self.memory_gb > 0:
            raise ValueError(f"memory_gb must be more than 0, not {self.memory_gb}")

    @property
    def memory_bytes(self) -> int:
        """The bound in bytes."""
        return round(self.memory_gb * 2**30)


# ---- names of blocks ---------------------------------------------------------------------------


def chain(whose: str, tokens: Sequence[int], block: int) -> list[bytes]:
    """A key for each whole block of a prompt. It stands for `whose` weights and adapters compute it, and for all tokens
    up to the block's end. The last token is in none, since its logits are needed."""
    key = hashlib.sha256(f"{whose} {block}".encode()).digest()
    keys = []
    for start in range(0, len(tokens) - block, block):
        key = hashlib.sha256(key + array("q", tokens[start : start + block]).tobytes()).digest()
        keys.append(key)
    return keys


def name_of(tokens: Sequence[int]) -> bytes:
    """The key of a whole prompt: a hash of all its tokens."""
    return hashlib.sha256(array("q", tokens).tobytes()).digest()


def repeated(prompts: Sequence[Sequence[Hashable]]) -> float:
    """The share of prompts' tokens, or words, that a service has computed before, if it forgets nothing: those at the
    start of a prompt with which an earlier, different one began. The last one of a prompt always has to be computed.

    The same prompt again adds nothing, nor does it count.
    """
    known: set[int] = set()
    again = total = 0
    for tokens in dict.fromkeys(map(tuple, prompts)):
        beginnings = list(accumulate(tokens, _hashed, initial=0))[1:]
        shared = sum(1 for _ in takewhile(known.__contains__, beginnings))
        known.update(beginnings)
        again += min(shared, len(tokens) - 1)
        total += len(tokens)
    return again / total if total else 0.0


def _hashed(before: int, token: Hashable) -> int:
    return hash((before, token))


# ---- what is held ------------------------------------------------------------------------------


@dataclass
class _Held(Generic[Block]):
    """A kept block, and the prompt that it came from; None after another prompt began with it too."""

    block: Block
    nbytes: int
    prompt: bytes | None


class Store(Generic[Block]):
    """Blocks by key, up to a number of bytes. The least recently used blocks are dropped first.

    A block is marked as used after all blocks that follow it, so it is never dropped before them.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._held: OrderedDict[bytes, _Held[Block]] = OrderedDict()
        self.nbytes = 0
        """The bytes of all blocks."""

    def __len__(self) -> int:
        return len(self._held)

    def match(self, keys: Sequence[bytes], prompts: Collection[bytes]) -> list[Block]:
        """The first blocks of a chain that other prompts than these began with. A prompt that comes again does not find
        what it alone left."""
        found = list(takewhile(lambda held: held.prompt not in prompts, self._leading(keys)))
        self._touch(keys[: len(found)])
        return [held.block for held in found]

    def put(self, keys: Sequence[bytes], prompt: bytes, block: Callable[[int], Block], nbytes: int) -> None:
        """Hold the chain of a prompt, as much of it as fits. `block` makes the one of a number; it takes `nbytes`."""
        keys = keys[: self._bound // nbytes]
        there = list(self._leading(keys))
        for held in there:
            held.prompt = prompt if held.prompt == prompt else None
        self._touch(keys[: len(there)])
        missing = range(len(there), len(keys))
        while self.nbytes + nbytes * len(missing) > self._bound:
            _, gone = self._held.popitem(last=False)
            self.nbytes -= gone.nbytes
        for number in missing:
            self._held[keys[number]] = _Held(block(number), nbytes, prompt)
            self.nbytes += nbytes
        self._touch(keys)

    def _leading(self, keys: Sequence[bytes]) -> Iterator[_Held[Block]]:
        for key in keys:
            if key not in self._held:
                return
            yield self._held[key]

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._held.move_to_end(key)


# ---- keys and values ---------------------------------------------------------------------------

Layers = Sequence[tuple[Any, Any]]
"""Keys and values of each layer, [rows, heads, columns, head size]."""


class Kept:
    """Keys and values of earlier prompts, by block. A batch starts from the blocks that all its rows share.

    Raises BadInput for a model whose cache cannot be reused.
    """

    def __init__(self, reuse: Reuse, model: Model, settings: Any) -> None:
        check(settings)
        self._reuse, self._model, self._settings = reuse, model, settings
        self._store: Store[list[Any]] = Store(reuse.memory_bytes)
        self._whose = {bare: whose(model, bare) for bare in (False, True)}

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return self._store.nbytes

    def match(self, prompts: Sequence[Sequence[int]], before: baked.Prefix | None, bare: bool) -> baked.Prefix | None:
        """What all rows begin with and other prompts have left, after the virtual tokens that stand `before` them; None
        for nothing. `bare`: the base alone answers."""
        import torch

        shortest = min(prompts, key=len)
        keys = self._keys(shortest, bare)
        for row in prompts:
            keys = [key for key, other in zip(keys, self._keys(row, bare), strict=False) if key == other]
        blocks = self._store.match(keys, {name_of(row) for row in prompts})
        if not blocks:
            return None
        sides = [torch.cat(several, dim=1)[None] for several in zip(*blocks, strict=True)]
        layers = list(zip(sides[::2], sides[1::2], strict=True))
        virtual = before.tokens if before else 0
        if before:
            layers = [
                (torch.cat([first, keys], dim=2), torch.cat([second, values], dim=2))
                for (first, second), (keys, values) in zip(before.layers, layers, strict=True)
            ]
        return baked.Prefix(virtual + len(blocks) * self._reuse.block, layers, self._settings)

    def keep(self, prompts: Sequence[Sequence[int]], layers: Layers, end: int, bare: bool) -> None:
        """Hold these rows' blocks for others: `layers` has the last token of each prompt in the column before `end`."""
        size = self._reuse.block
        sides = [side for pair in layers for side in pair]
        nbytes = sum(side.shape[1] * side.shape[3] * side.element_size() for side in sides) * size
        for row, prompt in enumerate(prompts):
            first = end - len(prompt)

            def block(number: int, row: int = row, first: int = first) -> list[Any]:
                start = first + number * size
                return [side[row, :, start : start + size].clone() for side in sides]

            self._store.put(self._keys(prompt, bare), name_of(prompt), block, nbytes)

    def switched(self, adapter: str) -> None:
        """Use the keys of another adapter from now on."""
        self._model = Model(self._model.path, (adapter,))
        self._whose[False] = whose(self._model, bare=False)

    def _keys(self, prompt: Sequence[int], bare: bool) -> list[bytes]:
        return chain(self._whose[bare], prompt, self._reuse.block)


def whose(model: Model, bare: bool) -> str:
    """What tells the keys and values of this model from those of others: hashes of its weights and its adapters,
    without these where it is `bare`."""
    adapters = () if bare else model.adapters
    return identity.of_value([baked.base_of(Path(model.path)), [identity.of_folder(Path(a)) for a in adapters]])


def check_alone(speculation: object | None, reuse: Reuse | None) -> None:
    """Raises BadInput for an engine that should both speculate and reuse prefixes: peftopt's engines do one of them."""
    if speculation and reuse:
        raise BadInput("this engine does not speculate and reuse prefixes together", "remove one of them, or use vllm")


LENGTHS_MATTER = ("dynamic", "longrope")
"""Rotary embeddings whose keys depend on the length of the whole prompt."""


def check(settings: Any) -> None:
    """Raises BadInput for a model of this config whose prefixes cannot be taken up again: one that keeps something else
    than keys and values of all tokens, or keys that depend on what follows."""
    from transformers import DynamicCache

    hint = "leave prefix out; vllm reuses prefixes of more kinds of models"
    for layer in DynamicCache(config=settings).layers:
        kind = type(layer).__name__
        window = getattr(layer, "sliding_window", None)
        if window is not None:
            what = f"a {settings.model_type} with a sliding window of {window} tokens does not keep a prefix whole"
            raise BadInput(what, hint)
        if kind != "DynamicLayer":
            what = f"a {settings.model_type} keeps {kind}, not only keys and values: no prefix can be taken out of that"
            raise BadInput(what, hint)
    for kind in _rotary(settings.get_text_config()):
        if kind in LENGTHS_MATTER:
            what = f"the keys of a {settings.model_type} depend on how long the whole prompt is (rotary: {kind})"
            raise BadInput(what, hint)


def _rotary(settings: Any) -> Iterator[str]:
    """The kinds of rotary embeddings of a model, of each kind of layer."""
    found = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None) or {}
    for each in (found, *found.values()):
        if isinstance(each, dict):
            yield str(each.get("rope_type", ""))
