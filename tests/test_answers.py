"""One answer against what it should be."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import textwrap

import pytest

from peftopt.probes._answers import degenerate, judge, language, loops, numbers, refuses
from peftopt.records import Invariants

SCHEMA = {
    "type": "object",
    "properties": {"category": {"enum": ["billing", "return"]}, "order": {"type": ["string", "null"]}},
    "required": ["category", "order"],
    "additionalProperties": False,
}
RIGHT = '{"category":"billing","order":"AB-12345"}'


def test_the_expected_object_is_right_however_it_is_spaced() -> None:
    judged = judge('{ "category": "billing", "order": "AB-12345" }', RIGHT, SCHEMA)
    assert (judged.score, judged.correct, judged.valid, judged.flags) == (1.0, True, True, ())


def test_one_wrong_field_of_two_scores_half_and_is_not_right() -> None:
    judged = judge('{"category":"return","order":"AB-12345"}', RIGHT, SCHEMA)
    assert (judged.score, judged.correct, judged.valid) == (0.5, False, True)


def test_extra_fields_cost_score() -> None:
    assert judge('{"category":"billing","order":"AB-12345","x":1}', RIGHT).score == pytest.approx(2 / 3)


@pytest.mark.parametrize("output", ["", '{"category":"billing"', '{"category":"refund","order":null}', "[]", "billing"])
def test_what_does_not_keep_the_schema_is_flagged(output: str) -> None:
    judged = judge(output, RIGHT, SCHEMA)
    assert not judged.valid and not judged.correct
    assert "invalid output" in judged.flags


def test_plain_text_is_compared_as_text() -> None:
    assert judge(" Paris ", "Paris").correct
    assert not judge("Lyon", "Paris").correct


@pytest.mark.parametrize(
    ("text", "tokens", "stopped", "flag"),
    [
        ("  ", [], True, "empty"),
        ("a\ufffdb", [1, 2], True, "invalid utf-8"),
        ("ab", [1, 99], True, "special token"),
        ("ab" * 40, [1, 2] * 40, False, "loop"),
    ],
)
def test_each_tier_1_error_is_seen(text: str, tokens: list[int], stopped: bool, flag: str) -> None:
    assert flag in judge(text, "x", None, tokens, stopped, frozenset({99})).flags


def test_an_answer_that_ended_by_itself_is_no_loop() -> None:
    assert "loop" not in judge("ab" * 40, "x", None, [1, 2] * 40, True).flags


def test_long_varied_text_does_not_loop() -> None:
    tokens = [(n * n) % 1009 for n in range(200)]
    assert not loops(tokens) and not degenerate(tokens, " ".join(map(str, tokens)))


def test_a_short_repeat_at_the_end_is_not_enough_to_be_a_loop() -> None:
    assert not loops([*range(100), 7, 7, 7, 7])


# ---- detectors on ordinary text --------------------------------------------------------------------


def pieces(text: str) -> list[int]:
    """Tokens much as a tokenizer cuts them: words, single digits, runs of spaces, marks one by one."""
    known: dict[str, int] = {}
    return [known.setdefault(part, len(known)) for part in re.findall(r" ?[^\W\d_]+|\d|\s+|.", text)]


ROWS = [(f"part-{n}", n * n % 97, "yes" if n % 3 else "no") for n in range(400)]
ORDINARY = {
    "prose": " ".join((json.__doc__ or "", textwrap.__doc__ or "", argparse.__doc__ or "", dataclasses.__doc__ or "")),
    "code": inspect.getsource(json.decoder),
    "short code": "for i in range(10):\n    print(i)\n    total += i\n" * 2,
    "a Markdown table": "| part | count | ok |\n|---|---|---|\n"
    + "".join(f"| {a} | {b} | {c} |\n" for a, b, c in ROWS),
    "an HTML table": "<table>" + "".join(f"<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in ROWS),
    "CSV": "".join(f"{a},{b},{c}\n" for a, b, c in ROWS),
    "JSON": json.dumps([{"part": a, "count": b, "ok": c} for a, b, c in ROWS], indent=2),
    "a numbered list": "".join(f"{n}. Check that part {n} is in place.\n" for n in range(1, 200)),
    "numbers": ", ".join(map(str, range(1, 120))),
    "a rule of dashes": "Summary\n" + "-" * 40 + "\nAll parts are in place, and none is missing.",
    "a refrain": "\n".join(
        f"{n} green bottles hanging on the wall,\n" * 2 + "and if one should fall" for n in range(9, 2, -1)
    ),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_detectors_do_not_fire_on_ordinary_text_wherever_it_is_cut_off(kind: str) -> None:
    text = ORDINARY[kind]
    for end in range(0, len(text) + 200, 200):
        tokens = pieces(text[:end])
        flags = judge(text[:end], "something else", None, tokens, stopped=False).flags
        assert {"loop", "degenerate"} & set(flags) == set(), (kind, end)


@pytest.mark.parametrize("text", ["and so on " * 40, "0" * 300, "The answer is 42. " * 30, "]}" * 90, "- \n" * 100])
def test_what_says_the_same_over_and_over_is_seen(text: str) -> None:
    tokens = pieces(text)
    assert "degenerate" in judge(text, "x", None, tokens, stopped=True).flags
    assert "degenerate" not in judge(text, text, None, tokens, stopped=True).flags, "a right answer is none"
    assert loops(tokens) == ("loop" in judge(text, "x", None, tokens, stopped=False).flags)


# ---- invariants ------------------------------------------------------------------------------------


def flags(text: str, expected: str = "", prompt: str = "", slices: tuple[str, ...] = (), **asked: object) -> set[str]:
    invariants = Invariants(**asked)  # type: ignore[arg-type]
    return set(judge(text, expected, invariants=invariants, prompt=prompt, slices=slices).flags)


def test_a_regex_must_match_the_whole_answer_and_a_label_be_one_of_them() -> None:
    assert flags(" AB-12 \n", regex=r"[A-Z]{2}-\d+") == set()
    assert flags("order AB-12", regex=r"[A-Z]{2}-\d+") == {"invalid output"}
    assert flags("spam\n", labels=("spam", "ham")) == set()
    assert flags("It is spam.", labels=("spam", "ham")) == {"not a label"}
    assert not judge("It is spam.", "It is spam.", invariants=Invariants(labels=("spam",))).valid


def test_numbers_are_kept_however_they_are_written() -> None:
    assert numbers("1,234.50 and 1.234,5 and 1234.5") == {"1234.5"}
    assert numbers("0.125, 10 007, v2") == {"0.125", "10", "7", "2"}
    assert numbers("1,234,567") == numbers("1.234.567") == {"1234567"}
    assert flags("You pay 584.19 EUR for 2.", "2 items, 584,19", numbers="kept") == set()
    assert flags("You pay 58.19 EUR for 2.", "2 items, 584,19", numbers="kept") == {"number lost"}
    assert flags("no number", "none here", numbers="kept") == set()


TEXTS = {
    "en": "Thank you for your message. We have sent the parcel today and it should arrive on Monday.",
    "de": "Vielen Dank für Ihre Nachricht. Wir haben das Paket heute verschickt, es kommt am Montag an.",
    "fr": "Merci pour votre message. Nous avons envoyé le colis aujourd'hui, il devrait arriver lundi.",
    "ja": "お問い合わせありがとうございます。荷物は本日発送いたしましたので、月曜日に届く予定です。",
}


def test_a_language_is_told_where_there_is_enough_to_tell_it_by() -> None:
    assert {code: language(text) for code, text in TEXTS.items()} == {code: code for code in TEXTS}
    for unclear in ("ok", "Müller GmbH", '{"order": 17}', "| 1 | 2 |\n" * 30, "1234 " * 50):
        assert language(unclear) == ""


def test_an_answer_keeps_the_language_of_the_expected_one_or_of_the_prompt() -> None:
    assert flags(TEXTS["en"], expected=TEXTS["de"], language="kept") == {"other language"}
    assert flags(TEXTS["de"], expected=TEXTS["de"], prompt=TEXTS["en"], language="kept") == set()
    assert flags(TEXTS["en"], prompt=TEXTS["fr"], language="kept") == {"other language"}
    assert flags("ok", prompt=TEXTS["fr"], language="kept") == set(), "too short to tell"
    assert flags(TEXTS["fr"], language="fr") == set() and flags(TEXTS["fr"], language="en") == {"other language"}


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request.",
        "Unfortunately, I am not able to provide that.",
        "As an AI language model, I cannot give legal advice.",
        "Sorry, that is not something I can do.",
        "We won't do that.",
    ],
)
def test_a_refusal_flips_in_either_direction(text: str) -> None:
    assert refuses(text)
    assert flags(text, refusal="kept") == {"refusal"}
    assert flags(text, refusal="kept", slices=("refusal",)) == set()
    assert flags("Here is how.", refusal="kept", slices=("refusal",)) == {"no refusal"}


@pytest.mark.parametrize(
    "text",
    [
        "If the parcel is lost, I cannot say when, we pay.",
        "The customer is sorry, but wants the money back.",
        "You can't return opened software. Everything else is fine.",
        "Unfortunately the parcel was lost; a new one is on its way.",
        "As an AI researcher she cannot be replaced easily, which matters.",
        *ORDINARY.values(),
    ],
)
def test_ordinary_answers_are_no_refusals(text: str) -> None:
    assert not refuses(text)


def test_a_users_own_pattern_tells_a_refusal() -> None:
    assert flags("Dabei kann ich nicht helfen.", refusal="kann ich nicht") == {"refusal"}
    assert flags("I cannot.", refusal="kann ich nicht") == set()
