"""What a baked prompt saves before the first token: live PEFT, the baked prompt and the base without virtual tokens.

    python benchmarks/bake.py --model models/smollm2-135m-instruct             # some ten minutes on two cores
    python benchmarks/bake.py --model FOLDER --tokens 128 --batch 1 --rounds 40
    python benchmarks/bake.py --clock cpu                                       # on a machine with other work

All three are the engine `eager` in one process, asked in turns of random order for one token of the same prompts. The
soft prompts are random words' embeddings: times do not depend on what they say. Prints ratios of TTFT with exact 95 %
intervals; the aim is a baked prompt within 3 % of the base without virtual tokens. `--clock cpu` counts this process's
CPU time, on one thread, up to the end of a request for one token: it does not grow when others take the processors.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as workers have it

WARMUP = 2
"""Rounds that are not counted."""


def soft_prompt(model: Path, folder: Path, tokens: int) -> Path:
    """Write an adapter of prompt tuning whose virtual tokens are embeddings of random words."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(tokens)
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    adapted = peft.get_peft_model(base, config)
    words = base.get_input_embeddings().weight
    with torch.no_grad():
        picked = words[torch.randint(len(words), (tokens,))]
        adapted.prompt_encoder["default"].embedding.weight.copy_(picked)
    adapted.eval().save_pretrained(folder)
    return folder


def first_token_ms(engine: Any, prompts: Sequence[Sequence[int]], clock: str) -> float:
    """Milliseconds from the request to its first token; by the clock "cpu", of CPU time."""
    if clock == "cpu":
        began = time.process_time_ns()
        engine.generate(prompts, 1, stop=False)
        return (time.process_time_ns() - began) / 1e6
    started = time.perf_counter_ns()
    answers = engine.generate(prompts, 1, stop=False)
    return float(answers[0].times[0] - started) / 1e6


def raced(
    engines: dict[str, Any], batch: int, length: int, rounds: int, clock: str, dice: random.Random
) -> dict[str, list[float]]:
    """Times to the first token of each engine in ms, a value a round: every round's prompts are the same for all."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    vocabulary = len(next(iter(engines.values())).tokenizer)
    for _ in range(rounds + WARMUP):
        lengths = [length] + [dice.randint(length // 2, length) for _ in range(batch - 1)]
        prompts = [[dice.randrange(100, vocabulary) for _ in range(n)] for n in lengths]
        for name in dice.sample(list(engines), len(engines)):
            times[name].append(first_token_ms(engines[name], prompts, clock))
    return {name: values[WARMUP:] for name, values in times.items()}


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    """The median ratio of paired times, with its interval, as text."""
    from peftopt import stats

    interval = stats.hodges_lehmann([log(a / b) for a, b in zip(one, other, strict=True)], 0.95)
    return f"{exp(interval.estimate):.3f}x ({exp(interval.low):.3f}–{exp(interval.high):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=48, help="tokens of the longest prompt")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()

    import torch

    from peftopt import stats
    from peftopt.engines import eager
    from peftopt.models import baked
    from peftopt.records import Model
    from peftopt.transforms import bake

    if arguments.clock == "cpu":
        torch.set_num_threads(1)
    base = str(arguments.model.resolve())
    dice = random.Random(0)
    plain = eager.open(Model(base), eager.Params())
    print("virtual tokens | batch | cache | live / without | baked / without | baked / live | without, ms")
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory() as folder:
            adapter = soft_prompt(arguments.model, Path(folder) / "adapter", tokens)
            live = Model(base, (str(adapter),))
            made = bake.transform(live, bake.Params(certify="own"), Path(folder) / "baked", [], 0)
            kv_bytes = baked.open_baked(Path(folder) / "baked").kv_bytes
            engines = {"live": eager.open(live, eager.Params()), "baked": eager.open(made, eager.Params())}
            for batch in arguments.batch:
                arms = {"without": plain, **engines}
                times = raced(arms, batch, arguments.length, arguments.rounds, arguments.clock, dice)
                cells = [ratio(times["live"], times["without"]), ratio(times["baked"], times["without"])]
                cells += [ratio(times["baked"], times["live"]), f"{stats.median(times['without']):.1f}"]
                print(f"{tokens} | {batch} | {kv_bytes / 1e6:.2f} MB | {' | '.join(cells)}", flush=True)
            for engine in engines.values():
                engine.close()


if __name__ == "__main__":
    main()
