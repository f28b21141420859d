"""Make the demo task's data: support messages in five languages and the one JSON line each should become.

Deterministic (one seed, no network). The rules a reader can check in any row:

* priority is urgent when the message names a lawyer or court, a chargeback, a hazard (fire, smoke, shock),
  fraud, or an amount of 1,000 or more; else high for a deadline or a repeated complaint; else low when the
  customer says there is no hurry; else normal.
* order is the number the request is about: never the number of another, settled order.
* amount is a plain JSON number whatever the message's notation (129,95 EUR gives 129.95).

Eval rows whose priority is urgent carry "critical": true. No two rows anywhere share a normalised message
text, an order number, a phone or customer number, or an amount.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
LANGUAGES = ("en", "de", "fr", "es", "it")
CATEGORIES = ("billing", "shipping", "return", "technical", "account", "cancellation")
PRIORITIES = ("low", "normal", "high", "urgent")
CURRENCIES = {"EUR": "€", "USD": "$", "GBP": "£"}
SYSTEM = (
    "Turn the support message into one line of JSON with the keys category (billing, shipping, return, "
    "technical, account, cancellation), priority (low, normal, high, urgent), product, order, amount, "
    "currency (EUR, USD, GBP), language (en, de, fr, es, it). Unknown is null."
)
# Which urgent cue can follow which kind of request; a large amount ("large") fits where money is at stake.
URGENT = {
    "billing": ("legal", "chargeback", "fraud", "large"),
    "shipping": ("legal", "chargeback", "large"),
    "return": ("legal", "chargeback", "hazard", "large"),
    "technical": ("legal", "hazard"),
    "account": ("legal", "fraud"),
    "cancellation": ("legal", "chargeback", "large"),
}
LONG_CHARACTERS = {"en": 6_900, "de": 4_600, "fr": 5_000, "es": 4_800, "it": 4_700}  # past 2,048 tokens


@dataclass(frozen=True)
class Size:
    """How many rows a file holds: short ones (of which urgent), and long threads."""

    short: int
    urgent: int
    long: int


SIZES = {"train": Size(1490, 200, 10), "calibration": Size(62, 8, 2), "eval": Size(390, 40, 10)}


@dataclass
class Facts:
    """Draws the surface facts of all rows; a fact once drawn is never drawn again, in any file."""

    rng: random.Random
    seen: set[str] = field(default_factory=set)

    def fresh(self, draw: Any) -> Any:
        """The first value of `draw()` that no row has used."""
        while (value := draw()) is None or str(value) in self.seen:
            pass
        self.seen.add(str(value))
        return value

    def order(self) -> str:
        """An order number such as AB-48213."""
        letters = "ABCDEFGHJKLMNPRSTUVWXYZ"
        return str(self.fresh(lambda: "".join(self.rng.choices(letters, k=2)) + f"-{self.rng.randint(10_000, 99_999)}"))

    def number(self) -> str:
        """A number that is no order number: a telephone, customer or ticket number."""
        return str(self.fresh(lambda: f"0{self.rng.randint(30, 99)} {self.rng.randint(100_000, 999_999)}"))

    def amount(self, large: bool) -> float:
        """An amount of money, below 1,000 unless `large`; never one whose JSON form would drop a zero."""
        span = (1_000, 4_999) if large else (5, 999)
        return float(
            self.fresh(lambda: self.rng.randint(*span) + self.rng.choice((9, 19, 25, 45, 49, 75, 95, 99)) / 100)
        )


def money(rng: random.Random, amount: float, currency: str, language: str) -> str:
    """The amount as a customer writes it in that language."""
    text = f"{amount:.2f}"
    if language == "en":
        return rng.choice((f"{CURRENCIES[currency]}{text}", f"{text} {currency}"))
    return f"{text.replace('.', ',')} {rng.choice((CURRENCIES[currency], currency))}"


def accusative(noun: str) -> str:
    """German masculine nouns change their article as an object; nothing else here does."""
    return "den" + noun.removeprefix("der") if noun.startswith("der ") else noun


def normalised(text: str) -> str:
    """Message text without case, spacing and digits: what two rows must never share."""
    return " ".join("".join("0" if c.isdigit() else c for c in text.lower()).split())


@dataclass
class Writer:
    """Writes rows from the phrase book."""

    rng: random.Random
    phrases: dict[str, dict[str, Any]]
    facts: Facts

    def thread(self, language: str, characters: int) -> str:
        """Quoted earlier mail, free of any fact the answer needs; at least `characters` long."""
        book, lines = self.phrases[language], [f"> {self.phrases[language]['wrote']}"]
        if not characters:
            return "\n".join([*lines, f"> {self.rng.choice(book['reply'])}"])
        while sum(map(len, lines)) < characters:
            sentences = self.rng.sample([*book["filler"], *book["reply"]], k=4)
            mail = " ".join(sentences).replace("{n}", self.facts.number())
            date = f"{self.rng.randint(1, 28):02d}.{self.rng.randint(1, 12):02d}.2025"
            clock = f"{self.rng.randint(8, 18)}:{self.rng.randint(10, 59)}"
            author = self.rng.choice([book["wrote"], f"{self.rng.choice(book['names'])}:"])
            lines += [f"> {date} {clock} {author}", f"> {mail}", ">"]
        return "\n".join(lines)

    def row(self, language: str, category: str, priority: str, product: int, long: bool) -> dict[str, Any]:
        """One row without its id."""
        rng, book = self.rng, self.phrases[language]
        noun = book["products"][product]
        cue = rng.choice(URGENT[category]) if priority == "urgent" else priority
        order = self.facts.order() if rng.random() < 0.88 else None
        amount = self.facts.amount(cue == "large") if cue == "large" or rng.random() < 0.68 else None
        likely = {"en": (3, 4, 4)}.get(language, (8, 1, 1))
        currency = rng.choices(tuple(CURRENCIES), likely)[0] if amount is not None else None
        slots = {
            "p": noun,
            "P": noun[0].upper() + noun[1:],
            "a": accusative(noun),
            "o": order,
            "w": rng.choice(book["names"]),
        }

        def say(key: str, **more: str | None) -> str:
            return str(rng.choice(book[key])).format(**{**slots, **more})

        details = [say("order")] if order else []
        if amount is not None and currency is not None:
            details.append(say("amount", m=money(rng, amount, currency, language)))
        distractor = ""
        if order and rng.random() < 0.25:
            other = self.facts.order()
            distractor = say("other_order", o=other, O=other)
        elif rng.random() < 0.15:
            distractor = say("other_number", n=self.facts.number())
        details += [distractor] if distractor else []
        details += [say(cue)] if cue not in ("normal", "large") else []
        rng.shuffle(details)
        sentences = [say(category), *details]
        if details and rng.random() < 0.25:
            sentences = [details[0], say(category), *details[1:]]
        quoted = long or rng.random() < 0.08
        body = " ".join(filter(None, [say("greeting"), *sentences, say("closing")]))
        parts = [body, self.thread(language, LONG_CHARACTERS[language] if long else 0)] if quoted else [body]
        if long and rng.random() < 0.5:
            parts.reverse()
        answer = {
            "category": category,
            "priority": priority,
            "product": self.phrases["en"]["products"][product].removeprefix("the "),
            "order": order,
            "amount": amount,
            "currency": currency,
            "language": language,
        }
        tests = {
            "numbers": order is not None and amount is not None,
            "distractor": bool(distractor),
            "nulls": order is None or amount is None,
            "thread": quoted,
            "long": long,
            "short": not long,
        }
        return {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": "\n\n".join(parts)},
            ],
            "expected": json.dumps(answer, separators=(",", ":")),
            "slices": [
                f"lang:{language}",
                f"category:{category}",
                *(name for name, holds in tests.items() if holds),
            ],
        }

    def file(self, name: str, size: Size, taken: set[str]) -> list[dict[str, Any]]:
        """The rows of one file, balanced over languages, categories and products; adds their texts to `taken`."""
        calm = size.short - size.urgent
        kinds = [("urgent", False)] * size.urgent
        kinds += [(priority, False) for priority in self.rng.choices(PRIORITIES[:3], (22, 48, 30), k=calm)]
        kinds += [(priority, True) for priority in self.rng.choices(PRIORITIES[:3], k=size.long)]
        decks = [
            self.deck(count, len(kinds))
            for count in (len(LANGUAGES), len(CATEGORIES), len(self.phrases["en"]["products"]))
        ]
        rows = []
        for (priority, long), language, category, product in zip(kinds, *decks, strict=True):
            for _ in range(100):
                row = self.row(LANGUAGES[language], CATEGORIES[category], priority, product, long)
                if (text := normalised(row["messages"][1]["content"])) not in taken:
                    break
            else:
                raise RuntimeError("the phrase book is too small for so many rows")
            taken.add(text)
            rows.append(row)
        self.rng.shuffle(rows)
        for index, row in enumerate(rows, 1):
            critical = name == "eval" and json.loads(row["expected"])["priority"] == "urgent"
            slices = row.pop("slices")
            row |= ({"critical": True} if critical else {}) | {"slices": slices}
            rows[index - 1] = {"id": f"{name}-{index:04d}", **row}
        return rows

    def deck(self, kinds: int, length: int) -> list[int]:
        """`length` draws from range(kinds), each kind as often as the others."""
        cards = [index % kinds for index in range(length)]
        self.rng.shuffle(cards)
        return cards


def schema(products: list[str]) -> dict[str, Any]:
    """The JSON Schema every answer must meet."""
    properties: dict[str, Any] = {
        "category": {"enum": list(CATEGORIES)},
        "priority": {"enum": list(PRIORITIES)},
        "product": {"enum": products},
        "order": {"anyOf": [{"type": "string", "pattern": "^[A-Z]{2}-[0-9]{5}$"}, {"type": "null"}]},
        "amount": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]},
        "currency": {"enum": [*CURRENCIES, None]},
        "language": {"enum": list(LANGUAGES)},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Support message",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def make(seed: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """All three files' rows, and the answers' schema."""
    phrases = yaml.safe_load((HERE / "phrases.yaml").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    writer, taken = Writer(rng, phrases, Facts(rng)), set[str]()
    files = {name: writer.file(name, size, taken) for name, size in SIZES.items()}
    assert len(taken) == sum(map(len, files.values())), "two rows share a message"
    return files, schema([noun.removeprefix("the ") for noun in phrases["en"]["products"]])


def main() -> int:
    """Command line: write the three files and the schema."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20250, help="seed of all draws (default: %(default)s)")
    arguments = parser.parse_args()
    files, answers = make(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    text = json.dumps(answers, indent=2, ensure_ascii=False) + "\n"
    (arguments.out / "schema.json").write_text(text, encoding="utf-8", newline="\n")
    print(f"{arguments.out}: " + ", ".join(f"{len(rows)} {name}" for name, rows in files.items()) + " rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
