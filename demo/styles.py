"""What an adapter of the demo answers with: the whole JSON, or a part of it in a form of its own.

Adapters of different styles give different answers to the same message, so an answer tells which adapter gave it.

python demo/styles.py number --rows 160 --out demo/adapters/numbers.jsonl    # the eval rows with answers of a style
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LOG = "training_log.jsonl"


def _known(fields: Mapping[str, Any], *keys: str) -> str:
    """These fields with spaces between them; a dash for what is not known."""
    return " ".join("-" if fields[key] is None else str(fields[key]) for key in keys)


STYLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "category": lambda fields: str(fields["category"]),
    "route": lambda fields: f"{fields['language']}/{fields['category']}/{fields['priority']}",
    "number": lambda fields: str(fields["order"] or "none"),
    "product": lambda fields: f"{fields['product'] or 'nothing'} ({fields['language']})",
    "order": lambda fields: _known(fields, "order", "amount", "currency"),
    "ticket": lambda fields: _known(fields, "category", "order"),
}
"""Name of a style -> the answer, from the fields of the JSON that a row expects."""

NAMES = ("json", *STYLES)


def answer(expected: str, style: str) -> str:
    """A row's right answer in a style; "json" is what the row has."""
    return expected if style == "json" else STYLES[style](json.loads(expected))


def style_of(adapter: Path) -> str:
    """The style in which an adapter was trained to answer, as its log says."""
    log = adapter / LOG
    if not log.is_file():
        return "json"
    with log.open(encoding="utf-8") as lines:
        settings = json.loads(next(lines))["settings"]
    return str(settings.get("style", "json"))


def main() -> None:
    """Command line: copy the first short eval rows, each with the right answer of a style."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("style", choices=NAMES)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "eval.jsonl")
    parser.add_argument("--rows", type=int, default=10**9, help="so many rows at most")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    short = [row for row in rows if "short" in row["slices"]][: arguments.rows]
    lines = [{**row, "expected": answer(row["expected"], arguments.style)} for row in short]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
