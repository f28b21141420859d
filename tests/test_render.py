"""The reports: what a reader sees, what a machine reads back, and what hostile text cannot do."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
import random
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.records import EAGER, evidence_of, plan_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftopt.decision.evidence import Evidence
from peftopt.errors import BadInput
from peftopt.loadtest import summary
from peftopt.loadtest.summary import LoadSummary
from peftopt.measurements import Account, Gauge
from peftopt.records import Decision, Interval, Json, Measurement, Variant, VariantDecision, Verdict
from peftopt.report import answers, as_json, html, junit, load, markdown, measured, reports, table, words

DATA = Path(__file__).parent / "data"
HOSTILE = "<script>alert(1)</script> | `rm -rf` | [x](http://evil.example/a) ![y](//evil.example) @team\n\x00\u202e**"


def interval(estimate: float, low: float | None = None, high: float | None = None, n: int = 24) -> Interval:
    return Interval(estimate, estimate if low is None else low, estimate if high is None else high, n)


def figures(ratio: Interval, p50: float, scale: float = 1.0, **more: Interval) -> dict[str, Interval]:
    return {
        "latency.ratio@chat": ratio,
        "latency.ratio@bulk": interval(ratio.estimate, ratio.low * 0.98, ratio.high * 1.02),
        "cpu.ratio@chat": ratio,
        "latency.p50@chat": interval(p50, p50 * 0.98, p50 * 1.03, 72),
        "latency.p95@chat": interval(p50 * 1.3, p50 * 1.2, p50 * 1.6, 72),
        "latency.p95@bulk": interval(p50 * 4, p50 * 3.6, math.inf, 24),
        "throughput@chat": interval(64e3 / p50, 63e3 / p50, 65e3 / p50),
        "throughput@bulk": interval(300e3 / p50, 290e3 / p50, 310e3 / p50),
        "ttft.p50@chat": interval(p50 * 0.2, p50 * 0.19, p50 * 0.22, 72),
        "tpot.p50@chat": interval(p50 / 80, p50 / 81, p50 / 78, 72),
        "greedy_match": interval(0.981, 0.96, 0.993, 320),
        "kl": interval(0.0012, 0.0009, 0.0016, 320),
        "flips_worse": interval(3.0),
        "flips_better": interval(1.0),
        "memory": interval(1.13e9 * scale, 1.12e9 * scale, 1.15e9 * scale, 5),
        "size": interval(5.4e8 * scale),
        "load_time": interval(1.42, 1.3, 1.9, 5),
        "accuracy": interval(0.934, 0.901, 0.959, 320),
        "validity": interval(1.0, 0.988, 1.0, 320),
        "perplexity": interval(1.004, 1.001, 1.008, 320),
        **more,
    }


def a_decision() -> Decision:
    """Every outcome once: a merge accepted, int8 slower and rejected, gptq4 undecided, awq4 failed."""
    clean = interval(0.0, 0.0, 0.00932, 320)
    adapter = VariantDecision("adapter", (), "not judged", "", (), figures(interval(1.002, 0.991, 1.012), 412.0))
    merged = VariantDecision(
        "merged",
        ("merge",),
        "accepted",
        "merge.gain",
        (
            Verdict("artifact.intact", "accepted", "all weights are finite and the files match their hash"),
            Verdict(
                "merge.gain",
                "accepted",
                "latency.p50@chat is 0.81x adapter's (0.78 to 0.84, 24 blocks): 15% faster or better",
                "adapter",
                interval(0.81, 0.78, 0.84),
                "x",
                0.85,
                "wall",
            ),
            Verdict(
                "merge.parity",
                "accepted",
                "0.02% of tokens differ from adapter's beyond its own null (320 prompts)",
                "adapter",
                interval(0.0002, 0.0, 0.0011, 320),
                "share",
                0.005,
            ),
            Verdict(
                "require: latency.p95@chat <= 600 ms",
                "accepted",
                "latency.p95@chat is 434 ms (n=72)",
                "",
                interval(434.0, 401.0, 534.0, 72),
                "ms",
                600.0,
                "wall",
            ),
        ),
        figures(interval(0.81, 0.78, 0.84), 334.0, critical_errors=clean),
    )
    int8 = VariantDecision(
        "int8",
        ("merge", "int8"),
        "rejected",
        "int8.critical_errors",
        (
            Verdict(
                "int8.critical_errors",
                "rejected",
                "3 critical errors in 320 prompts that the adapter does not make, first p-17: loop",
                "adapter",
                interval(3 / 320, 0.0, 0.024, 320),
                "share",
                0.01,
            ),
            Verdict(
                "int8.not_slower",
                "rejected",
                "latency.p50@chat is 1.51x merged's (1.48 to 1.55, 10 blocks): not less than 5% slower",
                "merged",
                interval(1.51, 1.48, 1.55, 10),
                "x",
                1.05,
                "wall",
            ),
        ),
        figures(
            interval(1.22, 1.18, 1.26, 10),
            503.0,
            0.36,
            accuracy=interval(0.881, 0.84, 0.914, 320),
            critical_errors=interval(3 / 320, 0.0, 0.024, 320),
        ),
        ("slower than adapter here: 1.22x its latency",),
    )
    gptq4 = VariantDecision(
        "gptq4",
        ("merge", "gptq"),
        "inconclusive",
        "gptq.not_slower",
        (
            Verdict("gptq.critical_errors", "accepted", "0 in 320 prompts", "adapter", clean, "share", 0.01),
            Verdict(
                "gptq.not_slower",
                "inconclusive",
                "latency.p50@chat is 1.04x merged's (0.99 to 1.09, 24 blocks): cannot tell yet",
                "merged",
                interval(1.04, 0.99, 1.09),
                "x",
                1.05,
                "wall",
                56,
            ),
        ),
        {k: v for k, v in figures(interval(0.84, 0.8, 0.9), 347.0, 0.25).items() if k not in ("validity", "load_time")},
    )
    awq4 = VariantDecision(
        "awq4",
        ("merge", "awq"),
        "not judged",
        "artifact.runs",
        (Verdict("artifact.runs", "not judged", "build failed, missing library: No module named 'llmcompressor'"),),
        {},
    )
    return Decision(
        recipe="chat",
        baseline="adapter",
        minimize="latency.p50@chat",
        clock="wall",
        chosen="merged",
        outcome="accepted",
        sentence="Ship merged: latency.p50@chat is 19% lower than the adapter's (0.81x, 0.78 to 0.84, 24 blocks, "
        "wall clock), decided by merge.gain (gptq4 undecided).",
        variants=(adapter, merged, int8, gptq4, awq4),
        warnings=("the machine was busy: median load 3.1 while 1 threads measured",),
        machine={
            "cpu": "AMD EPYC 9B14",
            "cores": 2,
            "memory_gib": 7.8,
            "gpu": [],
            "versions": {"torch": "2.9.1", "peft": "0.18.0"},
        },
    )


def the_measurements() -> list[Measurement]:
    noise = random.Random(7)
    ratios = {"adapter": 1.0, "adapter~aa": 1.0, "merged": 0.81, "int8": 1.22, "gptq4": 0.84}
    blocks = {"adapter": 24, "adapter~aa": 8, "merged": 24, "int8": 10, "gptq4": 24}
    found = []
    for variant, ratio in ratios.items():
        found.append(
            Measurement("launch", variant, launch=1, values={"model_loading_time": 1.0, "threads": 1, "device": "cpu"})
        )
        for workload, base in (("chat", 412.0), ("bulk", 1500.0)):
            for block in range(blocks[variant]):
                times = [base * ratio * math.exp(noise.gauss(0, 0.05)) for _ in range(4)]
                requests = [
                    {"request_duration_ms": t, "cpu_ms": t * 0.98, "new_tokens": 16, "warmup": n == 0}
                    for n, t in enumerate(times)
                ]
                values = {"block": block, "requests": requests, "machine": {"load": 2.4 + noise.random()}}
                found.append(Measurement("speed", variant, workload, block // 5 + 1, values))
    for variant in ("adapter", "merged", "int8"):
        found += [_answer(variant, row, 0.98 if variant != "int8" else 0.9, noise) for row in range(40)]
    found += [dataclasses.replace(m, launch=2) for m in found if m.probe == "quality" and m.variant == "adapter"]
    detail = "No module named 'llmcompressor'"
    found.append(Measurement("failure", "awq4", values=dict(stage="build", reason="missing library", detail=detail)))
    return found


def the_evidence(decision: Decision, measurements: Sequence[Measurement]) -> Evidence:
    """What was judged, by a plan that has the decision's variants."""
    variants = {name: Variant(name, (), EAGER) for name in (decision.baseline, *(v.name for v in decision.variants))}
    plan = plan_of()
    recipe = dataclasses.replace(plan.recipe, variants=variants, baseline=decision.baseline)
    models = dict.fromkeys(variants, "")
    return evidence_of(dataclasses.replace(plan, recipe=recipe, models=models), measurements)


def a_run() -> tuple[Decision, Evidence]:
    return a_decision(), the_evidence(a_decision(), the_measurements())


def _answer(variant: str, row: int, skill: float, noise: random.Random) -> Measurement:
    expected = '{"intent": "refund", "order": ' + str(1000 + row) + "}"
    right = variant == "adapter" or noise.random() < skill
    values = {
        "row": f"p-{row}",
        "expected": expected,
        "output": expected if right else '{"intent": "refund", "order": ' + "1 " * 30,
        "tokens": [row] * 11,
        "stopped": True,
        "score": float(right),
        "correct": right,
        "valid": right,
        "critical": row % 10 == 0,
        "flags": [] if right else ["loop"] if row % 3 else [],
        "slices": ["numbers"] if row % 2 else ["long context"],
        "new_tokens": 12,
    }
    return Measurement("quality", variant, launch=1, values=values)


def hostile() -> tuple[Decision, Evidence]:
    def spoil(value: Json) -> Json:
        if isinstance(value, str):
            return value + HOSTILE
        return [spoil(item) for item in value] if isinstance(value, list | tuple) else value

    decision = a_decision()
    keep = {"outcome", "baseline", "chosen", "minimize", "name", "techniques"}

    def spoil_record(record: Json) -> Json:
        changes = {
            f.name: spoil(getattr(record, f.name))
            for f in dataclasses.fields(record)
            if f.name not in keep and isinstance(getattr(record, f.name), str)
        }
        return dataclasses.replace(record, **changes)

    variants = tuple(
        dataclasses.replace(
            spoil_record(v),
            name=v.name + HOSTILE,
            techniques=(HOSTILE,),
            notes=(HOSTILE,),
            certificates=(HOSTILE,),
            remarks=(HOSTILE,),
            verdicts=tuple(map(spoil_record, v.verdicts)),
        )
        for v in decision.variants
    )
    bad = dataclasses.replace(
        spoil_record(decision),
        baseline="adapter" + HOSTILE,
        chosen="merged" + HOSTILE,
        minimize="latency.p50@chat",
        variants=variants,
        warnings=(HOSTILE,),
        machine={HOSTILE: {HOSTILE: HOSTILE}},
    )
    records = [
        dataclasses.replace(m, variant=m.variant + HOSTILE, values={k: spoil(v) for k, v in m.values.items()})
        for m in the_measurements()
    ]
    return bad, the_evidence(bad, records)


class Page(HTMLParser):
    """What a browser would see: tags, the attributes that fetch something, and whether all tags are closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ---- the table ---------------------------------------------------------------------------------


def test_speed_is_said_plainly() -> None:
    assert words.speed(interval(0.81, 0.78, 0.84)) == "0.81x (0.78–0.84), 19 % faster"
    assert words.speed(interval(1.22, 1.18, 1.26)) == "1.22x (1.18–1.26), 22 % SLOWER"
    assert words.speed(interval(0.97, 0.94, 1.01)) == "0.97x (0.94–1.01), no difference shown"
    assert words.speed(interval(1.22, 1.18, 1.26), compact=True) == "1.22x SLOWER (1.18–1.26)"
    assert words.speed(interval(3.4, 3.1, 3.8)) == "3.40x (3.10–3.80), 240 % SLOWER"
    assert words.speed(interval(0.9, 0.5, math.inf)).endswith("–∞), no difference shown")
    assert words.speed(None) == words.speed(interval(math.nan)) == words.MISSING


def test_figures_carry_their_interval_unit_and_n() -> None:
    assert words.figure("latency.p50@chat", interval(41.2, 40.1, 42.4)) == "41.2 ms (40.1–42.4)"
    assert words.figure("memory", interval(163e6)) == "163 MB"
    assert words.figure("memory", interval(1.1e9, 980e6, 1.2e9)) == "1.10 GB (980 MB–1.20 GB)"
    assert words.figure("gpu_memory_allocated", interval(163e6)) == "163 MB"
    assert words.figure("critical_errors", interval(0.0, 0.0, 0.00932, 320)) == "0 of 320, < 0.93 %"
    assert words.figure("critical_errors", interval(3 / 320, 0.0, 0.024, 320)) == "3 of 320, < 2.4 %"
    assert "too few requests for P95" in words.figure("latency.p95@chat", interval(41.2, 40.1, math.inf))
    assert words.figure("kl", interval(0.01, -0.001, 0.02)) == "0.0100 nats (-0.00100 to 0.0200)"


def test_a_column_of_p95_that_no_variant_has_requests_for_goes_and_its_note_stays() -> None:
    few, enough = interval(41.2, 40.1, math.inf), interval(41.2, 40.1, 42.4)
    adapter, merged, *_ = a_decision().variants

    def with_tails(*tails: Interval) -> Decision:
        told = [
            dataclasses.replace(variant, figures={**variant.figures, "latency.p95@chat": tail})
            for variant, tail in zip((adapter, merged), tails, strict=True)
        ]
        return dataclasses.replace(a_decision(), variants=tuple(told))

    assert "P95@chat" not in table.rows(with_tails(few, few))[0]
    assert "P95@chat" in table.rows(with_tails(few, enough))[0]
    assert any(words.TOO_FEW in line for line in table.notes(with_tails(few, few)))
    assert not any(words.TOO_FEW in line for line in table.warnings(with_tails(few, few))), "it says nothing to fear"


def test_the_table_has_a_row_per_variant_and_marks_the_baseline_and_the_choice() -> None:
    header, body = table.rows(a_decision())
    assert [row[0] for row in body] == ["adapter (baseline)", "merged (chosen)", "int8", "gptq4", "awq4"]
    assert header[:4] == ["variant", "verdict", "speed@chat vs adapter", "speed@bulk"]
    assert "throughput@bulk" in header
    assert "GPU memory" not in header  # nobody measured it
    cells = dict(zip(header, body[2], strict=True))
    assert cells["speed@chat vs adapter"] == "1.22x (1.18–1.26), 22 % SLOWER"
    assert cells["verdict"] == "rejected (int8.critical_errors)"
    assert set(body[4][2:]) == {words.MISSING}


def test_the_cards_say_whose_each_value_is() -> None:
    decision, evidence = a_run()
    chosen = str(decision.chosen)
    page = html.render(decision, evidence)
    whose = f"{chosen} (chosen) against {decision.baseline} (baseline)"
    assert whose in page and whose in markdown.part(decision, evidence, "scorecard")
    cards = re.findall(r"<li class=.*?</li>", page.partition('<ul class="card">')[2].partition("</ul>")[0], re.DOTALL)
    assert cards and all(chosen in card for card in cards)
    one = tuple(v for v in decision.variants if v.name in (chosen, decision.baseline))
    kept = dataclasses.replace(decision, variants=one, chosen=None)
    assert f"{chosen} (not chosen)" in html.render(kept, evidence)


def test_further_metrics_stand_apart_from_those_that_decide() -> None:
    sheets = table.more(a_decision())
    cells = {name: text for sheet in sheets.values() for name, text in zip(sheet.header, sheet.body[1], strict=True)}
    assert cells["answers flipped"] == "3 worse, 1 better"
    assert cells["same answer"] == "98.1 % (96–99.3)"
    assert "GPU memory reserved" not in cells
    assert not set(cells) & set(table.first(a_decision()).header) - {"variant"}
    assert table.more(dataclasses.replace(a_decision(), variants=a_decision().variants[-1:])) == {}


def test_no_table_of_variants_is_wider_than_a_page_and_no_figure_is_lost_for_it() -> None:
    decision = a_decision()
    tasks = {f"task.t{n}": interval(0.5, 0.4, 0.6) for n in range(20)}
    many = tuple(dataclasses.replace(v, figures={**v.figures, **tasks}) for v in decision.variants)
    wide = dataclasses.replace(decision, variants=many)
    first = table.first(wide)
    assert len(first.header) <= table.MOST_COLUMNS
    assert first.header[:3] == ["variant", "verdict", "speed@chat vs adapter"]
    sheets = [first, *table.more(wide).values()]
    assert all(len(sheet.header) <= table.MOST_COLUMNS for sheet in sheets)
    shown = {name for sheet in sheets for name in sheet.header}
    assert shown >= {*tasks, *table.first(decision).header, "critical errors"}


def test_a_column_sorts_by_its_values_and_not_by_their_text() -> None:
    sheet = table.first(a_decision())
    at = sheet.header.index("peak memory")
    memory = [row[at] for row in sheet.keys]
    assert memory == [
        pytest.approx(1.13e9),
        pytest.approx(1.13e9),
        pytest.approx(0.36 * 1.13e9),
        pytest.approx(0.25 * 1.13e9),
        None,
    ]
    assert {row[0] for row in sheet.keys} == {None}, "names sort by their text"


def test_times_are_shown_for_every_workload_where_there_are_several() -> None:
    header, body = table.by_workload(a_decision())
    assert [row[:2] for row in body[:2]] == [["chat", "adapter (baseline)"], ["chat", "merged (chosen)"]]
    assert {row[0] for row in body} == {"chat", "bulk"}
    cells = dict(zip(header, next(row for row in body if row[:2] == ["bulk", "merged (chosen)"]), strict=True))
    assert "tokens/s" in cells["throughput"]
    alone = [
        dataclasses.replace(v, figures={"latency.p50@chat": interval(1.0, 1.0, 1.0)}) for v in a_decision().variants
    ]
    assert table.by_workload(dataclasses.replace(a_decision(), variants=tuple(alone)))[1] == []


def loaded(**times: Interval) -> LoadSummary:
    """A load of two requests for one served name."""
    counts = summary.figures([summary.Request("p", "adapter", 0.0, 0.0, 0.5, new_tokens=2)] * 2)
    figures = dataclasses.replace(counts, **times)
    by_model = {"adapter": summary.OfModel(**vars(figures), cold_ttft_ms=None)}
    delay = summary.own_delay([])
    return LoadSummary(figures=figures, by_model=by_model, own_delay=delay, highest_rate=None, cliff=None)


def test_the_median_of_two_requests_says_so_in_the_place_of_an_endless_interval() -> None:
    times = {"ttft_p50_ms": interval(792.0, -math.inf, math.inf, 2), "ttft_p95_ms": interval(800.0, 1.0, math.inf, 2)}
    ((name, *cells),) = load.rows(loaded(**times))
    assert name == "adapter" and cells[2:4] == ["792 (n=2)", "too few"]


def test_a_load_shorter_than_a_look_at_the_server_still_tells_how_full_its_batches_were() -> None:
    counted_at_every_step = load.lines(dataclasses.replace(loaded(), engine=Account(busy=1.5, slots=2)))
    running = Gauge(mean=1.5, peak=2.0, n=4)
    looked_at = load.lines(dataclasses.replace(loaded(), engine=Account(running=running, slots=2)))
    assert "75 % of 2 slots" in counted_at_every_step["batch"]
    assert "75 % of 2 slots" in looked_at["batch"]
    assert "batch" not in load.lines(loaded())


def test_the_compact_table_fits_a_terminal() -> None:
    header, body = table.rows(a_decision(), compact=True)
    widths = [max(len(row[n]) for row in [header, *body]) for n in range(len(header))]
    assert sum(widths) + 2 * (len(widths) - 1) <= table.WIDTH
    assert header[0] == "variant" and body[0][0] == "adapter *"


def test_the_clock_that_judges_gives_the_speed() -> None:
    decision = dataclasses.replace(a_decision(), clock="cpu")
    assert table.ratio_name(decision, "chat") == "cpu.ratio@chat"
    assert table.ratio_name(decision, "bulk") == "latency.ratio@bulk"  # CPU time was not read there


def test_an_inconclusive_verdict_says_what_would_settle_it() -> None:
    verdict = a_decision().variants[3].verdicts[1]
    assert words.reason(verdict).endswith("cannot tell yet; about 32 more blocks needed")


def test_a_prompt_whose_answer_flipped_is_shown_once_for_all_variants_the_gravest_first() -> None:
    decision, evidence = a_run()
    flips = answers.flips(decision, evidence)
    shown = answers.prompts(decision, evidence)
    assert flips["adapter"] == []
    assert len({prompt.row for prompt in shown}) == len(shown) > 1
    told = {(name, prompt.row) for prompt in shown for each in prompt.changed for name in each.variants}
    assert told == {(name, flip.row) for name, flipped in flips.items() for flip in flipped}
    assert [prompt.gravity for prompt in shown] == sorted(prompt.gravity for prompt in shown)
    assert shown[0].changed[0].change == "loop"
    for prompt in shown:
        told_of = {name for each in prompt.changed for name in each.variants}
        assert told_of.isdisjoint(prompt.kept) and told_of | {*prompt.kept} == {"merged", "int8"}


def test_variants_that_answer_alike_share_a_line() -> None:
    decision = a_decision()
    records = [m for m in the_measurements() if m.probe == "quality" and m.variant in ("adapter", "int8")]
    same = [dataclasses.replace(m, variant="gptq4") for m in records if m.variant == "int8"]
    shown = answers.prompts(decision, the_evidence(decision, [*records, *same]))
    assert shown and all(each.variants == ("int8", "gptq4") for prompt in shown for each in prompt.changed)


def test_slices_show_the_change_to_the_baseline() -> None:
    header, body = answers.slices(*a_run())
    assert header == ["slice", "adapter", "merged", "int8"]
    assert [row[0] for row in body] == ["all", "long context", "numbers"]
    assert body[0][1] == "100 % (40 of 40)"
    assert re.fullmatch(r"\d+ % \(\d+ of 40, -\d+\)", body[0][3])


def test_block_ratios_pair_within_blocks_and_the_baseline_with_its_twin() -> None:
    found = measured.block_ratios(*a_run(), "chat")
    assert {name: len(ratios) for name, ratios in found.items()} == {
        "adapter": 8,
        "merged": 24,
        "int8": 10,
        "gptq4": 24,
        "awq4": 0,
    }
    assert sum(found["merged"]) / 24 == pytest.approx(0.81, abs=0.05)


# ---- every report ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_reports_say_what_a_reader_needs_in_order(name: str) -> None:
    text = reports(*a_run())[name]
    wanted = [
        "Ship merged",
        "machine was busy",
        "speed@chat vs adapter",
        "19 % faster",
        "22 % SLOWER",
        "about 32 more blocks needed",
        "Right answers by slice",
        "(from 10 on), 16, 24, 40, 60 blocks",
        "torch 2.9.1",
        "No module named",
        "How to read this",
    ]
    at = [text.rfind(words) if words == "No module named" else text.find(words) for words in wanted]
    assert -1 not in at and at == sorted(at)
    assert "too few requests for P95" in text and "0 of 320" in text


@pytest.mark.fault(37, "it stays text")
def test_hostile_text_stays_text_in_html() -> None:
    page = Page(html.render(*hostile()))
    assert page.open == [] and page.fetched == []
    assert not {"img", "link", "iframe", "object", "a"} & set(page.tags)
    assert page.tags.count("script") == 1, "the page's own, which its policy names by hash"
    assert scripts(html.render(*hostile())) == scripts(html.render(*a_run()))


def scripts(text: str) -> list[str]:
    return re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)


def test_the_only_script_is_the_one_that_the_page_allows_itself() -> None:
    text = html.render(*a_run())
    (script,) = scripts(text)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and f"script-src 'sha256-{digest}'" in policy[1].replace("&#39;", "'")
    assert "default-src 'none'" in policy[1]
    assert not re.search(r"\son\w+=", text.partition("<script>")[0])


def test_the_page_is_complete_without_its_script() -> None:
    page = html.render(*a_run()).partition("<script>")[0]
    assert all(variant.name in page for variant in a_decision().variants)
    assert "<button" not in page, "what needs the script comes with it"


@pytest.mark.fault(37, "it stays text in Markdown")
def test_hostile_text_stays_text_in_markdown() -> None:
    text = markdown.render(*hostile())
    assert "<script" not in text and "](" not in text and "`" not in text and "http://" not in text
    assert not re.search(r"(?<!\w)@team", text)
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # every table keeps its columns
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert columns
    assert set(re.findall(r"<(/?\w+)", text)) <= {
        "details",
        "/details",
        "summary",
        "/summary",
        "b",
        "/b",
        "code",
        "/code",
    }


@pytest.mark.fault(37, "the page loads nothing")
def test_the_page_loads_nothing() -> None:
    text = html.render(*a_run())
    assert Page(text).fetched == []
    assert not re.search(r"https?:|url\(|@import|<script [^>]", text)
    assert not re.search(r"fetch|XMLHttp|import|eval|innerHTML", scripts(text)[0])
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_a_comment_on_github_is_never_too_long() -> None:
    decision = a_decision()
    many = tuple(dataclasses.replace(decision.variants[2], name=f"v{n}") for n in range(60))
    big = dataclasses.replace(decision, variants=(decision.variants[0], *many))
    answers = [m for m in the_measurements() if m.probe == "quality"]
    wrong = [m for m in answers if m.variant == "int8"]
    records = answers + [dataclasses.replace(m, variant=v.name) for v in many for m in wrong]
    assert len(markdown.render(big, the_evidence(big, records))) <= markdown.MOST


# ---- for machines ------------------------------------------------------------------------------


def test_a_build_that_ships_a_variant_does_not_fail_for_those_it_turned_down() -> None:
    def counts(decision: Decision) -> dict[str, list[str | None]]:
        root = ElementTree.fromstring(junit.render(decision))
        return {str(s.get("name")): [s.get(k) for k in ("tests", "failures", "errors", "skipped")] for s in root}

    shipped = a_decision()
    assert counts(shipped) == {
        "decision": ["1", "0", "0", "0"],
        "merged": ["4", "0", "0", "0"],
        "int8": ["2", "0", "0", "2"],
        "gptq4": ["2", "0", "0", "1"],
        "awq4": ["1", "0", "0", "1"],
    }
    rejected = dataclasses.replace(shipped, outcome="rejected", chosen=None)
    assert counts(rejected) == {
        "decision": ["1", "1", "0", "0"],
        "merged": ["4", "0", "0", "0"],
        "int8": ["2", "2", "0", "0"],
        "gptq4": ["2", "0", "1", "0"],
        "awq4": ["1", "0", "0", "1"],
    }
    root = ElementTree.fromstring(junit.render(rejected))
    assert [root.get(k) for k in ("tests", "failures", "errors", "skipped")] == ["10", "3", "1", "1"]
    error = root.find(".//error")
    assert error is not None and "32 more blocks" in str(error.get("message"))


def test_a_decision_about_nothing_is_an_error_in_junit() -> None:
    nothing = dataclasses.replace(a_decision(), outcome="not judged", chosen=None, variants=())
    assert ElementTree.fromstring(junit.render(nothing)).get("errors") == "1"


def test_an_outcome_that_no_verdict_gave_is_a_case_of_its_own() -> None:
    decision = a_decision()
    undone = dataclasses.replace(decision.variants[1], outcome="inconclusive", decided_by="measurement.a_a")
    open_ = dataclasses.replace(decision, outcome="inconclusive", chosen=None, variants=(undone,))
    root = ElementTree.fromstring(junit.render(open_))
    assert root.get("errors") == "2"


def test_junit_holds_hostile_text() -> None:
    root = ElementTree.fromstring(junit.render(hostile()[0]))
    assert "<script>" in str(root.find(".//skipped").get("message"))  # type: ignore[union-attr]


def test_a_decision_survives_its_file() -> None:
    text = as_json.render(a_decision())
    assert json.loads(text)["format"] == 1
    assert as_json.decision_from_json(text) == a_decision()
    assert as_json.render(as_json.decision_from_json(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "variants": 3}', '{"format": 1, "x": 1}'],
)
@pytest.mark.fault(39, "a decision of another version is refused")
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(BadInput) as refused:
        as_json.decision_from_json(text)
    assert refused.value.hint


# ---- whatever the figures are ------------------------------------------------------------------

numbers = st.floats(-1e300, 1e300) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, 0.81])
texts = st.text(max_size=12) | st.sampled_from([HOSTILE, "chat", "a|b", ""])
outcomes = st.sampled_from(["accepted", "rejected", "inconclusive", "not judged"])
intervals = st.builds(Interval, numbers, numbers, numbers, st.integers(0, 10**6), numbers)
names = texts | st.sampled_from(
    [*figures(interval(1.0), 1.0), "critical_errors", "kl", "tpot.p95@chat", "gpu_memory_allocated"]
)
verdicts = st.builds(
    Verdict,
    rule=texts | st.sampled_from(["merge.gain", "int8.critical_errors", "require: latency.p95@chat <= 4 ms"]),
    outcome=outcomes,
    reason=texts,
    against=texts,
    value=st.none() | intervals,
    unit=st.sampled_from(["", "x", "share", "ms", "bytes", "tokens/s", "s", "nats", "ratio", "furlongs"]),
    limit=st.none() | numbers,
    clock=texts,
    blocks_needed=st.none() | st.integers(0, 10**4),
)
chosen_names = st.sampled_from(["adapter", "merged", HOSTILE]) | texts
variants = st.builds(
    VariantDecision,
    name=chosen_names,
    techniques=st.tuples(texts),
    outcome=outcomes,
    decided_by=texts,
    verdicts=st.lists(verdicts, max_size=3).map(tuple),
    figures=st.dictionaries(names, intervals, max_size=8),
    notes=st.tuples() | st.tuples(texts),
    certificates=st.tuples() | st.tuples(texts),
    remarks=st.tuples() | st.tuples(texts),
)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
decisions = st.builds(
    Decision,
    recipe=texts,
    baseline=chosen_names,
    minimize=st.sampled_from(["latency.p50@chat", "throughput@bulk", "memory", ""]),
    clock=st.sampled_from(["wall", "cpu"]),
    chosen=st.none() | chosen_names,
    outcome=outcomes,
    sentence=texts,
    variants=st.lists(variants, max_size=4).map(tuple),
    warnings=st.lists(texts, max_size=2).map(tuple),
    machine=st.dictionaries(texts, jsons, max_size=3),
    format=st.just(1),
)
times = st.none() | st.floats(1e-6, 1e9) | st.sampled_from([math.nan, math.inf, -1.0, 0.0])
requests = st.fixed_dictionaries(
    {"request_duration_ms": times, "cpu_ms": times, "new_tokens": st.integers(0, 99), "warmup": st.booleans()},
    optional={"error": texts},
)
rows = {"row": texts, "output": texts, "expected": texts, "flags": st.lists(texts, max_size=2)}
rows |= {"slices": st.lists(texts, max_size=2), "tokens": st.lists(st.integers(0, 9), max_size=3)}
rows |= {name: st.booleans() for name in ("correct", "valid", "critical", "stopped")}
rows |= {"score": st.floats(0, 1), "new_tokens": st.integers(0, 99)}
turns = {"block": st.integers(0, 3), "requests": st.lists(requests, max_size=3)}
VALUES = {
    "speed": st.fixed_dictionaries(turns, optional={"machine": st.fixed_dictionaries({"load": numbers})}),
    "quality": st.fixed_dictionaries(rows),
    "failure": st.fixed_dictionaries({name: texts for name in ("stage", "reason", "detail")}),
    "launch": st.fixed_dictionaries({"model_loading_time": numbers, "device": texts, "threads": st.integers(0, 9)}),
    "engine": st.fixed_dictionaries({"log": st.lists(texts, max_size=2)}),
    "memory": st.fixed_dictionaries({"peak_memory_bytes": st.integers(0, 10**12)}),
}
recorded = st.sampled_from([*VALUES]).flatmap(
    lambda probe: st.builds(
        Measurement,
        probe=st.just(probe),
        variant=chosen_names | st.just("adapter~aa"),
        workload=st.sampled_from(["chat", "bulk", ""]),
        launch=st.integers(0, 3),
        values=VALUES[probe],
    )
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(decisions, st.lists(recorded, max_size=8))
def test_no_decision_breaks_a_report(decision: Decision, measurements: list[Measurement]) -> None:
    written = {**reports(decision, the_evidence(decision, measurements)), "decision.json": as_json.render(decision)}
    written |= {"table": "\n".join(map("".join, table.rows(decision, compact=True)[1]))}
    for text in written.values():
        text.encode()  # no lone surrogates
    ElementTree.fromstring(written["junit.xml"].encode())
    page = Page(written["report.html"])
    assert page.open == [] and page.fetched == []
    again = as_json.decision_from_json(written["decision.json"])
    assert as_json.render(again) == written["decision.json"]


# ---- a report as a whole -----------------------------------------------------------------------


def test_a_whole_report_reads_as_it_did() -> None:
    """To renew it after a change that is meant: RENEW=1 .venv/bin/pytest tests/test_render.py -k whole_report"""
    snapshot, report = DATA / "report.md", markdown.render(*a_run())
    if os.environ.get("RENEW"):
        snapshot.write_text(report, encoding="utf-8")
    assert report == snapshot.read_text(encoding="utf-8")
