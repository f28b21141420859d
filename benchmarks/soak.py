"""Does a gateway, with its engine, keep anything over a long time? Users ask while adapters come and go.

    python benchmarks/soak.py                                   # 30 minutes, the engine eager on a tiny model
    python benchmarks/soak.py --minutes 600
    python benchmarks/soak.py --base DIR --adapter DIR --engine vllm

What the gateway and its engine hold at rest is read 24 times: memory, open files and sockets, threads. Exit code 1
where one of these grows, a wrong adapter answered, or errors grow; 3 where that is not decided.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import tempfile
from pathlib import Path

import aiohttp
from endurance import Gateway, ask, made, running

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from peftopt.diagnose.unloading import soaked, soaking  # noqa: E402
from peftopt.diagnose.unloading.cycles import Elsewhere  # noqa: E402
from peftopt.loadtest.protocols import Target  # noqa: E402

PROMPTS = {
    name: [{"role": "user", "content": text}]
    for name, text in {
        "stars": "count the stars over the lazy dog",
        "fox": "the fox number 7 jumps",
        "squares": "how many squares are there?",
    }.items()
}


def soak(gateway: Gateway, folders: list[Path], minutes: float, users: int) -> soaked.Soaked:
    """Load on a gateway that runs, while each of the adapters in turn becomes the version of one name."""
    turns = itertools.cycle(folders)

    async def churn() -> None:
        told = await gateway.put("churn", next(turns))
        if told["exit_code"]:
            raise SystemExit(f"an adapter could not be put: {told['said']}")
        async with aiohttp.ClientSession() as session:
            await ask(session, gateway.url, "churn", "the fox number 7 jumps")

    plan = soaking.Plan(60 * minutes, users, new_tokens=8)

    def show(done: int, what: str) -> None:
        print(f"  {done}/{plan.windows}  {what}", file=sys.stderr, flush=True)

    return soaking.soak(Elsewhere(Target(gateway.url)), [], PROMPTS, plan, show, churn=churn)


def report(run: soaked.Soaked) -> int:
    """Print a table; the exit code."""
    judged = soaked.judge(run)
    print(f"{60 * judged.hours:.0f} minutes, {judged.requests} requests, {sum(w.cycles for w in run.windows)} puts")
    print("\n| held at rest | at first | at the end | an hour | grows |\n| --- | --- | --- | --- | --- |")
    for name, trend in judged.trends.items():
        by, unit = (1e6, " MB") if "memory" in name else (1.0, "")
        low, high = (f"{bound / by:+.1f}" for bound in (trend.per_hour.low, trend.per_hour.high))
        grows = {True: "yes", False: "no", None: "not decided"}[trend.grows]
        print(
            f"| {name} | {trend.first / by:.1f}{unit} | {trend.last / by:.1f}{unit} "
            f"| {trend.per_hour.estimate / by:+.1f}{unit} ({low} to {high}) | {grows} |"
        )
    print(f"\nfailed: {dict(judged.errors) or 'none'}; answers told apart: {run.asked}, wrong: {len(run.wrong)}")
    for line in (*judged.reasons, *run.notes):
        print(line)
    return judged.outcome


def main() -> int:
    """Soak what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--base", type=Path, help="a real model; by default a tiny one is made")
    parser.add_argument("--adapter", type=Path, help="a LoRA for --base; others are made beside it")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        base, folders, roots = made(where, asked.base, asked.adapter)
        served = [
            "--base",
            str(base),
            "--adapter",
            f"support={folders['one']}",
            "--engine",
            asked.engine,
            "--keep",
            "2",
        ]
        gateway = Gateway(where, [*served, *roots])
        with running(gateway):

            async def ready() -> None:
                async with aiohttp.ClientSession() as session:
                    await gateway.ready(session)

            asyncio.run(ready())
            return report(soak(gateway, [folders["two"], folders["three"]], asked.minutes, asked.users))


if __name__ == "__main__":
    sys.exit(main())
