"""One job on the machine that this process runs on: its command as a process of its own, to its end."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import socket
import subprocess
import time

from peftopt import environments, machine, store
from peftopt.errors import ACCEPTED, BROKEN, ENVIRONMENT, INTERRUPTED, Occupied
from peftopt.recipe.grid import MachineClass
from peftopt.records import Json
from peftopt.runner import cells, orphans
from peftopt.runner.cells import Attempt, Job

LET_END_S = 60.0
"""An interrupted run ends its workers and keeps its measurements in this time; then it is killed."""

_NUMBERS = itertools.count(1)


def attempt(job: Job) -> Attempt:
    """Run a job's command and keep how it ended in the cell's folder. What another process measures at this moment, or
    has measured, is left alone. KeyboardInterrupt interrupts the command too. Raises MissingEnvironment, OSError where
    the folder cannot be written."""
    host = socket.gethostname()
    began = cells.now()
    try:
        owner = store.own(job.folder)
    except Occupied as error:
        return Attempt(began, 0.0, ENVIRONMENT, host, error.message, error.hint)
    try:
        if cells.is_decided(job):
            return Attempt(began, 0.0, ACCEPTED, host)
        if lack := lacks(job.needs):
            ended = Attempt(began, 0.0, ENVIRONMENT, host, lack, "correct the grid's machines, or what the nodes say")
        else:
            ended = _timed(job, began, host)
        cells.keep(job.folder, ended)
        return ended
    finally:
        store.disown(owner)


def lost(job: Job, message: str) -> Attempt:
    """What a cluster says of a job of which nothing came back, kept among the attempts of its cell."""
    ended = Attempt(cells.now(), 0.0, ENVIRONMENT, "", message, "the same sweep tries it again")
    cells.keep(job.folder, ended)
    return ended


def _timed(job: Job, began: str, host: str) -> Attempt:
    """How the command ended. One that was interrupted is kept here."""
    started = time.monotonic()
    try:
        code, said = _run(job)
    except KeyboardInterrupt:
        cells.keep(job.folder, Attempt(began, time.monotonic() - started, INTERRUPTED, host, "interrupted"))
        raise
    code, message, hint = _told(code, said, job)
    return Attempt(began, time.monotonic() - started, code, host, message, hint)


def lacks(needs: MachineClass) -> str:
    """What this machine has too little of for its class; "" for nothing."""
    import psutil

    gpus = len(machine.gpus())
    memory = psutil.virtual_memory().total
    needed = needs.memory or 0
    if gpus < needs.gpus:
        return f"a machine of the class {needs.name} has {needs.gpus} GPUs, and {socket.gethostname()} has {gpus}"
    if memory < needed:
        has = f"{socket.gethostname()} has {memory / 1e9:.0f} GB"
        return f"a machine of the class {needs.name} has {needed / 1e9:.0f} GB of memory, and {has}"
    return ""


def _run(job: Job) -> tuple[int, bytes]:
    """The exit code of the command, and what it wrote to stdout. It ends when this process does, by whatever means."""
    mark = f"{orphans.watched()}.job{next(_NUMBERS)}."
    with (job.folder / cells.LOG).open("ab") as log:
        process = subprocess.Popen(
            [*environments.module("peftopt.cli"), *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**environments.variables(), orphans.MARK: mark},
            start_new_session=True,  # Ctrl-C reaches it through this process, once
        )
        try:
            said, _ = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=LET_END_S)
            process.kill()
            process.wait()
            raise
        finally:
            orphans.end(mark)
    return process.returncode, said


def _told(code: int, said: bytes, job: Job) -> tuple[int, str, str]:
    """The exit code as verbs have it, what went wrong, and a hint."""
    if code not in cells.FAILURES and code >= 0:
        return code, "", ""
    log = f"its log: {job.folder / cells.LOG}"
    if code < 0:
        return ENVIRONMENT, f"the run was killed ({signal.Signals(-code).name})", log
    try:
        error: Json = json.loads(said.splitlines()[-1])["error"]
        problems = [f"{each['message']} (line {each['line']})" for each in error.get("problems", ())]
        return code, "; ".join([error["message"], *problems]), error["hint"] or log
    except BROKEN:
        return code, "nothing was judged" if said else f"exit code {code}", log
