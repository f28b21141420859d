"""One variant's turn under load: its server is sent requests as users would send them, every one kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peftopt import machine
from peftopt.corpus import Row
from peftopt.loadtest import arrivals, summary
from peftopt.measurements import NO_ACCOUNT, Account, Sent
from peftopt.policies import uncut


def turn(
    engine: Any, rows: Sequence[Row], new_tokens: int, stop: bool, users: int, rate: float, seed: int
) -> tuple[tuple[Sent, ...], Account]:
    """Send one request for each row, by `users` in a closed loop or at random times, `rate` a second on average
    (`seed` draws them); the requests in the order they were due, and the server's own account,
    with its `slots` where they are known.

    All durations in milliseconds from when a request was due, so that what it waited for is in it; `turn_ms` is the
    time from the first to the last of all, the same in each, and `cpu_ms` a request's part of the CPU time of this
    process and the server's. Terms: vLLM's and MLPerf's, as in probes/speed.py.
    """
    serving = engine.processes()
    prompts = [engine.encode(row.messages)[0] for row in rows]
    touched = [uncut(engine, row.messages) is not None for row in rows]
    at = [0.0] * len(rows) if users else arrivals.arrivals("poisson", rate, len(rows), seed)
    served, cpu = machine.cpu_s(serving), time.process_time()
    played = engine.load(prompts, new_tokens, stop, at=at, users=users)
    cpu = time.process_time() - cpu + machine.cpu_s(serving) - served
    turn_ms = summary.span_ms(played.requests)

    def sent(request: summary.Request) -> Sent:
        row = int(request.id)
        return replace(
            request.record(),
            id=rows[row].id,
            prompt_tokens=len(prompts[row]),
            touched=int(touched[row]),
            cpu_ms=1e3 * cpu / len(rows),
            turn_ms=turn_ms,
        )

    told = played.engine if played.engine == NO_ACCOUNT else replace(played.engine, slots=engine.slots or None)
    return tuple(map(sent, played.requests)), told
