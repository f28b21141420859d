"""What a baked prompt saves before the first token: live PEFT, the baked prompt and the base without virtual tokens.

    python benchmarks/bake.py --model models/smollm2-135m-instruct             # some ten minutes on two cores
    python benchmarks/bake.py --model FOLDER --tokens 128 --batch 1 --rounds 40
    python benchmarks/bake.py --clock cpu                                       # on a machine with other work
    python benchmarks/bake.py --engine compiled --batch 8 --new-tokens 16      # or server: the rows of our own server

All three are the engine `eager` in one process, asked in turns of random order for the same prompts. Live prompts have
no other engine that batches them: with --engine there are two. The soft prompts are random words' embeddings: times do
not depend on what they say. Prints ratios of TTFT, and of the time until the last token where there are several, with
exact 95 % intervals; the aim is a baked prompt within 3 % of the base without virtual tokens. `--clock cpu` counts this
process's CPU time, on one thread, of a request for one token and of one for all: it does not grow when others take the
processors.
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


class Rows:
    """The rows that our server batches, as an engine that generates."""

    def __init__(self, model: Any) -> None:
        from peftopt.engines import _rows

        self._served, self._name = _rows.Served(model.path, "auto"), ""
        for folder in model.adapters:
            self._name = "prompt"
            self._served.add(self._name, folder)
        self.tokenizer = self._served.tokenizer

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> Any:
        """Greedy answers, of which only the times are kept."""
        from peftopt.engines import Generation

        rows = self._served.begin(prompts, self._name)
        times = []
        for number in range(new_tokens):
            tokens = rows.logits.argmax(-1).tolist()
            times.append(time.perf_counter_ns())
            if number + 1 < new_tokens:
                rows.step(tokens)
        return [Generation([], times, stop)]

    def close(self) -> None:
        """Free the model."""
        self._served.close()


def opened(engine: str, model: Any, room: int, length: int) -> Any:
    """The engine with a model. A compiled one has a cache of `room` tokens and prompts padded to `length`."""
    from peftopt.engines import compiled, eager

    if engine == "server":
        return Rows(model)
    if engine == "compiled":
        return compiled.open(model, compiled.Params(cache_len=room, prompt_buckets=str(length)))
    return eager.open(model, eager.Params())


def timed_ms(engine: Any, prompts: Sequence[Sequence[int]], new_tokens: int, clock: str) -> tuple[float, float]:
    """Milliseconds from the request to its first token and to its last one; by the clock "cpu", of CPU time."""
    if clock == "cpu":
        one = _cpu_ms(engine, prompts, 1)
        return one, _cpu_ms(engine, prompts, new_tokens) if new_tokens > 1 else one
    started = time.perf_counter_ns()
    times = engine.generate(prompts, new_tokens, stop=False)[0].times
    return float(times[0] - started) / 1e6, float(times[-1] - started) / 1e6


def _cpu_ms(engine: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    began = time.process_time_ns()
    engine.generate(prompts, new_tokens, stop=False)
    return (time.process_time_ns() - began) / 1e6


Times = dict[str, list[tuple[float, float]]]


def raced(
    engines: dict[str, Any], batch: int, length: int, rounds: int, new_tokens: int, clock: str, dice: random.Random
) -> Times:
    """Times of each engine in ms, a pair a round: every round's prompts are the same for all."""
    times: Times = {name: [] for name in engines}
    vocabulary = len(next(iter(engines.values())).tokenizer)
    for _ in range(rounds + WARMUP):
        lengths = [length] + [dice.randint(length // 2, length) for _ in range(batch - 1)]
        prompts = [[dice.randrange(100, vocabulary) for _ in range(n)] for n in lengths]
        for name in dice.sample(list(engines), len(engines)):
            times[name].append(timed_ms(engines[name], prompts, new_tokens, clock))
    return {name: values[WARMUP:] for name, values in times.items()}


def ratio(one: Sequence[float], other: Sequence[float], digits: int = 3) -> str:
    """The median ratio of paired times, with its interval, as text."""
    from peftopt import stats

    interval = stats.hodges_lehmann([log(a / b) for a, b in zip(one, other, strict=True)], 0.95)
    estimate, low, high = (f"{exp(x):.{digits}f}" for x in (interval.estimate, interval.low, interval.high))
    return f"{estimate}x ({low}–{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=48, help="tokens of the longest prompt")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--engine", choices=["eager", "compiled", "server"], default="eager")
    parser.add_argument("--new-tokens", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    from peftopt import stats
    from peftopt.models import baked
    from peftopt.records import Model
    from peftopt.transforms import bake

    if arguments.clock == "cpu":
        torch.set_num_threads(1)
    base = str(arguments.model.resolve())
    dice = random.Random(0)
    longest = max(arguments.tokens) + arguments.length + arguments.new_tokens
    room = 2 ** (longest - 1).bit_length()
    plain = opened(arguments.engine, Model(base), room, arguments.length)
    print("virtual tokens | batch | cache | until token | ratio | without, ms")
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory() as folder:
            adapter = soft_prompt(arguments.model, Path(folder) / "adapter", tokens)
            live = Model(base, (str(adapter),))
            made = bake.transform(live, bake.Params(certify="own"), Path(folder) / "baked", [], 0)
            kv_bytes = baked.open_baked(Path(folder) / "baked").kv_bytes
            variants = {"live": live, "baked": made} if arguments.engine == "eager" else {"baked": made}
            engines = {
                name: opened(arguments.engine, model, room, arguments.length) for name, model in variants.items()
            }
            for batch in arguments.batch:
                how = batch, arguments.length, arguments.rounds, arguments.new_tokens, arguments.clock
                times = raced({"without": plain, **engines}, *how, dice)
                for at, token in enumerate(sorted({1, arguments.new_tokens})):
                    taken = {name: [both[at] for both in values] for name, values in times.items()}
                    pairs = [(one, other) for one in variants for other in ("without", "live") if other in taken]
                    cells = [f"{a} / {b} {ratio(taken[a], taken[b])}" for a, b in pairs if a != b]
                    row = [str(tokens), str(batch), f"{kv_bytes / 1e6:.2f} MB", str(token), *cells]
                    print(" | ".join([*row, f"{stats.median(taken['without']):.1f}"]), flush=True)
            for engine in engines.values():
                engine.close()


if __name__ == "__main__":
    main()
