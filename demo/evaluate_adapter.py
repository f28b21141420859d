"""Measure an adapter of the demo against its base: greedy decoding over the eval rows, written as accuracy.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep: spinning starves a shared machine

import jsonschema
import peft
import torch
import transformers
from styles import answer as right_answer
from styles import style_of
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent


def read_rows(path: Path, limit: int, style: str) -> list[dict[str, Any]]:
    """The first `limit` rows of a data file, with the answers of a style."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    return [{**row, "expected": right_answer(row["expected"], style)} for row in rows]


def decode(model: Any, tokenizer: Any, rows: list[dict[str, Any]], batch: int, cap: int, name: str) -> list[str]:
    """Each row's greedy answer; rows of like length share a left-padded batch."""
    prompts = [
        tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False) for row in rows
    ]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False).input_ids]
    order = sorted(range(len(rows)), key=lambda index: lengths[index])
    answers = [""] * len(rows)
    begun = time.perf_counter()
    while order:
        fitting = sum(lengths[index] <= 1_000 for index in order[:batch])
        size = fitting or 1  # a long row goes alone
        chosen, order = order[:size], order[size:]
        inputs = tokenizer(
            [prompts[index] for index in chosen], padding=True, add_special_tokens=False, return_tensors="pt"
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=cap, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
        seconds = time.perf_counter() - begun
        print(f"{name}: {len(rows) - len(order)}/{len(rows)} rows, {seconds:.0f} s", file=sys.stderr, flush=True)
    return answers


def parse(answer: str) -> dict[str, Any]:
    """The answer's object; empty when it is none."""
    try:
        value = json.loads(answer)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def score(rows: list[dict[str, Any]], answers: list[str], schema: dict[str, Any], style: str) -> dict[str, Any]:
    """Exact match of all, of each slice and of the critical rows; of JSON also fields right and schema validity."""
    exact: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        critical = ["critical"] if row.get("critical") else []
        for name in ["all", *row["slices"], *critical]:
            exact[name].append(answer == row["expected"])
    return {
        "n": len(rows),
        "exact_match": mean(exact.pop("all")),
        "critical": {"n": len(exact["critical"]), "exact_match": mean(exact.pop("critical"))},
        **(score_json(rows, answers, schema) if style == "json" else {}),
        "slices": {name: {"n": len(exact[name]), "exact_match": mean(exact[name])} for name in sorted(exact)},
    }


def score_json(rows: list[dict[str, Any]], answers: list[str], schema: dict[str, Any]) -> dict[str, Any]:
    """Fields right and schema validity."""
    validator = jsonschema.Draft202012Validator(schema)
    fields: dict[str, list[bool]] = defaultdict(list)
    valid = []
    for row, answer in zip(rows, answers, strict=True):
        given = parse(answer)
        valid.append(validator.is_valid(given))
        for key, value in json.loads(row["expected"]).items():
            same = key in given and given[key] == value and isinstance(given[key], bool) == isinstance(value, bool)
            fields[key].append(same)
    by_field = {key: mean(values) for key, values in fields.items()}
    return {
        "field_accuracy": round(sum(by_field.values()) / len(by_field), 4),
        "schema_valid": mean(valid),
        "fields": by_field,
    }


def mean(values: list[bool]) -> float:
    """Share of true values; zero for none."""
    return round(sum(values) / len(values), 4) if values else 0.0


def main() -> int:
    """Command line: decode, score, write accuracy.json, print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=HERE.parent / "models" / "smollm2-135m-instruct")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "eval.jsonl")
    parser.add_argument("--schema", type=Path, default=HERE / "data" / "schema.json")
    parser.add_argument("--out", type=Path, default=None, help="default: accuracy.json beside the adapter")
    parser.add_argument("--answers", type=Path, default=None, help="also write every answer here, as JSON lines")
    parser.add_argument("--only", choices=("base", "adapter"), default=None, help="keep the other's earlier score")
    parser.add_argument("--limit", type=int, default=10**9, help="first rows only")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if not (arguments.base / "config.json").is_file():
        print("evaluate_adapter: no base model; run demo/fetch_model.py first", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out or arguments.adapter / "accuracy.json"
    style = style_of(arguments.adapter)
    rows = read_rows(arguments.data, arguments.limit, style)
    schema = json.loads(arguments.schema.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.base, padding_side="left")
    scores: dict[str, Any] = {}
    written = []
    for name in [arguments.only] if arguments.only else ["base", "adapter"]:
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.bfloat16).eval()
        if name == "adapter":
            model = peft.PeftModel.from_pretrained(model, arguments.adapter, autocast_adapter_dtype=False).eval()
        answers = decode(model, tokenizer, rows, arguments.batch, arguments.max_new_tokens, name)
        command = shlex.join(["python", "demo/evaluate_adapter.py", *sys.argv[1:]])
        scores[name] = {"command": command, **score(rows, answers, schema, style)}
        written += [
            {"model": name, "id": row["id"], "answer": answer, "expected": row["expected"]}
            for row, answer in zip(rows, answers, strict=True)
        ]
        exact, critical = scores[name]["exact_match"], scores[name]["critical"]["exact_match"]
        print(f"{name}: exact match {exact:.1%}, critical rows {critical:.1%}, n={len(rows)}")
    if arguments.only and out.exists():
        scores = json.loads(out.read_text(encoding="utf-8"))["models"] | scores
    report = {
        "style": style,
        "decoding": {"dtype": "bfloat16", "greedy": True, "max_new_tokens": arguments.max_new_tokens},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "models": scores,
    }
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.answers:
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written)
        arguments.answers.write_text(lines, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
