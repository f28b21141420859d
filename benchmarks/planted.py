"""Does `peftopt diagnose` find what is wrong, and leave alone what is not? Six faults in our own server, found blind.

    python benchmarks/planted.py --out results/planted                    # six faults and 20 clean runs, shuffled
    python benchmarks/planted.py --out results/planted --judge            # the same again, from what was kept
    taskset -c 0 python benchmarks/planted.py --out results/planted --part 1/2     # half of the runs, on one core
    python benchmarks/planted.py --out results/planted --url              # servers that somebody else has started
    python benchmarks/planted.py --out results/planted --faults leak stuck-unload --clean 0

Every run has the same command line but for its --out, and adapters of its own seed. The fault is in the servers that
the diagnosis starts, put there by `benchmarks/faulty`; with --url in a server that runs already, whose URL is all that
the diagnosis is told.

What is true, and may therefore be said:

- extra-matmul: each adapted layer multiplies once more by a matrix of its own size.
  There must be a row unfused, "more work": fault.
- padded-rank: a LoRA is padded to rank 256 at its load. Unfused, "padded rank": fault.
- slot-cliff: with four live adapters, a request of a fifth evicts one and loads its own. Choice, "the cliff": costs.
- leak: each unload keeps 1 MB. Unloading, "memory at rest": costs.
- stuck-unload: an unload never returns. Unloading, "load and unload": fault. What memory does is not known
  then, and what waits for an unload fails: that may be said too.
- silent-prompt: a soft prompt is loaded and not used. Prompts, "it changes nothing": fault.
- clean: none of these. No row says "fault", no memory is kept, and there is no cliff.

A clean server has real costs: our server applies a LoRA in small matmuls of its own, answers adapters one after the
other, and computes virtual tokens for each request. Rows may name them. The truth about a cost is the long measurement
that all other clean runs are together: the interval of their ratios. A run contradicts it where it says "costs" and the
interval lies within what counts as free, or "no cost" and it lies beyond.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from peftopt import stats  # noqa: E402
from peftopt.decision.evidence import exp  # noqa: E402
from peftopt.diagnose import keeping  # noqa: E402
from peftopt.diagnose.records import FREE, Diagnosis, Row  # noqa: E402
from peftopt.engines._server import Server, free_port  # noqa: E402

FAULTY = ROOT / "benchmarks" / "faulty"
CLEAN = ""
LORAS = 6
"""Adapters that a server elsewhere has: more than the slots of the cliff."""

VIRTUAL_TOKENS = 16
WORDS = 12
"""Of a made-up prompt: the small vocabulary of the benchmark's base makes some 70 tokens of them."""

ORDER = "order.json"


@dataclass(frozen=True)
class Shown:
    """The row that shows a fault: any of these `parts` of a bottleneck, with that `finding`. `beside`: other rows, by
    bottleneck and part, that may say "fault" for the same cause."""

    bottleneck: str
    parts: tuple[str, ...]
    finding: str
    beside: tuple[tuple[str, str], ...] = ()


ALSO_STUCK = (("unloading", "memory at rest"), ("choice", "first request"))
"""Where an unload is waited for too."""

SHOWN: Mapping[str, Shown] = {
    "extra-matmul": Shown("unfused", ("more work",), "fault"),
    "padded-rank": Shown("unfused", ("padded rank",), "fault"),
    "slot-cliff": Shown("choice", ("the cliff",), "costs"),
    "leak": Shown("unloading", ("memory at rest",), "costs"),
    "stuck-unload": Shown("unloading", ("load and unload",), "fault", ALSO_STUCK),
    "silent-prompt": Shown("prompts", ("it changes nothing",), "fault"),
}

NEVER_COSTS = tuple((shown.bottleneck, part) for shown in SHOWN.values() for part in shown.parts)
"""Of a clean server, these never cost anything."""


# ---- judging, pure -----------------------------------------------------------------------------


def row_of(fault: str, diagnosis: Diagnosis) -> Row | None:
    """The row that shows the fault, None where none does."""
    shown = SHOWN[fault]
    rows = (row for row in diagnosis.rows if row.bottleneck == shown.bottleneck and row.part in shown.parts)
    return next((row for row in rows if row.finding == shown.finding), None)


def accusations(diagnosis: Diagnosis, fault: str = CLEAN) -> list[Row]:
    """Rows that say what is not so of a server with that fault."""
    shown = SHOWN.get(fault)
    true = {*((shown.bottleneck, part) for part in shown.parts), *shown.beside} if shown else set()
    return [
        row
        for row in diagnosis.rows
        if (row.finding == "fault" or (row.finding == "costs" and (row.bottleneck, row.part) in NEVER_COSTS))
        and (row.bottleneck, row.part) not in true
    ]


def contradictions(diagnosis: Diagnosis, others: Sequence[Diagnosis]) -> list[Row]:
    """Rows of a clean run that the other clean runs contradict together."""
    known: dict[tuple[object, ...], list[float]] = {}
    for other in others:
        for row in other.rows:
            if row.ratio is not None and row.ratio.estimate > 0:
                known.setdefault(_key(row), []).append(math.log(row.ratio.estimate))
    contradicted = []
    for row in diagnosis.rows:
        truth = exp(stats.hodges_lehmann(known.get(_key(row), []), 0.95))
        free, costly = truth.high < FREE, truth.low > FREE
        if (row.finding == "costs" and free) or (row.finding == "no cost" and costly):
            contradicted.append(row)
    return contradicted


def _key(row: Row) -> tuple[object, ...]:
    return row.bottleneck, row.part, row.phase, row.batch


# ---- running -----------------------------------------------------------------------------------


def make_models(folder: Path) -> Path:
    """A random Llama of 28 MB in fp32, whose matrices cost more than what is around them."""
    import torch
    from helpers.tiny_models import make_base  # type: ignore[import-not-found]
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    base = folder / "base"
    make_base(base, "float32")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(base)),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(base)
    return base


def make_adapters(base: Path, folder: Path, seed: int, loras: int) -> list[str]:
    """Random LoRAs of rank 8 and a soft prompt, as NAME=FOLDER."""
    import torch
    from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    named = []
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    prompt = PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type=TaskType.CAUSAL_LM)
    configs: dict[str, Any] = {**{f"support-{number}": lora for number in range(loras)}, "tone": prompt}
    for name, config in configs.items():
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for parameter, values in adapted.named_parameters():
            if "lora_B" in parameter or "prompt_embeddings" in parameter:
                torch.nn.init.normal_(values, std=0.1)
        adapted.save_pretrained(folder / name)
        named.append(f"{name}={folder / name}")
    return named


def environment(fault: str) -> dict[str, str]:
    """The variables of a program whose servers have that fault."""
    path = os.pathsep.join(filter(None, [str(FAULTY), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PLANTED_FAULT": fault, "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def elsewhere(base: Path, adapters: Sequence[str], fault: str, log: Path, threads: int) -> Iterator[str]:
    """The URL of a server with that fault."""
    port = free_port()
    command = [sys.executable, "-m", "peftopt.server", "--base", str(base), *adapters, "--port", str(port)]
    command += ["--threads", str(threads)]
    server = Server(command, environment(fault), f"http://127.0.0.1:{port}", log)
    try:
        server.ready(300.0)
        yield server.url
    finally:
        server.stop()


def run(arguments: argparse.Namespace, base: Path, fault: str, folder: Path, seed: int) -> None:
    """One diagnosis, kept in the folder."""
    named = arguments.adapter or make_adapters(base, folder / "adapters", seed, LORAS if arguments.url else 2)
    if arguments.url:  # our server has LoRAs or soft prompts
        soft = fault == "silent-prompt"
        named = [text for text in named if text.startswith("tone=") == soft]
    adapters = [word for text in named for word in ("--adapter", text)]
    command = [sys.executable, "-m", "peftopt.cli", "diagnose", "--base", str(base), *adapters, "--quiet"]
    command += ["--out", str(folder), "--minutes", str(arguments.minutes), "--threads", str(arguments.threads)]
    command += [] if arguments.base else ["--prompt-tokens", str(WORDS)]
    variables = environment(CLEAN if arguments.url else fault)
    with contextlib.ExitStack() as stack:
        if arguments.url:
            (folder / "logs").mkdir(exist_ok=True)
            log = folder / "logs" / "elsewhere.log"
            command += ["--engine", stack.enter_context(elsewhere(base, adapters, fault, log, arguments.threads))]
        said = stack.enter_context((folder / "said.txt").open("w"))
        limit_s = arguments.minutes * 180 + 900
        with contextlib.suppress(subprocess.TimeoutExpired):  # then there is no diagnosis, which the report says
            subprocess.run(command, cwd=ROOT, env=variables, stdout=said, stderr=said, check=False, timeout=limit_s)
    logs = "".join(log.read_text(errors="replace") for log in (folder / "logs").glob("*.log"))
    if fault and f"planted: {fault}" not in logs:
        raise SystemExit(f"{folder}: no server had the fault; {(folder / 'said.txt').read_text()[-2000:]}")


def measure(arguments: argparse.Namespace) -> None:
    """All runs in an order that the seed gives, or one part of them. One that is kept is not run again."""
    faults = [*arguments.faults * arguments.repeats, *[CLEAN] * arguments.clean]
    random.Random(arguments.seed).shuffle(faults)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / ORDER).write_text(json.dumps(faults))
    part, parts = (int(word) for word in arguments.part.split("/"))
    base = arguments.base or arguments.out / "base"
    if not base.exists():
        make_models(arguments.out)
    for number, fault in enumerate(faults):
        folder = arguments.out / f"run-{number:02}"
        if number % parts != part - 1 or (folder / keeping.DIAGNOSIS).exists():
            continue
        folder.mkdir(exist_ok=True)
        started = time.monotonic()
        run(arguments, base, fault, folder, arguments.seed * 1000 + number)
        print(f"run {number + 1} of {len(faults)}: {time.monotonic() - started:.0f} s", flush=True)


def report(out: Path) -> Iterator[str]:
    """What was found, a line each."""
    faults = json.loads((out / ORDER).read_text())
    runs = [(fault, out / f"run-{number:02}") for number, fault in enumerate(faults)]
    whole = [(fault, folder) for fault, folder in runs if (folder / keeping.DIAGNOSIS).exists()]
    told = [(fault, folder.name, keeping.read(folder)) for fault, folder in whole]
    yield from (f"{folder.name} has no diagnosis" for _, folder in runs if (_, folder) not in whole)
    planted = [(fault, name, diagnosis) for fault, name, diagnosis in told if fault]
    if planted:
        yield "| fault | found by | seconds | said besides, and not so |"
        yield "|---|---|---|---|"
    found = 0
    for fault, _, diagnosis in sorted(planted, key=lambda each: list(SHOWN).index(each[0])):
        row = row_of(fault, diagnosis)
        found += row is not None
        by = f"{row.bottleneck}: {row.part}: {row.sentence}" if row else "not found"
        wrong = "; ".join(f"{row.part}: {row.sentence}" for row in accusations(diagnosis, fault))
        yield f"| {fault} | {by} | {diagnosis.seconds:.0f} | {wrong} |"
    clean = [(name, diagnosis) for fault, name, diagnosis in told if not fault]
    problems = 0
    for name, diagnosis in clean:
        others = [other for another, other in clean if another != name]
        wrong_rows = [*accusations(diagnosis), *contradictions(diagnosis, others)]
        problems += bool(wrong_rows)
        yield from (f"{name}: {row.finding}: {row.bottleneck}: {row.part}: {row.sentence}" for row in wrong_rows)
    yield f"faults found: {found} of {len(planted)}; clean runs clean: {len(clean) - problems} of {len(clean)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder of the runs; what is there is kept.")
    parser.add_argument("--faults", nargs="*", choices=SHOWN, default=list(SHOWN))
    parser.add_argument("--repeats", type=int, default=1, help="Runs of each fault.")
    parser.add_argument("--clean", type=int, default=20, help="Runs without a fault.")
    parser.add_argument("--minutes", type=float, default=4.5, help="Of each diagnosis.")
    parser.add_argument("--threads", type=int, default=1, help="Of each server: with one, other work disturbs least.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", default="1/1", help="2/3: each third run, from the second one.")
    parser.add_argument("--url", action="store_true", help="Diagnose a server that runs already.")
    parser.add_argument("--base", type=Path, help="A model of your own.")
    parser.add_argument("--adapter", action="append", help="NAME=FOLDER; adapters of your own.")
    parser.add_argument("--judge", action="store_true", help="Only judge what is there.")
    arguments = parser.parse_args()
    if not arguments.judge:
        measure(arguments)
    for line in report(arguments.out):
        print(line)


if __name__ == "__main__":
    main()
