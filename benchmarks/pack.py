"""What packing saves in a batch of prompts of which one is long, and what it costs where all are alike.

    python benchmarks/pack.py                                # some minutes on one core, the demo's adapter on its base
    python benchmarks/pack.py --rows 32 --long 3000

One process has the engine twice, once behind `pack`, and asks both for the answers to the same batch of random tokens,
in turns of random order. `mixed` is a batch with one long prompt, `alike` one without. CPU time of one thread, which
does not grow when others take the processors. Prints medians, and ratios paired by batch with exact intervals.
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


def cpu_ms(engine: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    """CPU time of a request, in ms."""
    began = time.process_time_ns()
    engine.generate(prompts, new_tokens, stop=False)
    return (time.process_time_ns() - began) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--adapter", type=Path, default=Path("demo/adapter"))
    parser.add_argument("--rows", type=int, default=8, help="prompts of a batch")
    parser.add_argument("--short", type=int, default=150, help="tokens of the short prompts, give or take a third")
    parser.add_argument("--long", type=int, default=1500, help="tokens of the long one")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--budget", type=int, default=4096, help="`tokens` of pack")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()

    import torch

    from peftopt import stats
    from peftopt.engines import eager
    from peftopt.policies import Policed
    from peftopt.records import Model, Step

    torch.set_num_threads(1)
    dice = random.Random(0)
    model = Model(str(arguments.model.resolve()), (str(arguments.adapter.resolve()),))
    engine = eager.open(model, eager.Params())
    pack = Step("pack", "policy", "pack", {"tokens": arguments.budget})
    engines = {"without": engine, "with": Policed(engine, [pack])}
    vocabulary = len(engine.tokenizer)

    def drawn(mixed: bool) -> list[list[int]]:
        spread = arguments.short // 3
        lengths = [arguments.short + dice.randint(-spread, spread) for _ in range(arguments.rows)]
        if mixed:
            lengths[dice.randrange(arguments.rows)] = arguments.long
        return [[dice.randrange(100, vocabulary) for _ in range(length)] for length in lengths]

    engine.generate(drawn(False), 2, stop=False)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(arguments.rounds):
        for kind in ("mixed", "alike"):
            prompts = drawn(kind == "mixed")
            for name in dice.sample(list(engines), len(engines)):
                times[name, kind].append(cpu_ms(engines[name], prompts, arguments.new_tokens))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    print("batch | without, ms | with, ms | without / with")
    for kind in ("mixed", "alike"):
        without, packed = times["without", kind], times["with", kind]
        medians = f"{stats.median(without):.0f} | {stats.median(packed):.0f}"
        print(f"{kind} | {medians} | {ratio(without, packed, 2)}, n = {len(without)}")


if __name__ == "__main__":
    main()
