"""Waiting for what happens in another process or thread, for as long as a busy machine may take."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest


def wait_until(happened: Callable[[], object], why: Callable[[], str] = lambda: "", seconds: float = 60.0) -> None:
    """Fail a test where it does not happen in time, and say `why`."""
    until = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > until:
            pytest.fail(f"not within {seconds:g} s {why()}")
        time.sleep(0.02)
