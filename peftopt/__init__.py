"""Make a PEFT model fast in production, and know that it is still the same model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftopt.api.opened import Run, open_run
    from peftopt.api.verbs import decide, load, merge, quantize, run

__version__ = "0.1.0"

__all__ = ["Run", "decide", "load", "merge", "open_run", "quantize", "run"]

_HOMES = {"Run": "opened", "open_run": "opened"}


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first used: `import peftopt` stays cheap."""
    if name not in __all__:
        raise AttributeError(f"module 'peftopt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"peftopt.api.{_HOMES.get(name, 'verbs')}"), name)
