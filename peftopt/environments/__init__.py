"""Whose Python runs a plug-in: the main one, or an environment with pins of its own in the user's cache."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from peftopt.errors import WorkerFailed


def root() -> Path:
    """The folder of environments: $PEFTOPT_ENVIRONMENTS, else below the user's cache."""
    own = os.environ.get("PEFTOPT_ENVIRONMENTS")
    return (
        Path(own)
        if own
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peftopt" / "environments"
    )


def python(name: str) -> str:
    """The interpreter of an environment. Raises WorkerFailed ("missing environment") when it is not there."""
    if name == "main":
        return sys.executable
    interpreter = root() / name / "bin" / "python"
    if not interpreter.exists():
        raise WorkerFailed("missing environment", f"{name} is not at {interpreter.parent.parent}", "make it with venv")
    return str(interpreter)
