"""Files that somebody has broken by chance, of every kind that users hand to peftopt, and what `peftopt check` says of
them: only documented exit codes, never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.command_line import RECIPE, prompts
from helpers.mutations import mutated
from peftopt.cli import main

CODES = (0, 2, 4)
"""A recipe that works all the same, bad input, and something that is not installed."""

WORDS = (
    b"\0",
    b"\xff",
    b"{",
    b"[",
    b"'",
    b": ",
    b"- ",
    b"&a",
    b"*a",
    b"!!",
    b"\t",
    b"%",
    b"1e999",
    b"-1",
    b"nan",
    b"\n",
)
METRICS = ("latency.p95@chat <= 400 ms", "accuracy >= 1 %", "size <= 0.5x", "perplexity <= 1.05x", "memory <= 1 GB")


@dataclass(frozen=True)
class Said:
    """What came of a change: `wrong` is "" where all is as it should be. `seconds` of CPU time."""

    what: str
    wrong: str
    seconds: float


def place(base: Path, lora: Path, folder: Path) -> Path:
    """A folder in which all is well."""
    shutil.copytree(base, folder / "base")
    shutil.copytree(lora, folder / "lora")
    questions = prompts(folder / "eval.jsonl", 8, "eval")
    text = RECIPE.format(base="base", adapter="lora", prompts=questions.name)
    (folder / "tiny.yaml").write_text(text + "require:\n  - latency.p95@chat <= 400 ms\n")
    return folder


def garbled(file: Path, chance: random.Random) -> str:
    """Cut, repeat, or put something into a file's bytes."""
    data = file.read_bytes()
    at, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    way = chance.randrange(4)
    if way == 0:
        changed = data[:at] + data[end:]
    elif way == 1:
        changed = data[:at] + data[at:end] * 3 + data[end:]
    elif way == 2:
        changed = data[:at]
    else:
        changed = data[:at] + b"".join(chance.choices(WORDS, k=chance.randint(1, 5))) + data[at:]
    file.write_bytes(changed)
    return f"{file.name}: way {way} at {at} to {end}"


def json_changed(file: Path, chance: random.Random) -> str:
    """Change a value of a JSON file, or remove it."""
    value, what = mutated(json.loads(file.read_text()), chance)
    file.write_text(json.dumps(value))
    return f"{file.name}: {what}"


def recipe(folder: Path, chance: random.Random) -> str:
    return garbled(folder / "tiny.yaml", chance)


def threshold(folder: Path, chance: random.Random) -> str:
    """A required limit of odd letters."""
    text = chance.choice(METRICS)
    at = chance.randrange(len(text))
    text = (
        text[:at]
        + chance.choice(["", "x", "@", "<", ">=", "%", "٣", "1e400", "-", ".", " ", "nan", "🙂"])
        + text[at + 1 :]
    )
    file = folder / "tiny.yaml"
    file.write_text(file.read_text().replace("latency.p95@chat <= 400 ms", json.dumps(text)))
    return f"require: {text!r}"


def rows(folder: Path, chance: random.Random) -> str:
    """Prompts with a line that is another, or with broken bytes."""
    file = folder / "eval.jsonl"
    if chance.random() < 0.5:
        return garbled(file, chance)
    lines = file.read_text().splitlines()
    at = chance.randrange(len(lines))
    value, what = mutated(json.loads(lines[at]), chance)
    file.write_text("\n".join([*lines[:at], json.dumps(value), *lines[at + 1 :]]) + "\n")
    return f"{file.name}:{at + 1}: {what}"


def header(folder: Path, chance: random.Random) -> str:
    """A safetensors file with another header, of the length that is said, or of another."""
    file = chance.choice([folder / "base" / "model.safetensors", folder / "lora" / "adapter_model.safetensors"])
    if chance.random() < 0.3:
        return garbled(file, chance)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    value, what = mutated(json.loads(data[8 : 8 + length]), chance)
    text = json.dumps(value).encode()
    said = chance.choice([len(text), len(text), len(text), 0, 2**63, len(data) * 2])
    file.write_bytes(said.to_bytes(8, "little") + text + data[8 + length :])
    return f"{file.name}: {what}, length {said}"


def config_of(*names: str) -> Callable[[Path, random.Random], str]:
    """Changes one of these files."""

    def change(folder: Path, chance: random.Random) -> str:
        file = folder / chance.choice(names)
        return json_changed(file, chance) if chance.random() < 0.85 else garbled(file, chance)

    return change


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    "recipe": recipe,
    "threshold": threshold,
    "prompts": rows,
    "safetensors": header,
    "adapter config": config_of("lora/adapter_config.json"),
    "model config": config_of("base/config.json", "base/generation_config.json"),
    "tokenizer": config_of("base/tokenizer_config.json", "base/tokenizer.json"),
}


def tried(good: Path, kind: str, seed: int, scratch: Path) -> Said:
    """What `peftopt check` says of a copy in which one file was changed, as the seed says."""
    folder = scratch / "one"
    shutil.copytree(good, folder)
    try:
        what = KINDS[kind](folder, random.Random(f"{kind} {seed}"))
        started = time.process_time()
        code, said = checked(folder / "tiny.yaml")
        seconds = time.process_time() - started
    finally:
        shutil.rmtree(folder)
    wrong = ""
    if code not in CODES:
        wrong = f"exit {code}: {said.strip()[-400:]}"
    elif "Traceback" in said:
        wrong = f"a traceback: {said.strip()[-400:]}"
    elif code and "error:" not in said and "mistake" not in said:
        wrong = f"exit {code} without a word: {said.strip()[-400:]}"
    return Said(f"{kind} {seed}: {what}", wrong, seconds)


def checked(path: Path) -> tuple[int, str]:
    """The exit code of `peftopt check`, and what it said."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            main(["check", str(path), "--no-forecast"])
        except SystemExit as ended:
            return int(ended.code or 0), said.getvalue()
    raise AssertionError("the command line ends by an exit code")


def many(good: Path, scratch: Path, first: int = 0) -> Iterator[tuple[str, Said]]:
    """Each kind in turn, with new seeds, for as long as somebody asks."""
    seed = first
    while True:
        for kind in KINDS:
            yield kind, tried(good, kind, seed, scratch)
        seed += 1
