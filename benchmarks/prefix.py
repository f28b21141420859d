"""What a prefix that requests share saves before the first token, from the second request on.

    python benchmarks/prefix.py                              # some minutes on one core, the demo's adapter on its base
    python benchmarks/prefix.py --engine compiled
    python benchmarks/prefix.py --shared 200 --own 200        # where less is shared

One process has the engine twice, without reuse and with it, and asks both for the first token of the same prompts, in
turns of random order: `--shared` random tokens that are the same in all of a round's prompts, then `--own` ones that
are not. `first` is the first request of a round to the engine that reuses, which keeps its prompt and finds nothing;
`later` are the others. CPU time of one thread, which does not grow when others take the processors; copies into and
out of the store are in it. Prints medians, and ratios paired by request with exact 95 % intervals; the aim is 8 times
less.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bake import ratio

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as workers have it


def cpu_ms(engine: Any, prompt: Sequence[int]) -> float:
    """CPU time of a request for one token, in ms."""
    began = time.process_time_ns()
    engine.generate([prompt], 1, stop=False)
    return (time.process_time_ns() - began) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--adapter", type=Path, default=Path("demo/adapter"))
    parser.add_argument("--engine", choices=["eager", "compiled"], default="eager")
    parser.add_argument("--shared", type=int, default=1500, help="tokens that all prompts of a round begin with")
    parser.add_argument("--own", type=int, default=40, help="tokens of each prompt that come after them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--later", type=int, default=4, help="requests of a round after its first")
    arguments = parser.parse_args()

    import torch

    from peftopt import plugins, stats
    from peftopt.engines._prefix import Reuse
    from peftopt.records import Model

    torch.set_num_threads(1)
    dice = random.Random(0)
    model = Model(str(arguments.model.resolve()), (str(arguments.adapter.resolve()),))
    source = plugins.module("engine", arguments.engine)
    length = arguments.shared + arguments.own
    room = {"cache_len": 2 ** length.bit_length(), "prompt_buckets": str(length)}
    params = source.Params(**room) if arguments.engine == "compiled" else source.Params()
    engines = {"without": source.open(model, params), "with": source.open(model, params, reuse=Reuse())}
    vocabulary = len(engines["with"].tokenizer)

    def drawn(count: int) -> list[int]:
        return [dice.randrange(100, vocabulary) for _ in range(count)]

    for engine in engines.values():  # whatever is compiled is compiled here
        engine.generate([drawn(length)], 2, stop=False)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for turn in range(arguments.rounds):
        prefix = drawn(arguments.shared)
        for number in range(1 + arguments.later):
            prompt = [*prefix, *drawn(arguments.own)]
            for name in dice.sample(list(engines), len(engines)):
                times[name, "later" if number else "first"].append(cpu_ms(engines[name], prompt))
        print(f"round {turn + 1} of {arguments.rounds}: {dict(times)}", file=sys.stderr, flush=True)
    kept = engines["with"].facts()["prefix_bytes"]
    print("request | without, ms | with, ms | without / with")
    for which in ("first", "later"):
        without, reusing = times["without", which], times["with", which]
        medians = f"{stats.median(without):.0f} | {stats.median(reusing):.0f}"
        print(f"{which} | {medians} | {ratio(without, reusing, 2)}, n = {len(without)}")
    print(f"{kept / 1e6:.1f} MB kept of {len(times['with', 'later']) + arguments.rounds + 1} prompts")


if __name__ == "__main__":
    main()
