"""Do two meters agree? `peftopt load` beside `vllm bench serve`, on one server, with the same requests.

They take turns in random order, a first pass discarded (it fills the prefix cache for both). Prints, for each figure,
both medians and the ratio of ours to theirs with its exact interval over the paired rounds; the aim is within 3 %.

    python benchmarks/load.py --url http://localhost:8000 --model NAME --tokenizer FOLDER --prompts FILE.jsonl \\
        --vllm PATH_OF_THE_VLLM_COMMAND --concurrency 1 --concurrency 4 --rate 2
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from peftopt import corpus, stats
from peftopt.evidence import exp

THEIRS = {
    "mean TTFT ms": "mean_ttft_ms",
    "mean TPOT ms": "mean_tpot_ms",
    "output tokens/s": "output_throughput",
    "requests/s": "request_throughput",
}
OURS = {
    "mean TTFT ms": "ttft_mean_ms",
    "mean TPOT ms": "tpot_mean_ms",
    "output tokens/s": "output_tokens_per_s",
    "requests/s": "request_rate",
}
CONSTANT = 1e6
"""vLLM's burstiness at which its gamma gaps are all the same, as ours are with --arrivals constant."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("url", "model", "tokenizer", "prompts", "vllm"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--concurrency", type=int, action="append", default=[])
    parser.add_argument("--rate", type=float, action="append", default=[])
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    a = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="peftopt-"))
    rows = corpus.read(a.prompts)[: a.requests]
    texts = ["\n".join(m["content"] for m in row.messages) for row in rows]
    ours, theirs = folder / "ours.jsonl", folder / "theirs.jsonl"
    ours.write_text("".join(json.dumps({"id": str(n), "prompt": t}) + "\n" for n, t in enumerate(texts)))
    theirs.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    dice = random.Random(0)
    shapes = [("users", c) for c in a.concurrency] + [("a second", r) for r in a.rate]
    for kind, number in shapes:
        found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for _ in range(a.rounds + 1):
            for who in dice.sample(sorted(found), 2):
                run = _ours if who == "ours" else _theirs
                found[who].append(run(a, ours if who == "ours" else theirs, kind, number, folder))
        print(f"{number:g} {kind}, {len(texts)} requests of {a.new_tokens} tokens, {a.rounds} rounds")
        for figure in OURS:
            pairs = [(o[figure], t[figure]) for o, t in zip(found["ours"][1:], found["theirs"][1:], strict=True)]
            ratio = exp(stats.hodges_lehmann([math.log(o / t) for o, t in pairs], 0.95))
            medians = (stats.median([p[side] for p in pairs]) for side in (0, 1))
            print(
                f"  {figure:<16} peftopt {next(medians):8.2f}  vllm bench {next(medians):8.2f}  "
                f"ratio {ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                flush=True,
            )


def _ours(a: argparse.Namespace, prompts: Path, kind: str, number: float, folder: Path) -> dict[str, float]:
    shape = ["--concurrency", int(number)] if kind == "users" else ["--rate", number, "--arrivals", "constant"]
    command = [sys.executable, "-m", "peftopt.cli", "load", a.url, "--model", a.model, "--prompts", prompts, *shape]
    command += ["--requests", a.requests, "--new-tokens", a.new_tokens, "--json", "--quiet", "--patient"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)["figures"]
    assert figures["failed"] == 0, figures["errors"]
    return {name: figures[key] for name, key in OURS.items()}


def _theirs(a: argparse.Namespace, prompts: Path, kind: str, number: float, folder: Path) -> dict[str, float]:
    shape = ["--max-concurrency", int(number)] if kind == "users" else ["--request-rate", number]
    command = [a.vllm, "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    command += ["--base-url", a.url, "--model", a.model, "--tokenizer", a.tokenizer, "--num-prompts", a.requests]
    command += ["--dataset-name", "custom", "--dataset-path", prompts, "--custom-output-len", a.new_tokens]
    command += ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--burstiness", CONSTANT, *shape]
    command += ["--temperature", 0, "--save-result", "--save-detailed", "--result-dir", folder]
    command += ["--result-filename", "result.json", "--disable-tqdm"]
    subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    found = json.loads((folder / "result.json").read_text())
    assert found["completed"] == a.requests, found["errors"]
    return {name: found[key] for name, key in THEIRS.items()}


if __name__ == "__main__":
    main()
