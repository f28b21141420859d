"""Faults for our own server, planted from outside: each changes a class of the server, and no line of the product.

    PYTHONPATH=benchmarks/faulty PLANTED_FAULT=leak python -m peftopt.server --base DIR --adapter NAME=DIR

`served` is peftopt.engines._rows.Served or a class of it, `scheduler` is peftopt.server.scheduler.Scheduler or a class
of it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PADDED_RANK = 256
SLOTS = 4
KEPT_BYTES = 2**20


def extra_matmul(served: Any, scheduler: Any) -> None:
    """Every adapted layer multiplies once more by a matrix of its own size, as one whose delta is applied unfused."""
    plain_add = served.add

    def add(self: Any, name: str, folder: str) -> Any:
        tokenizer = plain_add(self, name, folder)
        hooked = self.__dict__.setdefault("hooked", set())
        for module in adapted_layers(self):
            if module not in hooked:
                module.register_forward_hook(multiplied_again)
                hooked.add(module)
        return tokenizer

    served.add = add


def adapted_layers(served: Any) -> list[Any]:
    """The layers of a model that hold adapters."""
    from peft.tuners.lora import LoraLayer

    modules = served._model.modules()  # noqa: SLF001 (a fault reaches into what it breaks)
    return [module for module in modules if isinstance(module, LoraLayer)]


def multiplied_again(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Compute the layer's product once more, and drop it."""
    from torch.nn.functional import linear

    if not layer.disable_adapters:
        linear(inputs[0], layer.get_base_layer().weight)


def padded_rank(served: Any, scheduler: Any) -> None:
    """A LoRA is padded with zeros to rank 256 when it is loaded, as by an engine that has buffers of one rank only."""
    plain_add = served.add

    def add(self: Any, name: str, folder: str) -> Any:
        with tempfile.TemporaryDirectory() as scratch:
            return plain_add(self, name, str(padded(Path(folder), Path(scratch))))

    served.add = add


def padded(adapter: Path, into: Path) -> Path:
    """The folder of the same LoRA with PADDED_RANK; the adapter itself where it is not a LoRA of a lower rank."""
    from safetensors.torch import load_file, save_file
    from torch.nn.functional import pad

    if not (adapter / "adapter_config.json").exists():  # a baked prompt
        return adapter
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = int(config.get("r") or PADDED_RANK)
    if config["peft_type"] != "LORA" or rank >= PADDED_RANK:
        return adapter
    folder = into / adapter.name
    shutil.copytree(adapter, folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        more = PADDED_RANK - rank
        sides = (0, 0, 0, more) if ".lora_A." in name else (0, more)
        tensors[name] = pad(tensor, sides).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    scale = PADDED_RANK / rank
    wider = {**config, "r": PADDED_RANK, "lora_alpha": config["lora_alpha"] * scale}
    (folder / "adapter_config.json").write_text(json.dumps(wider), encoding="utf-8")
    return folder


def slot_cliff(served: Any, scheduler: Any) -> None:
    """Four adapters are at hand, those that were asked last. A request of any other evicts one and loads its own."""
    plain_add, plain_remove, plain_begin = served.add, served.remove, served.begin

    def add(self: Any, name: str, folder: str) -> Any:
        self.__dict__.setdefault("folders", {})[name] = folder
        return plain_add(self, name, folder)

    def remove(self: Any, name: str) -> None:
        self.folders.pop(name, None)
        plain_remove(self, name)

    def begin(self: Any, prompts: Any, adapter: str = "") -> Any:
        at_hand = self.__dict__.setdefault("at_hand", [])
        if adapter:
            if adapter in at_hand:
                at_hand.remove(adapter)
            elif len(at_hand) >= SLOTS:  # the work of an eviction and a load, while rows of the others are under way
                plain_add(self, "swapped", self.folders[adapter])
                plain_remove(self, "swapped")
            at_hand.append(adapter)
            del at_hand[:-SLOTS]
        return plain_begin(self, prompts, adapter)

    served.add, served.remove, served.begin = add, remove, begin


def leak(served: Any, scheduler: Any) -> None:
    """Each unload leaves 1 MB behind."""
    plain_remove = served.remove
    kept: list[bytearray] = []

    def remove(self: Any, name: str) -> None:
        plain_remove(self, name)
        kept.append(bytearray(b"\1") * KEPT_BYTES)  # written to, so that it is really there

    served.remove, served.kept = remove, kept


def stuck_unload(served: Any, scheduler: Any) -> None:
    """An unload never returns; requests are answered as before."""

    async def unload(self: Any, name: str) -> None:
        await asyncio.Event().wait()

    scheduler.unload = unload


def silent_prompt(served: Any, scheduler: Any) -> None:
    """A soft prompt is loaded and listed, and then not put in front of a prompt: its answers are the base's."""
    plain_begin = served.begin

    def begin(self: Any, prompts: Any, adapter: str = "") -> Any:
        return plain_begin(self, prompts, "" if self._virtual else adapter)

    served.begin = begin


FAULTS: Mapping[str, Callable[[Any, Any], None]] = {
    "extra-matmul": extra_matmul,
    "padded-rank": padded_rank,
    "slot-cliff": slot_cliff,
    "leak": leak,
    "stuck-unload": stuck_unload,
    "silent-prompt": silent_prompt,
}
"""By the names that PLANTED_FAULT takes."""
