"""Variants behind vLLM's own server: TTFT, TPOT and throughput at several numbers of users, against the first variant.

    python benchmarks/vllm.py --prompts demo/data/eval.jsonl --variant adapter=BASE+ADAPTER --variant merged=FOLDER \\
        --variant gptq4=FOLDER --concurrency 1 --concurrency 4 --concurrency 8

Every variant is a server of its own, started by the engine `vllm` (`peftopt env install vllm`) and up for the whole
time; in each round they take turns in random order, one at work at a time. One that does not start is a line with its
reason: so this also tells which artifacts vLLM loads. Ratios come with their exact interval over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peftopt import corpus, environments, machine, stats
from peftopt.decision.evidence import exp
from peftopt.engines import vllm
from peftopt.engines._server import Server, free_port
from peftopt.errors import WorkerFailed
from peftopt.loadtest import runs
from peftopt.loadtest.protocols import Prompt, Target
from peftopt.loadtest.summary import Figures
from peftopt.records import Model

FIGURES = {"TTFT ms": "ttft_mean_ms", "TPOT ms": "tpot_mean_ms", "tokens/s": "output_tokens_per_s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--variant", action="append", required=True, help="NAME=FOLDER, or NAME=FOLDER+ADAPTER")
    parser.add_argument("--concurrency", type=int, action="append")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-model-len", type=int, default=1024)
    a = parser.parse_args()

    rows = corpus.read(a.prompts, "short")[: a.requests]
    prompts = {row.id: Prompt(row.messages) for row in rows}
    logs = Path(tempfile.mkdtemp(prefix="peftopt-"))
    with contextlib.ExitStack() as stack:
        servers = {}
        for text in a.variant:
            name, _, what = text.partition("=")
            with contextlib.suppress(WorkerFailed):
                servers[name] = started(name, what, a.max_model_len, logs, stack)
        for users in a.concurrency or [1, 4, 8]:
            measure(servers, prompts, users, a)


def started(name: str, what: str, longest: int, logs: Path, stack: contextlib.ExitStack) -> tuple[Target, Server]:
    """A server for a variant, ended with the stack, and how to ask it."""
    folder, _, adapter = what.partition("+")
    model = Model(str(Path(folder).resolve()), (adapter,) if adapter else ())
    names = [vllm.name_of(each) for each in model.adapters]
    port = free_port()
    params = vllm.Params(max_model_len=longest)
    command, variables = vllm.command(model, params, port, names, environments.python("vllm"))
    server = Server(command, variables, f"http://127.0.0.1:{port}", logs / f"{name}.log")
    stack.callback(server.stop)
    began = time.perf_counter()
    try:
        server.ready(params.start_s)
    except WorkerFailed as error:
        print(f"{name}: not loaded by vLLM: {' '.join(str(error).split())[-300:]}", flush=True)
        raise
    print(f"{name}: ready after {time.perf_counter() - began:.0f} s", flush=True)
    return Target(server.url, "chat", names[0] if names else vllm.BASE), server


def measure(
    servers: dict[str, tuple[Target, Server]], prompts: dict[str, Prompt], users: int, a: argparse.Namespace
) -> None:
    """Rounds in random order at one number of users; the first, a warm-up, is left out."""
    found: dict[str, list[Figures]] = {name: [] for name in servers}
    dice = random.Random(users)
    for _ in range(a.rounds + 1):
        for name in dice.sample(sorted(servers), len(servers)):
            target, server = servers[name]
            traffic = runs.Traffic(prompts, {target.model: 1.0}, a.new_tokens, requests=a.requests, concurrency=users)
            loaded = runs.run(target, traffic, 1.0, lambda *_: None, patient=True)
            figures = runs.summarized(loaded, []).figures
            machine.rest(server.processes())
            assert figures.failed == 0, figures
            found[name].append(figures)
    print(f"{users} users, {a.requests} requests of {a.new_tokens} tokens, {a.rounds} rounds")
    first = next(iter(found))
    for name, rounds in found.items():
        cells = []
        for title, key in FIGURES.items():
            pairs = [(getattr(r, key), getattr(f, key)) for r, f in zip(rounds[1:], found[first][1:], strict=True)]
            ratio = exp(stats.hodges_lehmann([math.log(r / f) for r, f in pairs], 0.95))
            beside = "" if name == first else f" {ratio.estimate:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"
            cells.append(f"{title} {stats.median([r for r, _ in pairs]):7.1f}{beside:<19}")
        print(f"  {name:<10} {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
