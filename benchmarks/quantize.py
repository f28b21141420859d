"""What each way to quantize costs and keeps, on a model merged with its adapter (docs/decisions/quantizers.md).

Per route: seconds, CPU seconds and peak memory of `peftopt quantize`, size on disk. Against the unmerged adapter, on
checked rows: perplexity ratio, KL divergence, accuracy, and delta survival, which is 1 - KL(adapter || route) /
KL(adapter || base): 1 for the adapter's own predictions, 0 for the base's. The time of a decode step over that of the
unmerged adapter's, and answered tokens per second of eight requests at once, prompts included, over the adapter's: from
interleaved blocks with an exact interval. All through the package's own workers and probes.
Also the overhead of `peftopt quantize` over the bare library call, and the same routes calibrated on generic texts.
Run: python benchmarks/quantize.py --base FOLDER --adapter FOLDER --prompts F.jsonl --calibration F.jsonl [--rows 96]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from peftopt import corpus, machine, stats, store
from peftopt.decision.evidence import exp
from peftopt.jobs import OpenJob, QualityJob, SpeedJob, TransformJob
from peftopt.measurements import Answer, as_json, structured
from peftopt.records import GENERIC, Interval, Model
from peftopt.runner import preflight, single
from peftopt.runner.process import WorkerProcess

TOGETHER = 6
"""Models that race the adapter at a time: all of them are in memory meanwhile."""


@dataclass(frozen=True)
class Route:
    """One way to quantize: a plug-in, its parameters, what it calibrates on, and whether the adapter stays apart."""

    name: str
    plugin: str
    params: dict[str, Any] = field(default_factory=dict)
    calibration: str = ""
    apart: bool = False


def routes(task: str) -> list[Route]:
    found = [
        Route("int8", "int8"),
        Route("bnb8", "bnb8"),
        Route("nf4", "nf4"),
        Route("fp8", "fp8"),
        Route("w8a8", "w8a8", calibration=task),
        Route("gptq 8 bits", "gptq", {"bits": 8}, task),
        Route("gptq", "gptq", calibration=task),
        Route("gptq mixed 0.2", "gptq", {"mixed": 0.2}, task),
        Route("awq", "awq", calibration=task),
        Route("nf4 (adapter apart)", "nf4", apart=True),
        Route("gptq (adapter apart)", "gptq", calibration=task, apart=True),
    ]
    generic = [
        Route(f"{r.name} (generic)", r.plugin, r.params, "generic")
        for r in found
        if r.plugin in ("gptq", "awq") and not r.apart and not r.params
    ]
    return found + generic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("base", "adapter", "prompts", "calibration"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--schema")
    parser.add_argument("--rows", type=int, default=96, help="checked rows per route")
    parser.add_argument("--blocks", type=int, default=10, help="interleaved blocks of the decode race; 0 = none")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of a timed request")
    parser.add_argument("--pairs", type=int, default=2, help="how often the overhead is measured; 0 = not at all")
    parser.add_argument("--only", default="", help="names of routes, separated by commas")
    parser.add_argument("--folder", type=Path, help="keep models and answers here, and reuse what is there")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    home = arguments.folder or Path(tempfile.mkdtemp(prefix="peftopt-quantize-"))
    wanted = [r for r in routes(arguments.calibration) if not arguments.only or r.name in arguments.only.split(",")]
    rows = corpus.read(arguments.prompts)
    rows = [rows[n * len(rows) // arguments.rows] for n in range(min(arguments.rows, len(rows)))]
    schema = preflight.schema(arguments.schema) if arguments.schema else None

    say(f"{machine.cores()} cores, load {os.getloadavg()[0]:.1f}, {len(rows)} rows, {machine.versions()}")
    unmerged = Model(str(Path(arguments.base).resolve()), (str(Path(arguments.adapter).resolve()),))
    merged = make(home / "merged", Route("merge", "merge", {"certify": "blocks"}), unmerged)[0]
    models = {"adapter": unmerged, "merged": merged}
    figures: dict[str, dict[str, Any]] = {name: {} for name in models}
    for route in wanted:
        out = home / in_a_path(route.name)
        models[route.name], figures[route.name] = make(out, route, unmerged if route.apart else merged)
        say(f"made {route.name}: {figures[route.name].get('seconds', math.nan):.0f} s, load {os.getloadavg()[0]:.1f}")
    base = Model(unmerged.path)
    reference = home / f"reference-{len(rows)}.npz"
    answers = {}
    for name, model in {**models, "base": base}.items():  # the adapter first: it is what the others are compared with
        kept = home / f"{in_a_path(name)}.answers-{len(rows)}.json"
        if not kept.exists():
            is_reference = name == "adapter"
            found = judged(model, rows, schema, *((None, reference) if is_reference else (reference, None)))
            kept.write_text(json.dumps({row: as_json(answer) for row, answer in found.items()}))
        told = json.loads(kept.read_text())
        answers[name] = {row: structured(Answer, values, name) for row, values in told.items()}
        say(f"judged {name}, load {os.getloadavg()[0]:.1f}")
    for name in models:
        figures[name] |= quality(answers[name], answers["adapter"], answers["base"]) | {"bytes": size(models[name])}
    raced = [name for name in models if name != "adapter" and "generic" not in name and arguments.blocks]
    for at in range(0, len(raced), TOGETHER):
        field_ = {name: models[name] for name in ("adapter", *raced[at : at + TOGETHER])}
        for name, ratios in race(field_, rows, arguments).items():
            figures[name] |= ratios
    show(figures)
    overhead(wanted, home, merged, arguments.pairs)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, default=asdict, indent=1))
    if not arguments.folder:
        shutil.rmtree(home)


def make(out: Path, route: Route, model: Model) -> tuple[Model, dict[str, Any]]:
    """Quantize as `peftopt quantize` does, or reuse what is there."""
    if not out.exists():
        job = TransformJob(
            plugin=route.plugin,
            params=route.params,
            model=model,
            out=str(out),
            rows=corpus.calibration(route.calibration),
            calibration=GENERIC if route.calibration == GENERIC else "task",
        )
        out.with_suffix(".json").write_text(json.dumps(as_json(single.transform(job))))
    facts = json.loads(out.with_suffix(".json").read_text())
    return Model(str(out), tuple(facts["model"]["adapters"])), facts


def in_a_path(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def size(model: Model) -> int:
    return sum(store.size(Path(folder)) for folder in (model.path, *model.adapters))


def judged(
    model: Model, rows: list[corpus.Row], schema: Any, reference: Path | None, write: Path | None
) -> dict[str, Answer]:
    """The answers of probes/quality.py by row."""
    found: dict[str, Answer] = {}
    with WorkerProcess(Path(tempfile.mkdtemp()) / "judge.log", machine.cores()) as child:
        child.ask(OpenJob(plugin="eager", params={}, model=model), 900)
        job = QualityJob(
            rows=tuple(rows),
            schema=schema,
            new_tokens=64,
            batch=8,
            reference=str(reference) if reference else None,
            write_reference=str(write) if write else None,
        )
        child.ask(job, 3600, lambda answer: found.update({answer.row: answer}))
    return found


def quality(ours: dict[str, Answer], adapter: dict[str, Answer], base: dict[str, Answer]) -> dict[str, Any]:
    """Perplexity ratio, KL, delta survival and accuracy, each with its interval but the survival."""
    shared = sorted(ours)
    tokens = [adapter[r].scored_tokens for r in shared]
    found: dict[str, Any] = {"accuracy": stats.proportion(sum(ours[r].correct for r in shared), len(shared))}
    mine, theirs = ([records[r].nll or 0.0 for r in shared] for records in (ours, adapter))
    found["perplexity"] = stats.perplexity_ratio(mine, theirs, tokens)
    kl, without = ([records[r].kl for r in shared] for records in (ours, base))
    if None not in kl:
        found["kl"] = stats.ratio_of_means([nats or 0.0 for nats in kl], tokens)
        found["survival"] = 1 - sum(nats or 0.0 for nats in kl) / sum(nats or 0.0 for nats in without)
    return found


def race(models: dict[str, Model], rows: list[corpus.Row], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Time per decoded token at batch 1, and tokens per second at batch 8, over the unmerged adapter's, in interleaved
    blocks, all models resident."""
    short = [row for row in rows if "short" in row.slices] or rows
    logs: dict[str, dict[str, list[float]]] = {name: {"decode": [], "throughput": []} for name in models}
    folder, dice = Path(tempfile.mkdtemp()), random.Random(0)
    with ExitStack() as stack:
        children: dict[str, WorkerProcess] = {}
        for name, model in models.items():
            child = stack.enter_context(WorkerProcess(folder / f"{len(children)}.log", 1))
            child.ask(OpenJob(plugin="eager", params={}, model=model), 900)
            children[name] = child
        for block in range(arguments.blocks):
            picks = tuple((row,) for row in dice.choices(short, k=3))
            eight = tuple(dice.choices(short, k=8))
            ones = SpeedJob(batches=picks, new_tokens=arguments.new_tokens, warmup=1)
            batched = replace(ones, batches=(picks[0], eight))
            turn: dict[str, dict[str, float]] = {}
            for name in dice.sample(sorted(children), len(children)):
                alone = children[name].ask(ones, 900).requests
                at_once = children[name].ask(batched, 900).requests[-1]
                turn[name] = {
                    "decode": stats.median([r.tpot_ms for r in alone if r.tpot_ms and not r.warmup]),
                    "throughput": at_once.new_tokens / (at_once.request_duration_ms or math.nan),
                }
            for name, values in turn.items():
                for kind, value in values.items():
                    logs[name][kind].append(math.log(value / turn["adapter"][kind]))
            say(f"block {block + 1} of {arguments.blocks}, load {os.getloadavg()[0]:.1f}")
    return {
        name: {kind: exp(stats.hodges_lehmann(values, 0.95)) for kind, values in found.items()}
        for name, found in logs.items()
        if name != "adapter"
    }


BARE = """
import json, sys, time
from peftopt.corpus import read
from peftopt import hf
started = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
encode = AutoTokenizer.from_pretrained(sys.argv[1])
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
rows = []
for row in read(sys.argv[2])[:32]:
    messages = [*row.messages, {"role": "assistant", "content": row.expected}]
    text = encode.apply_chat_template(messages, tokenize=False)
    rows.append(dict(encode(text, return_tensors="pt", truncation=True, max_length=512, add_special_tokens=False)))
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(sys.argv[4])}
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
recipe = [GPTQModifier(dampening_frac=0.01, config_groups=groups, ignore=["lm_head"])]
oneshot(model=model, tokenizer=encode, recipe=recipe, dataset=DataLoader(rows, batch_size=None))
model.save_pretrained(sys.argv[3], save_compressed=True)
encode.save_pretrained(sys.argv[3])
"""
"""GPTQ as llm-compressor's own examples call it."""


def overhead(wanted: list[Route], home: Path, merged: Model, pairs: int) -> None:
    """`peftopt quantize --method gptq` over the bare library call, whole processes in turns: wall and CPU seconds.

    Ours opens the result in a fresh process and lets it answer, which the bare call does not.
    """
    route = next((r for r in wanted if r.name == "gptq"), None)
    if route is None:
        return
    made = json.loads((home / "gptq" / "quantization.json").read_text())
    environment = {**os.environ, "OMP_NUM_THREADS": str(machine.cores())}
    for pair in range(pairs):
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            bare = [sys.executable, "-c", BARE, merged.path, route.calibration, f"{scratch}/bare"]
            verb = [sys.executable, "-m", "peftopt.cli", "quantize", "--method", "gptq", "--model", merged.path]
            verb += ["--calibration", route.calibration, "--out", f"{scratch}/ours", "--json"]
            lines = {"bare": [*bare, str(made["params"]["group_size"])], "ours": verb}
            order = sorted(lines, reverse=bool(pair % 2))  # each goes first in turn: a machine gets warm, or busy
            took = {name: timed(lines[name], environment) for name in order}
            (wall, cpu, _), (our_wall, our_cpu, said) = took["bare"], took["ours"]
            say(
                f"bare library call: {wall:.0f} s, {cpu:.0f} CPU-s; peftopt quantize with its check in a fresh process:"
            )
            say(f"  {our_wall:.0f} s ({our_wall / wall:.2f}x), {our_cpu:.0f} CPU-s ({our_cpu / cpu:.2f}x)")
            say(f"  of that, the transform alone: {json.loads(said)['seconds']:.0f} s")


def timed(line: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds of the whole process tree, and what it printed."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    started, before = time.perf_counter(), cpu()
    done = subprocess.run(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    return time.perf_counter() - started, cpu() - before, done.stdout


def show(figures: dict[str, dict[str, Any]]) -> None:
    header = (
        "route",
        "s",
        "CPU s",
        "peak GB",
        "MB",
        "perplexity",
        "KL",
        "survives",
        "accuracy",
        "decode",
        "throughput",
    )
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for name, f in figures.items():
        cells = [
            name,
            f"{f['seconds']:.0f}" if "seconds" in f else "",
            f"{f['cpu_seconds']:.0f}" if "cpu_seconds" in f else "",
            f"{f['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in f else "",
            f"{f['bytes'] / 1e6:.0f}",
            interval(f["perplexity"], ".3f") if name != "adapter" else "1",
            f"{f['kl'].estimate:.2g}" if "kl" in f else "0",
            f"{f['survival']:.1%}" if "survival" in f else "",
            interval(f["accuracy"], ".1%"),
            *(interval(f[kind], ".2f") + "x" if kind in f else "" for kind in ("decode", "throughput")),
        ]
        print("| " + " | ".join(cells) + " |")


def interval(found: Interval, form: str) -> str:
    return f"{found.estimate:{form}} ({found.low:{form}}–{found.high:{form}})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
