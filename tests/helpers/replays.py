"""The real log of results/example/serve, replayed for hours, with a fault that begins in the middle; and the run that
decided on what it shows."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers.records import EAGER, MERGE, RULES, decide, quality
from peftopt import report, store
from peftopt.loadtest.arrivals import SERVE_CHECK
from peftopt.loadtest.moments import utc
from peftopt.recipe import plan as planning
from peftopt.recipe.thresholds import parse
from peftopt.records import Measure, Measurement, Metric, Quality, Recipe, Variant, Workload

EXAMPLE = Path(__file__).parents[2] / "results" / "example" / "serve"
WINDOW_S = 20.0
LAUNCHES = 3
REQUIRE = ("latency.p95@chat <= 8 s", "ttft.p95@chat <= 800 ms")
ARMS = {"canary": "merged", "live": "adapter"}
"""Whose lines the arms of that log are: the merged model was tried beside the adapter."""

BEGINS = 1_795_400_000.0
"""When a replay begins, in seconds since 1970: before this one."""

Line = dict[str, Any]
Fault = Callable[[Line], list[Line]]
"""What becomes of a line."""


def real() -> list[Line]:
    """The lines of the log."""
    return [json.loads(line) for line in (EXAMPLE / "requests.jsonl").read_text().splitlines()]


def windows(arm: str) -> list[list[Line]]:
    """An arm's lines, in windows as they came."""
    lines, by_window = [line for line in real() if line["arm"] == arm], defaultdict(list)
    for line in lines:
        by_window[int((line["timestamp"] - lines[0]["timestamp"]) / 1e3 // WINDOW_S)].append(line)
    return list(by_window.values())


def run_of_log(results: Path, base: Path, require: Sequence[str] = REQUIRE, recipe: str = "") -> Path:
    """A run whose blocks are the windows of that log."""
    path = base.parent / "serve.yaml"
    plan = planning.plan(
        Recipe(
            name="serve",
            path=str(path),
            base=str(base),
            adapter=str(base),
            variants={"adapter": Variant("adapter", (), EAGER), "merged": Variant("merged", (MERGE,), EAGER)},
            baseline="adapter",
            workloads={"chat": Workload("chat", "p.jsonl", new_tokens=48, users=2, lengths="natural")},
            quality=Quality("p.jsonl"),
            calibration=None,
            rules=RULES,
            require=tuple(map(parse, require)),
            minimize=Metric("latency.p50", "chat"),
            measure=Measure(),
        ),
        {"base": "b", "adapter": "a", "calibration": ""},
        {},
    )
    found = [Measurement("build", "", values={"id": "", "size_bytes": 270, "tier0": []})]
    found += [Measurement("build", "", values={"id": b.id, "size_bytes": 270, "tier0": []}) for b in plan.builds]
    for arm, name in ARMS.items():
        found += [_block(name, number, lines) for number, lines in enumerate(windows(arm))]
    found += quality("adapter") + quality("adapter", launch=2) + quality("merged")
    folder = results / "runs" / "20261128T120000-serve"
    folder.mkdir(parents=True)
    for each in found:
        store.append(folder / "measurements.jsonl", each)
    store.write(folder / "plan.json", json.dumps(asdict(plan)))
    store.write(folder / "decision.json", report.as_json.render(decide(plan, found, {})))
    if recipe:
        store.write(folder / "recipe.yaml", recipe)
    return folder


def _block(variant: str, number: int, lines: Sequence[Line]) -> Measurement:
    told = ("request_duration_ms", "generation_latency_ms", "ttft_ms", "tpot_ms", "prompt_tokens", "new_tokens")
    requests = [
        {name: line[name] for name in told} | {"warmup": False, "id": line["request_id"], "turn_ms": 1e3 * WINDOW_S}
        for line in lines
    ]
    return Measurement("speed", variant, "chat", 1 + number % LAUNCHES, {"block": number, "requests": requests})


def replay(hours: float, fault: Fault | None = None, seed: int = 0, begins: float = BEGINS) -> Iterator[Line]:
    """So many hours of the merged model's windows, in a drawn order; the fault begins in the middle."""
    dice, drawn = random.Random(seed), windows("canary")
    number = round(3600 * hours / WINDOW_S)
    for n in range(number):
        lines = dice.choice(drawn)
        first = min(line["timestamp"] for line in lines)
        for line in lines:
            at = begins + n * WINDOW_S + (line["timestamp"] - first) / 1e3
            moved = {**line, "timestamp": round(1e3 * at, 3), "ts": utc(at), "arm": "live"}
            yield from fault(moved) if fault and n >= number / 2 else [moved]


def write(path: Path, lines: Iterator[Line]) -> Path:
    """A log of these lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- faults --------------------------------------------------------------------------------------


def slower(times: float) -> Fault:
    """Everything takes so many times as long."""
    fields = ("request_duration_ms", "generation_latency_ms", "ttft_ms", "tpot_ms", "gaps_p95_ms")
    return lambda line: [{**line, **{name: line[name] * times for name in fields}}]


def out_of_memory(share: float) -> Fault:
    """So many requests end with the engine's CUDA OOM."""
    dice = random.Random(1)
    lost = {"status": 500, "finish": "", "new_tokens": 0, "ttft_ms": None, "tpot_ms": None, "gaps_p95_ms": None}
    lost |= {"error": "CUDA out of memory. Tried to allocate 2 GiB", "error_kind": "oom"}
    return lambda line: [{**line, **lost}] if dice.random() < share else [line]


def stale(share: float) -> Fault:
    """The canary prompts are answered by old weights in so many checks, of which one follows each tenth request."""
    dice = random.Random(2)

    def planted(line: Line) -> list[Line]:
        if dice.random() > 0.1:
            return [line]
        return [line, check(line, "stale" if dice.random() < share else "own")]

    return planted


def check(line: Line, verdict: str) -> Line:
    """A check of the version that answered, right after it."""
    about = {name: line[name] for name in ("ts", "timestamp", "adapter", "version")}
    return {"kind": SERVE_CHECK, **about, "verdict": verdict, "distance": 0.5 if verdict == "own" else 9.0}


def longer_prompts(times: float) -> Fault:
    """Prompts are so many times as long."""
    return lambda line: [{**line, "prompt_tokens": round(line["prompt_tokens"] * times)}]


FAULTS: dict[str, tuple[Fault | None, frozenset[str]]] = {
    "nothing": (None, frozenset()),
    "1.5 times slower": (slower(1.5), frozenset({"sla", "drift", "throughput"})),
    "5 % out of memory": (out_of_memory(0.05), frozenset({"errors"})),
    "stale weights": (stale(1.0), frozenset({"adapter", "quality"})),
    "prompts 3 times as long": (longer_prompts(3.0), frozenset({"range"})),
}
"""Faults by name, and the kinds of detectors that may name them."""
