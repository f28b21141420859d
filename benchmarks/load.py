"""Do two meters agree? `peftopt load` beside `vllm bench serve`, on one server, with the same requests.

They take turns in random order, a first pass discarded (it fills the prefix cache for both). Prints, for each figure,
both medians and the ratio of ours to theirs with its exact interval over the paired rounds; the aim is within 3 %.

An engine's own noise can hide 3 %. `--paced` puts a server in its place that streams each token at a set time (the one
of the tests, in a process of its own): what the meters differ by then is the meters'.

vLLM's meter needs pandas beside vLLM. Each meter runs in a process of its own that lives for all rounds, so that
neither pays for imports.

    python benchmarks/load.py --url http://localhost:8000 --model NAME --tokenizer FOLDER --prompts FILE.jsonl \\
        --vllm PYTHON_OF_THE_VLLM_ENVIRONMENT --concurrency 1 --concurrency 4 --rate 2
    python benchmarks/load.py --paced --tokenizer FOLDER --prompts FILE.jsonl --vllm PYTHON --concurrency 4 --rate 2
"""

from __future__ import annotations

import argparse
import atexit
import json
import math
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from peftopt import corpus, stats
from peftopt.decision.evidence import exp

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


TESTS = Path(__file__).resolve().parents[1] / "tests"
PACED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from helpers.servers import served
with served(first=0.3, gap=0.06) as server:  # seconds, about what vLLM takes here
    print(server.url, flush=True)
    time.sleep(86400)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tokenizer", "prompts", "vllm"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--url")
    parser.add_argument("--model", default="base")
    parser.add_argument("--paced", action="store_true", help="against a server that streams tokens at set times")
    parser.add_argument("--concurrency", type=int, action="append", default=[])
    parser.add_argument("--rate", type=float, action="append", default=[])
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    a = parser.parse_args()
    if bool(a.url) == a.paced:
        parser.error("give either --url or --paced")
    if a.paced:
        paced = subprocess.Popen([sys.executable, "-c", PACED, str(TESTS)], stdout=subprocess.PIPE, text=True)
        atexit.register(paced.kill)
        assert paced.stdout
        a.url = paced.stdout.readline().strip()

    folder = Path(tempfile.mkdtemp(prefix="peftopt-"))
    rows = corpus.read(a.prompts)[: a.requests]
    texts = ["\n".join(m["content"] for m in row.messages) for row in rows]
    ours, theirs = folder / "ours.jsonl", folder / "theirs.jsonl"
    ours.write_text("".join(json.dumps({"id": str(n), "prompt": t}) + "\n" for n, t in enumerate(texts)))
    theirs.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    meters = {"ours": Meter(sys.executable, OUR_CODE), "theirs": Meter(a.vllm, THEIR_CODE)}
    dice = random.Random(0)
    shapes = [("users", c) for c in a.concurrency] + [("a second", r) for r in a.rate]
    for kind, number in shapes:
        found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for _ in range(a.rounds + 1):
            for who in dice.sample(sorted(found), 2):
                run, prompts = (_ours, ours) if who == "ours" else (_theirs, theirs)
                found[who].append(run(a, meters[who], prompts, kind, number, folder / f"{who}.json"))
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


class Meter:
    """A process that does one load for each line of arguments it is sent, and says when it is done."""

    def __init__(self, python: str, code: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: subprocess.Popen[str] = subprocess.Popen([python, "-c", code], **pipes)  # type: ignore[call-overload]

    def run(self, arguments: list[object]) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()) != "done\n":
            assert line, "the meter ended"


OUR_CODE = """
import json, sys, contextlib
from peftopt.cli import main
for line in sys.stdin:
    out, *arguments = json.loads(line)
    with open(out, "w") as file, contextlib.redirect_stdout(file), contextlib.suppress(SystemExit):
        main(arguments)
    print("done", flush=True)
"""
THEIR_CODE = """
import argparse, json, sys
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
for line in sys.stdin:
    main(parser.parse_args(json.loads(line)))
    print("\\ndone", flush=True)
"""


def _ours(a: argparse.Namespace, meter: Meter, prompts: Path, kind: str, number: float, out: Path) -> dict[str, float]:
    shape = ["--concurrency", int(number)] if kind == "users" else ["--rate", number, "--arrivals", "constant"]
    command = [out, "load", a.url, "--model", a.model, "--prompts", prompts, "--requests", a.requests, *shape]
    meter.run([*command, "--new-tokens", a.new_tokens, "--json", "--quiet", "--patient"])
    figures = json.loads(out.read_text())["figures"]
    assert figures["failed"] == 0, figures["errors"]
    return {name: figures[key] for name, key in OURS.items()}


def _theirs(
    a: argparse.Namespace, meter: Meter, prompts: Path, kind: str, number: float, out: Path
) -> dict[str, float]:
    shape = ["--max-concurrency", int(number)] if kind == "users" else ["--request-rate", number]
    command = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", a.url]
    command += ["--model", a.model, "--tokenizer", a.tokenizer, "--num-prompts", a.requests, "--dataset-name", "custom"]
    command += ["--dataset-path", prompts, "--custom-output-len", a.new_tokens, "--skip-chat-template"]
    command += ["--disable-shuffle", "--ignore-eos", "--burstiness", CONSTANT, *shape, "--temperature", 0]
    command += ["--save-result", "--save-detailed", "--result-dir", out.parent, "--result-filename", out.name]
    meter.run([*command, "--disable-tqdm"])
    found = json.loads(out.read_text())
    assert found["completed"] == a.requests, found["errors"]
    return {name: found[key] for name, key in THEIRS.items()}


if __name__ == "__main__":
    main()
