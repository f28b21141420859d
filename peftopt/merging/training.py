"""The base as the adapter saw it in training: the weights on disk, or what is left of them after 4-bit quantization.

QLoRA (arXiv:2305.14314) trains the adapter on weights that bitsandbytes quantized to NF4 in blocks of 64 and computes
with dequantized. The delta belongs to those weights; whether it does better on them or on the 16-bit ones is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftopt.errors import MissingEnvironment
from peftopt.merging.blocks import read_tensor
from peftopt.models.checkpoint import Checkpoint

SCHEMES = ("nf4", "fp4")
STATE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.")
"""What bitsandbytes stores beside each packed weight."""


@dataclass(frozen=True)
class TrainingBase:
    """`scheme`: "" for the weights as they are, "nf4" or "fp4" to see them through bitsandbytes' 4-bit rounding.

    `packed`: the folder itself holds 4-bit weights of bitsandbytes, which are dequantized as they are read.
    """

    scheme: str = ""
    packed: bool = False

    def clean(self, config: Any) -> None:
        """Take the quantization out of a config: what is written is full precision."""
        if self.packed and hasattr(config, "quantization_config"):
            del config.quantization_config

    def names(self, base: Checkpoint) -> list[str]:
        """The tensors that are weights, without the state of their quantization."""
        return [name for name in base.entries if not (self.packed and any(part in name for part in STATE))]

    def tensor(self, base: Checkpoint, name: str) -> Any:
        """A tensor of the checkpoint, dequantized where it is packed."""
        packed = read_tensor(base, base.entries[name])
        if not self.is_packed(base, name):
            return packed
        return _bitsandbytes().dequantize_4bit(packed, self._state(base, name))

    def pack(self, base: Checkpoint, name: str, value: Any) -> dict[str, Any]:
        """A weight packed again as this one was: the tensor and the state beside it, by their names on disk."""
        functional = _bitsandbytes()
        old = self._state(base, name)
        packed, state = functional.quantize_4bit(
            value.to(old.dtype), blocksize=old.blocksize, compress_statistics=old.nested, quant_type=old.quant_type
        )
        return {name: packed, **{f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}}

    def _state(self, base: Checkpoint, name: str) -> Any:
        parts = {key: read_tensor(base, base.entries[key]) for key in base.entries if key.startswith(f"{name}.")}
        return _bitsandbytes().QuantState.from_dict(parts, device="cpu")

    def is_packed(self, base: Checkpoint, name: str) -> bool:
        """Whether a tensor of the checkpoint lies there in 4 bits, with its state beside it."""
        return self.packed and f"{name}.absmax" in base.entries

    def quantized(self, model: Any) -> set[str]:
        """Parameters that training saw rounded: every linear layer but the output head, as bitsandbytes does."""
        import torch

        if not self.scheme:
            return set()
        head = model.get_output_embeddings()
        linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
        return {f"{name}.weight" for name in linear}

    def seen(self, name: str, value: Any) -> Any:
        """A weight after the round trip through 4 bits (blocks of 64, statistics quantized too), in its own dtype."""
        functional = _bitsandbytes()
        packed, state = functional.quantize_4bit(
            value.float(), blocksize=64, compress_statistics=True, quant_type=self.scheme
        )
        return functional.dequantize_4bit(packed, state).to(value.dtype)


def is_packed(settings: Any) -> bool:
    """Whether a config's quantization_config says 4-bit bitsandbytes."""
    known = settings if isinstance(settings, dict) else {}
    return known.get("quant_method") == "bitsandbytes" and bool(known.get("load_in_4bit"))


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MissingEnvironment(
            "merging for a 4-bit base needs bitsandbytes", "pip install 'peftopt[quantize]'"
        ) from error
    return functional
