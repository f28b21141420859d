"""Python runs this file at its start where it lies on PYTHONPATH: `python -m peftopt.server`, and the process that such
servers are copies of, get the fault that PLANTED_FAULT names. Every other program is left as it is."""

from __future__ import annotations

import itertools
import os
import sys
import traceback


def serves() -> bool:
    """Whether this process is our server, or will be copied as one."""
    return not {("-m", "peftopt.server"), ("-m", "peftopt.forking")}.isdisjoint(itertools.pairwise(sys.orig_argv))


def plant(fault: str) -> None:
    """Change the server's classes, and say so in its log."""
    from faults import FAULTS

    from peftopt.engines import _rows
    from peftopt.server import scheduler

    FAULTS[fault](_rows.Served, scheduler.Scheduler)
    sys.stderr.write(f"planted: {fault}\n")


if serves() and os.environ.get("PLANTED_FAULT"):
    try:
        plant(os.environ["PLANTED_FAULT"])
    except BaseException:  # noqa: BLE001 (Python would print it, and start a server without the fault)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
