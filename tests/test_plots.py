"""Figures: what is drawn lies where its value says, what a reader must see is marked, and nothing odd reaches SVG."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from helpers.records import builds, decide, evidence_of, of, plan_of, quality, speed, whole
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from peftopt import store
from peftopt.cli.shared import app
from peftopt.decision.evidence import Evidence
from peftopt.records import Decision, Interval, Json, Measurement, Plan
from peftopt.report import as_json, html
from peftopt.report.plots import axes, dominance, figures, frontier, lengths, load_curves, positions, ratios
from peftopt.report.plots.picture import Figure, Picture

RATIOS = {"merged": 0.6, "int8": 0.9}
PLAN = plan_of("merged", "int8", require=["latency.p50@chat <= 120 ms", "accuracy >= 0.9x"])
NUMBERS = st.floats(-1e300, 1e300) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0])
INTERVALS = st.builds(Interval, NUMBERS, NUMBERS, NUMBERS, st.integers(0, 500))


def judged(plan: Plan, found: list[Measurement]) -> tuple[Decision, Evidence]:
    return decide(plan, found, {}), evidence_of(plan, found)


@pytest.fixture(scope="module")
def run() -> tuple[Decision, Evidence]:
    """int8 is slower than merged, and answers worse; block 4 is disturbed."""
    found = builds(PLAN) + speed(PLAN, RATIOS)
    found = [disturbed(each) if each.values.get("block") == 4 else each for each in found]
    wrong: Mapping[str, Mapping[str, Json]] = {f"p{n}": {"correct": False, "new_tokens": 40} for n in range(50, 110)}
    tokens: Mapping[str, Json] = {"kl_tokens": [0.001] * 8 + [0.1] * 8}
    answers = quality("adapter") + quality("adapter", launch=2) + quality("merged") + quality("int8", **wrong)
    return judged(PLAN, found + [replace(each, values={**each.values, **tokens}) for each in answers])


def disturbed(turn: Measurement) -> Measurement:
    return replace(turn, values={**turn.values, "machine": {"steal": 0.4}})


def titled(figures_: list[Figure], words: str) -> Figure:
    return next(figure for figure in figures_ if words in figure.title)


def drawn(figure: Figure) -> Element:
    return ElementTree.fromstring(figure.svg)


def groups(figure: Figure, kind: str) -> dict[str, Element]:
    """The groups of a class, by the first word of their hover title."""
    found = [g for g in drawn(figure).iter("g") if kind in str(g.get("class")).split()]
    return {re.split(r"[:,]", str(g.findtext("title")))[0]: g for g in found}


def place(mark: Element | None, across: str) -> float:
    assert mark is not None
    return float(str(mark.get(across)).rstrip("%"))


# ---- each figure -------------------------------------------------------------------------------


def test_a_run_with_everything_has_every_figure_once_with_all_its_words(run: tuple[Decision, Evidence]) -> None:
    found = figures(*run)
    assert len({figure.title for figure in found}) == len(found) == 6
    for figure in found:
        picture = drawn(figure)
        assert picture.get("role") == "img" and picture.findtext("title") == figure.title
        assert figure.caption and "RUN" in figure.command
        header, body = figure.table
        assert body and all(len(row) == len(header) for row in body)


def test_a_faster_and_better_variant_lies_left_and_above_and_marks_the_other_as_dominated(
    run: tuple[Decision, Evidence],
) -> None:
    figure = frontier.figure(*run)
    assert figure is not None
    points = groups(figure, "point")
    assert set(points) == {"adapter", "merged", "int8"}
    marks = {name: group.find("svg") for name, group in points.items()}
    assert place(marks["merged"], "x") < place(marks["int8"], "x") < place(marks["adapter"], "x")
    assert place(marks["merged"], "y") == place(marks["adapter"], "y") < place(marks["int8"], "y")
    pale = {name for name, group in points.items() if "dominated" in str(group.get("class"))}
    assert pale == {"int8", "adapter"}
    cells = {row[0]: row[-1] for row in figure.table[1]}
    assert "merged" in cells["int8"] and "merged" not in cells["merged"]


def test_no_line_from_top_to_bottom_passes_through_a_name_or_a_value(run: tuple[Decision, Evidence]) -> None:
    for figure in figures(*run):
        picture = drawn(figure)
        if picture.get("class") != "rows":
            continue
        words = [float(str(text.get("y"))) for text in picture.iter("text")]
        lines = [line for line in picture.iter("line") if line.get("x1") == line.get("x2")]
        spans = [(float(str(line.get("y1"))), float(str(line.get("y2")))) for line in lines]
        assert words and not [(y, span) for y in words for span in spans if span[0] < y < span[1]], figure.title


def test_a_rejected_variant_dominates_nobody(run: tuple[Decision, Evidence]) -> None:
    decision, evidence = run
    turned_down = tuple(
        replace(v, outcome="rejected") if v.name == "merged" else replace(v, outcome="accepted")
        for v in decision.variants
    )
    found = dominance.points(replace(decision, variants=turned_down), evidence)
    assert not any("merged" in point.dominated_by for point in found)
    assert "merged" not in [point.variant.name for point in dominance.frontier(found, -1)]


def test_what_is_required_is_a_line_and_what_lies_far_off_is_said(run: tuple[Decision, Evidence]) -> None:
    decision, evidence = run
    limits = {limit.metric: limit.value for limit in dominance.limits(decision, evidence)}
    baseline = of(decision, "adapter").figures["accuracy"].estimate
    assert limits == {"latency.p50@chat": 120.0, "accuracy": pytest.approx(0.9 * baseline)}
    figure = frontier.figure(decision, evidence)
    assert figure is not None and len(groups(figure, "asked")) == 1
    assert figure.svg.count("limit-text") == 2
    far = plan_of("merged", "int8", require=["latency.p50@chat <= 900 s"])
    figure = frontier.figure(*judged(far, whole(far, RATIOS)))
    assert figure is not None and "limit-text" not in figure.svg and "900 s" in figure.caption


def test_ratios_lie_in_the_order_of_their_values_with_their_limit_between(run: tuple[Decision, Evidence]) -> None:
    decision, evidence = run
    found = {row.variant.name: row for row in ratios.rows(decision, evidence, "chat")}
    scale = ratios.scale(list(found.values()))
    merged, int8 = (scale.ends(found[name].ratio) for name in ("merged", "int8"))
    assert merged[0] < merged[1] < int8[0] < int8[1] < scale.at(1.0)
    limit = found["merged"].limit
    assert limit is not None and merged[1] < scale.at(limit) < scale.at(1.0)
    assert len(found["merged"].blocks) == 40
    assert ratios.figure(decision, evidence, "nowhere") is None


def test_a_disturbed_block_is_marked_in_every_row_and_said(run: tuple[Decision, Evidence]) -> None:
    figure = titled(figures(*run), "Blocks over time")
    marks = groups(figure, "disturbed")
    assert set(marks) == {"block 4"}
    assert "host" in str(marks["block 4"].findtext("title"))
    hollow = [dot for dot in drawn(figure).iter("circle") if "hollow" in str(dot.get("class"))]
    assert len(hollow) == 4, "the baseline, its second copy, and two variants"
    assert {dot.get("cx") for dot in hollow} == {marks["block 4"].find("line").get("x1")}  # type: ignore[union-attr]
    assert "1 of 40 blocks" in figure.caption
    row = next(row for row in figure.table[1] if row[0] == "4")
    assert "host" in row[1]


def test_longer_answers_are_counted_and_lie_right(run: tuple[Decision, Evidence]) -> None:
    decision, evidence = run
    figure = lengths.figure(decision, evidence)
    assert figure is not None
    rows = {row[0]: row for row in figure.table[1]}
    assert rows["int8"][1:5] == ["400", "0", "340", "60"]
    assert rows["merged"][1:5] == ["400", "0", "400", "0"]
    dots = {
        name.split(",")[0]: group.find("circle[@class='estimate']")
        for kind in ("baseline", "accepted", "rejected", "inconclusive")
        for name, group in groups(figure, kind).items()
    }
    assert place(dots["int8"], "cx") > place(dots["merged"], "cx")


def test_divergence_is_a_mean_by_position(run: tuple[Decision, Evidence]) -> None:
    found = positions.curves(*run, positions.READINGS[0])
    assert [curve.name for curve in found] == ["adapter, second run", "merged", "int8"]
    for curve in found:
        assert curve.means[5, 8] == pytest.approx(0.001) and curve.means[9, 16] == pytest.approx(0.1)
    figure = positions.figure(*run)
    assert figure is not None and "KL" in figure.title


def test_runs_of_an_older_peftopt_show_the_shift_of_preference() -> None:
    older = [
        replace(each, values={**each.values, "noise": [0.2] * 8}) if each.probe == "quality" else each
        for each in whole(PLAN, RATIOS)
    ]
    figure = positions.figure(*judged(PLAN, older))
    assert figure is not None and "preference" in figure.title


@given(st.integers(1, 5000))
def test_every_position_is_in_one_span(longest: int) -> None:
    spans = positions.spans(longest)
    assert [n for first, last in spans for n in range(first, last + 1)][:longest] == list(range(1, longest + 1))


# ---- under load --------------------------------------------------------------------------------


def load(variant: str, rate: float, ttft_ms: float, failed: int = 0) -> Measurement:
    """40 requests at a rate, each with the same times."""
    requests = []
    for n in range(40):
        due = n / rate
        first, done = due + ttft_ms / 1e3, due + ttft_ms / 1e3 + 1.0
        times = {"ttft_ms": ttft_ms, "tpot_ms": 20.0, "request_duration_ms": ttft_ms + 1e3}
        sent = {"id": f"p{n}", "scheduled": due, "sent": due, "first": first, "last": done, "done": done}
        requests.append({**sent, **times, "new_tokens": 51, "warmup": False, "error": "refused" if n < failed else ""})
    values = {"source": "peftopt", "requests": requests, "slo": ["ttft <= 300 ms"], "highest_rate": 4.0}
    return Measurement("load", variant, values=values)


def test_a_load_curve_follows_the_rate_and_counts_only_what_was_served_well() -> None:
    loads = [load("merged", 8.0, 900.0), load("merged", 2.0, 100.0), load("merged", 4.0, 200.0, failed=10)]
    decision, evidence = judged(PLAN, whole(PLAN, RATIOS) + loads)
    (curve,) = load_curves.curves(decision, evidence)
    assert [step.rate for step in curve.steps] == pytest.approx([2.0, 4.0, 8.0])
    assert [step.ttft.estimate for step in curve.steps if step.ttft] == pytest.approx([100.0, 200.0, 900.0])
    easy, lossy, full = (step.goodput or 0.0 for step in curve.steps)
    assert full == 0 and 1.8 < easy < 2 and lossy == pytest.approx(30 / (39 / 4 + 1.2))
    figure = load_curves.figure(decision, evidence)
    assert figure is not None and "merged 4/s" in figure.caption and len(figure.table[1]) == 3


def test_one_rate_is_no_curve_and_loads_apart_change_no_verdict() -> None:
    found = whole(PLAN, RATIOS)
    decision, evidence = judged(PLAN, [*found, load("merged", 2.0, 100.0)])
    assert load_curves.figure(decision, evidence) is None
    assert decision == judged(PLAN, found)[0]


# ---- what is not there, and what is odd --------------------------------------------------------


def test_what_was_not_measured_is_left_out() -> None:
    assert figures(*judged(PLAN, builds(PLAN))) == []
    timed = figures(*judged(PLAN, builds(PLAN) + speed(PLAN, RATIOS)))
    assert timed and not any("ccuracy" in f.title or "ength" in f.title or "position" in f.title for f in timed)
    assert "<svg" not in html.render(*judged(PLAN, builds(PLAN)))


def test_names_are_escaped(run: tuple[Decision, Evidence]) -> None:
    decision, evidence = run
    hostile = "<script>alert(1)</script>&\x00\u202e"
    variants = tuple(replace(v, name=v.name if v.name == "adapter" else hostile + v.name) for v in decision.variants)
    found = figures(replace(decision, variants=variants), evidence)
    assert found
    for figure in found:
        drawn(figure)
        assert "<script" not in figure.svg and "\x00" not in figure.svg and "\u202e" not in figure.svg
    assert "alert(1)</script" not in html.render(replace(decision, variants=variants), evidence)


@given(st.lists(st.tuples(INTERVALS, INTERVALS, INTERVALS), min_size=3, max_size=3))
def test_no_number_breaks_a_figure_or_reaches_its_svg_as_none(
    values: list[tuple[Interval, Interval, Interval]],
) -> None:
    decision, evidence = ODD
    names = ("latency.p50@chat", "accuracy", "latency.ratio@chat")
    variants = tuple(
        replace(v, figures={**v.figures, **dict(zip(names, odd, strict=True)), "length": odd[0]})
        for v, odd in zip(decision.variants, values, strict=True)
    )
    for figure in figures(replace(decision, variants=variants), evidence):
        places = [value for element in drawn(figure).iter() for value in element.attrib.values()]
        assert not any(re.search(r"\b(nan|inf|-inf)\b", place) for place in places)


ODD = judged(PLAN, whole(PLAN, RATIOS, blocks=8))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_picture_refuses_what_is_no_place(number: float) -> None:
    with pytest.raises(ValueError, match="no place"):
        Picture("odd", 10, "rows").line((0.0, number), (1.0, 1.0), "grid")


# ---- scales and labels -------------------------------------------------------------------------


@given(st.lists(NUMBERS, max_size=8), st.booleans(), NUMBERS.filter(lambda x: not math.isnan(x)))
def test_a_place_is_on_the_axis_and_in_the_order_of_values(values: list[float], log: bool, other: float) -> None:
    scale = axes.Scale.around(values, log)
    shares = [scale.at(value) for value in sorted({*(v for v in values if not math.isnan(v)), other})]
    assert shares == sorted(shares) and all(0 <= share <= 1 for share in shares)
    ticks = scale.ticks()
    assert ticks == sorted(ticks)
    assert all(later - one >= 0.12 for (one, _), (later, _) in pairwise(ticks))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(30, 330)), min_size=1, max_size=6))
def test_a_label_that_finds_room_covers_no_other(marks: list[tuple[float, float]]) -> None:
    layout = axes.LAYOUTS[1]
    labels = axes.place(marks, [f"v{n}" for n in range(len(marks))], layout, 360)
    spans = []
    for (x, y), label in zip(marks, labels, strict=True):
        near, far = (x * layout.width + label.side * away for away in (axes.AWAY, axes.AWAY + 2 * axes.LETTER))
        spans.append((min(near, far), y + label.dy, max(near, far)))
    for n, (left, y, right) in enumerate(spans):
        for other_left, other_y, other_right in spans[:n]:
            assert abs(y - other_y) >= axes.LINE - 1e-6 or right <= other_left or other_right <= left


# ---- commands ----------------------------------------------------------------------------------


def test_the_command_of_every_figure_writes_its_data(run: tuple[Decision, Evidence], tmp_path: Path) -> None:
    decision, evidence = run
    folder = tmp_path / "run"
    folder.mkdir()
    store.write(folder / "decision.json", as_json.render(decision))
    store.write(folder / "plan.json", json.dumps(asdict(evidence.plan)))
    store.append(folder / "measurements.jsonl", *whole(PLAN, RATIOS))
    commands = {figure.command for figure in figures(decision, evidence)}
    for number, command in enumerate(commands):
        program, *words = command.split()
        assert program == "peftopt"
        file = tmp_path / f"{number}.csv"
        words = [str(folder) if word == "RUN" else str(file) if word.endswith(".csv") else word for word in words]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert len(file.read_text().splitlines()) > 1
