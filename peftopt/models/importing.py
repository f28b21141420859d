"""Imports PyTorch, transformers and PEFT without the libraries that they import besides and a model does not use.

transformers and PEFT import whatever they can work with, wherever it is installed. That is 6 of the 15 seconds of CPU
time in which a process is ready to open a model. While the three are imported here, such a library counts as not
installed; afterwards it can be imported as before.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

UNUSED = ("pandas", "scipy", "sklearn")
"""No model is opened or run by these."""

UNPACKERS = ("bitsandbytes", "torchao")
"""Each unpacks the weights of models whose config names it, and is of no use to others."""


def torch_side(folder: str = "", adapters: bool = True) -> None:
    """Import what opens the model of a folder, or any whose weights are not packed, and with `adapters` what puts one
    on top. Nothing is left out where
    transformers is imported already: it has found out for good what is installed."""
    with absent(() if "transformers" in sys.modules else (*UNUSED, *useless(folder))):
        # the last is imported by the first model's opening, else
        from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_utils  # noqa: F401

        if adapters:
            import peft  # noqa: F401


def useless(folder: str) -> Collection[str]:
    """The unpackers that the folder's model does not need: none of them where that is still to be written, all of them
    without a folder."""
    own = packing(Path(folder)) if folder else ""
    return () if own is None else [name for name in UNPACKERS if name != own]


@contextlib.contextmanager
def absent(packages: Collection[str]) -> Iterator[None]:
    """Inside, packages that were not imported before are not found, by the import statement's own rule: a module that
    is None in sys.modules is missing."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def packing(folder: Path) -> str | None:
    """How the folder's weights are packed, as its config.json calls it ("torchao", "gptq", …); "" if they are not, None
    where there is no config to read."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str((settings.get("quantization_config") or {}).get("quant_method", ""))
    return None
