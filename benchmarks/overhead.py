"""What measuring costs: time per token inside the measured loop over a bare `generate` of the same loaded model.

Both run in one process, in pairs of random order, on the same prompts and lengths. Prints the ratio and its exact
95 % interval; the aim is at most 1.02. Run: python benchmarks/overhead.py --model FOLDER --prompts FILE.jsonl
"""

from __future__ import annotations

import argparse
import os
import random
import time
from math import exp, log

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as workers have it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=24)
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    from peftopt import corpus, stats
    from peftopt.engines import eager
    from peftopt.probes import speed
    from peftopt.records import Model

    engine = eager.open(Model(arguments.model), eager.Params())
    bare = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    # one model for both: what differs is only the harness around it
    engine._model = bare  # noqa: SLF001 (a measurement of the inside)
    engine._owners = [bare]  # noqa: SLF001 (as before)
    rows = corpus.read(arguments.prompts, "short")
    dice = random.Random(0)
    n = int(arguments.new_tokens)

    def measured(row: corpus.Row) -> float:
        request = speed.turn(engine, [[row]], n, 0)[0]
        return (request.request_duration_ms or 0.0) / n

    def plain(row: corpus.Row) -> float:
        started = time.perf_counter()
        ids = torch.tensor([engine.encode(row.messages)[0]])
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            bare.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=n, min_new_tokens=None)
        return (time.perf_counter() - started) * 1e3 / n

    engine.generate([engine.encode(rows[0].messages)[0]], n, stop=False)  # sets the greedy, endless config on the model
    logs, tokens = [], []
    for _ in range(arguments.pairs + 2):
        row = dice.choice(rows)
        order = [measured, plain]
        dice.shuffle(order)
        found = {f.__name__: f(row) for f in order}
        logs.append(log(found["measured"] / found["plain"]))
        tokens.append(found["plain"])
    interval = stats.hodges_lehmann(logs[2:], 0.95)
    ratio = ", ".join(f"{exp(x):.4f}" for x in (interval.estimate, interval.low, interval.high))
    print(f"bare generate: {stats.median(tokens[2:]):.2f} ms a token; measured loop over it: {ratio} (n={interval.n})")


if __name__ == "__main__":
    main()
