"""One variant's turn under load: its server is sent requests as users would send them, every one kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from peftopt import machine
from peftopt.corpus import Row
from peftopt.loadtest import arrivals, summary
from peftopt.measurements import NO_ACCOUNT, as_json
from peftopt.policies import uncut
from peftopt.records import Json


def turn(
    engine: Any, rows: Sequence[Row], new_tokens: int, stop: bool, users: int, rate: float, seed: int
) -> tuple[list[dict[str, Json]], dict[str, Json]]:
    """Send one request for each row, by `users` in a closed loop or at random times, `rate` a second on average
    (`seed` draws them); the requests in the order they were due, and the server's own account (prometheus.summary),
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
    requests: list[dict[str, Json]] = [as_json(request.record()) for request in played.requests]
    whole = {"cpu_ms": 1e3 * cpu / len(rows), "turn_ms": summary.span_ms(played.requests), "batch": 1}
    for request in requests:
        row = int(request["id"])
        request |= {"id": rows[row].id, "prompt_tokens": len(prompts[row]), "touched": int(touched[row]), **whole}
    slots = {"slots": engine.slots} if engine.slots and played.engine != NO_ACCOUNT else {}
    return requests, {**as_json(played.engine), **slots}
