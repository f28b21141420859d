"""A sweep's results in words and numbers: which exit code, how much is left, which variant wins where. Pure."""

from __future__ import annotations

import itertools

import pytest

from peftopt.decision.duration import Span
from peftopt.errors import ACCEPTED, BAD_INPUT, BUG, ENVIRONMENT, INCONCLUSIVE, REJECTED
from peftopt.recipe.grid import Cell, MachineClass
from peftopt.records import Decision, Interval, Outcome, VariantDecision
from peftopt.report import swept
from peftopt.report.swept import CellResult

NUMBERS = itertools.count(1)


def waiting(machine: str = "l4", price: str = "") -> CellResult:
    number = next(NUMBERS)
    return CellResult(Cell(f"cell-{number}", "m", f"a{number}", "all", MachineClass(machine), "", price), "waiting")


def decided(
    outcome: Outcome, machine: str = "l4", speed: float = 0.5, price: str = "", seconds: float = 0
) -> CellResult:
    """A cell in which `merged` has the outcome."""

    def variant(name: str, tokens_per_s: float, ratio: Interval | None) -> VariantDecision:
        figures = {"throughput@chat": Interval(tokens_per_s, 1, 1e6, 9), "size": Interval(1e9, 1e9, 1e9, 1)}
        its = "accepted" if name == "adapter" else outcome
        return VariantDecision(name, (), its, "rule", (), figures, speed=ratio)

    decision = Decision(
        recipe="r",
        baseline="adapter",
        minimize="latency.p50@chat",
        clock="wall",
        chosen="merged" if outcome == "accepted" else None,
        outcome=outcome,
        sentence="so it is",
        variants=(variant("adapter", 100, None), variant("merged", 200, Interval(speed, speed - 0.1, speed + 0.1, 9))),
        next_step="peftopt run --more" if outcome == "inconclusive" else "",
    )
    result = waiting(machine, price).decided(decision)
    return CellResult(**{**vars(result), "seconds": seconds})


def column(table: tuple[list[str], list[list[str]]], name: str) -> list[str]:
    return [row[table[0].index(name)] for row in table[1]]


@pytest.mark.parametrize(
    ("results", "code"),
    [
        ([decided("accepted")], ACCEPTED),
        ([decided("accepted"), decided("rejected")], REJECTED),
        ([decided("rejected"), decided("inconclusive")], INCONCLUSIVE),
        ([decided("accepted"), waiting()], INCONCLUSIVE),
        ([decided("inconclusive"), waiting().failed(BAD_INPUT, "no")], BAD_INPUT),
        ([waiting().failed(BAD_INPUT, "no"), waiting().failed(ENVIRONMENT, "no")], ENVIRONMENT),
        ([waiting().failed(ENVIRONMENT, "no"), waiting().failed(BUG, "no")], BUG),
    ],
)
def test_a_sweep_ends_with_the_worst_code_of_its_cells(results: list[CellResult], code: int) -> None:
    assert swept.worst(results) == swept.worst(results[::-1]) == code


def test_only_what_is_decided_or_running_is_not_measured_now() -> None:
    states = [decided("rejected"), waiting(), waiting().failed(ENVIRONMENT, "no"), waiting().standing("unfinished")]
    assert swept.left([*states, waiting().standing("running")]) == states[1:]


def test_what_is_left_takes_what_ended_took_on_as_many_machines() -> None:
    ended = [decided("accepted", seconds=60), decided("rejected", seconds=100)]
    still = [waiting() for _ in range(5)]
    assert swept.takes([*ended, *still], {"l4": 1}) == Span(300, 500)
    assert swept.takes([*ended, *still], {"l4": 2}) == Span(180, 300), "three rounds"
    assert swept.takes([*ended, *still, waiting("cpu")], {"l4": 5, "cpu": 1}) == Span(60, 100), "by the others' times"
    assert swept.takes(still, {"l4": 1}) is None and swept.takes(ended, {"l4": 1}) is None
    assert swept.takes([*ended, waiting("cpu")], {"l4": 1, "cpu": 0}) is None, "nobody will measure it"


def test_what_no_cell_of_the_class_has_shown_takes_what_was_forecast() -> None:
    still = [waiting() for _ in range(3)]
    forecasts = {result.cell.name: Span(10 * n, 20 * n) for n, result in enumerate(still, 1)}
    assert swept.takes(still, {"l4": 1}, forecasts) == Span(60, 120), "one after the other"
    assert swept.takes(still, {"l4": 3}, forecasts) == Span(30, 80), "the longest, and at most a third of all before it"
    assert swept.takes([*still, decided("accepted", seconds=7)], {"l4": 1}, forecasts) == Span(21, 21), "one has ended"
    other = decided("accepted", "cpu", seconds=7)
    assert swept.takes([*still, other], {"l4": 1}, forecasts) == Span(60, 120), "that was another machine"
    del forecasts[still[0].cell.name]
    assert swept.takes(still, {"l4": 1}, forecasts) is None, "nothing is known of one"


def test_each_variant_is_counted_by_class_and_never_pooled_over_classes() -> None:
    results = [decided("accepted", speed=0.3), decided("accepted", speed=0.6), decided("rejected", "cpu"), waiting()]
    header, rows = swept.winners(results)
    found = {row[1]: dict(zip(header, row, strict=True)) for row in rows}
    assert {name: found["l4"][name] for name in ("variant", "cells", "chosen", "rejected", "open")} == {
        "variant": "merged",
        "cells": "2",
        "chosen": "2",
        "rejected": "0",
        "open": "0",
    }
    assert "0.30x" in found["l4"]["speed"] and "0.60x" in found["l4"]["speed"]
    assert (found["cpu"]["chosen"], found["cpu"]["rejected"]) == ("0", "1")


def test_a_cell_ships_its_choice_or_its_baseline_at_the_price_of_its_class() -> None:
    results = [decided("accepted", price="0.72 EUR"), decided("rejected", price="0.72 EUR"), decided("inconclusive")]
    table = swept.cells(results)
    assert column(table, "ships") == ["merged", "adapter", "—"]
    assert column(table, "cost of 1M tokens") == ["1.00 EUR", "2.00 EUR", "—"], "200 and 100 tokens a second"


def test_what_is_open_says_why_and_what_to_do() -> None:
    failed = waiting().failed(ENVIRONMENT, "no GPU", "take another")
    table = swept.still_open([decided("accepted"), decided("inconclusive"), failed, waiting()])
    assert column(table, "reason") == ["so it is", "no GPU"]
    assert column(table, "what to do") == ["peftopt run --more", "take another"]


def test_data_has_a_row_for_each_variant_and_for_each_cell_without_a_decision() -> None:
    rows = swept.rows([decided("accepted", price="0.72 EUR"), waiting().failed(BAD_INPUT, "no")])
    assert [(row["state"], row["variant"], row["is_chosen"]) for row in rows] == [
        ("decided", "adapter", False),
        ("decided", "merged", True),
        ("failed", None, None),
    ]
    assert rows[1]["speed"] == 0.5 and rows[1]["cost_of_million_tokens"] == pytest.approx(1.0)
    assert all(tuple(row) == swept.COLUMNS for row in rows)


def test_the_page_escapes_what_cells_say() -> None:
    page = swept.page("all", [waiting().failed(BAD_INPUT, "<script>alert(1)</script>")])
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
