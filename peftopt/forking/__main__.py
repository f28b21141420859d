"""The fork server: `python -m peftopt.forking DESCRIPTOR MODULE[:FUNCTION] …` imports, then forks on each request.

A request comes as one message of a socket: JSON, with the descriptors of the copy. Each copy has a keeper as its
parent, which waits for it and tells how it ended. All end with the socket's other end: the kernel ends a keeper with
the fork server, and a copy with its keeper.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from peftopt import machine
from peftopt.forking import BESIDE, MESSAGE, STREAMS, pages

DESCRIPTORS = 8
"""Most that come with a request."""


def main(number: str, *imported: str) -> None:
    """Import, then fork until the socket ends."""
    for name in imported:
        with contextlib.suppress(ImportError):  # the copy that needs it says that it is missing
            module, _, function = name.partition(":")
            found = importlib.import_module(module)
            if function:
                getattr(found, function)()
    gc.collect()
    gc.freeze()  # a collection in a copy touches none of this memory, which stays shared
    there = pages.resident()
    with socket.socket(fileno=int(number)) as channel:
        while True:
            message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE, DESCRIPTORS)
            if not message:
                return
            _reap()
            if os.fork() == 0:
                channel.close()
                keep(json.loads(message), there, *descriptors)
            for each in descriptors:
                os.close(each)


def _reap() -> None:
    """Forget the keepers that have ended."""
    with contextlib.suppress(ChildProcessError):  # there is none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def keep(request: dict[str, Any], there: Sequence[pages.Range], told: int, *descriptors: int) -> NoReturn:
    """Be the parent of one copy: tell its id and, at its end, its wait status. `there`: pages that it begins with."""
    machine.die_with_parent(signal.SIGKILL)
    if (copy := os.fork()) == 0:
        machine.die_with_parent(signal.SIGKILL)
        os.setsid()  # before anybody knows it, since who ends it ends its group
        os.write(told, f"{os.getpid()}\n".encode())
        os.close(told)
        pages.populate(there)
        become(request, descriptors)
    for each in descriptors:
        os.close(each)
    _, status = os.waitpid(copy, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know
        os.write(told, f"{status}\n".encode())
    os._exit(0)


def become(request: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Run the module, as `python -P -m` would."""
    _arrange(descriptors)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent without a terminal ignores it
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    torch = sys.modules.get("torch")
    if torch and "OMP_NUM_THREADS" in os.environ:  # which torch has read when it was imported
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tempfile.tempdir = None  # as the environment says now
    sys.argv[:] = [request["module"], *request["arguments"]]
    path = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:] = [*path, *(folder for folder in sys.path if folder not in path)]
    os._exit(_ended(request["module"]))


def _arrange(descriptors: Sequence[int]) -> None:
    """Give the first three the numbers 0 to 2, and the others those from BESIDE on."""
    aside = [fcntl.fcntl(each, fcntl.F_DUPFD, BESIDE + DESCRIPTORS) for each in descriptors]
    for each in descriptors:
        os.close(each)
    for place, each in enumerate(aside):
        os.dup2(each, place if place < STREAMS else BESIDE + place - STREAMS)
        os.close(each)


def run(module: str) -> None:
    """Run a module as the main one, from its beginning, if it was imported before or not."""
    for name in (module, f"{module}.__main__"):
        if name in sys.modules and not hasattr(sys.modules[name], "__path__"):
            del sys.modules[name]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _ended(module: str) -> int:
    """Run a module as the main one. Returns its exit code."""
    try:
        run(module)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:  # noqa: BLE001 (told, as Python would)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main(*sys.argv[1:])
