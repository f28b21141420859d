"""Measurements that no server shows: the model in a separate process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peftopt import machine
from peftopt.diagnose import judging
from peftopt.diagnose.measuring.company import Names
from peftopt.diagnose.setting import OURS, Setting
from peftopt.errors import WorkerFailed
from peftopt.forking import ForkServer
from peftopt.jobs import CachingJob, OpenJob, PrepareJob
from peftopt.measurements import Caching
from peftopt.records import Model
from peftopt.runner.process import WorkerProcess
from peftopt.runner.single import absolute

DEADLINE_S = 600.0
ROUNDS = judging.LOOKS[0]


def look(
    setting: Setting, names: Names, log: Path, note: Callable[[str], None], forks: ForkServer | None = None
) -> Caching | None:
    """The KV cache of the model in peftopt's own engine; None for another engine, or if it failed. The process is a
    copy of `forks`, if that is given."""
    if setting.engine != OURS:
        return None
    adapters = (names.folders[names.adapter],) if names.adapter else ()
    model = absolute(Model(setting.base, adapters))
    tokens = setting.prompt_tokens + setting.new_tokens
    try:
        with WorkerProcess(log, setting.threads or machine.cores(), forks=forks) as worker:
            worker.ask(PrepareJob(plugin=OURS, model=model), DEADLINE_S)
            worker.ask(OpenJob(plugin=OURS, model=model, params={}), DEADLINE_S)
            return worker.ask(CachingJob(tokens=tokens, rounds=ROUNDS), DEADLINE_S)
    except WorkerFailed as error:
        note(f"the KV cache was not looked at: {error.message}")
        return None
