"""A diagnosis: pairs differ in one thing, a planted cost is found, a clean engine has none, and too little is open."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command, errors
from helpers.forked import COMMANDS, workers
from helpers.servers import served
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.cli.diagnose import outcome
from peftopt.diagnose import diagnosing, judging, keeping, page, screen
from peftopt.diagnose.bottlenecks import batching, choice, prompts, unfused
from peftopt.diagnose.diagnosing import ordered
from peftopt.diagnose.measuring import making
from peftopt.diagnose.measuring.asking import Turn
from peftopt.diagnose.measuring.cells import BASE, BATCH, Cell, Launch, Load, Pair, cells_of, differing, evenly, skewed
from peftopt.diagnose.measuring.company import Names
from peftopt.diagnose.measuring.measured import TURNS, Kept, Measured, Turns
from peftopt.diagnose.measuring.passing import Pass, fitting, united
from peftopt.diagnose.records import FREE, Bottleneck, Diagnosis, Finding, Row
from peftopt.diagnose.rows import costs
from peftopt.diagnose.rows.parts import Part, all_rows, groups, lone, together
from peftopt.diagnose.setting import Setting
from peftopt.errors import ACCEPTED, BAD_INPUT, ENVIRONMENT, INCONCLUSIVE, REJECTED, BadInput
from peftopt.models.adapter import open_adapter, plain_pairs
from peftopt.records import Interval

ENGINES = ("eager", "vllm", "http://127.0.0.1:1")
ABLE = {"adapters", "lora", "slots", "rank"}
"""What it takes to be able to serve an adapter."""

names = st.builds(
    Names,
    adapter=st.just("support"),
    others=st.lists(st.sampled_from(["sales", "legal", "hr", "copy"]), unique=True).map(tuple),
    other_rank=st.sampled_from(["", "support-rank-64"]),
    rank=st.just(8),
    padded_rank=st.just(64),
    cut=st.booleans(),
)


def setting(engine: str = "eager", **fields: object) -> Setting:
    return Setting(**{"base": "base", "adapters": {"support": "lora"}, "engine": engine, **fields})


def all_parts(engine: str, known: Names) -> list[Part]:
    asked = setting(engine)
    launch = together(asked, known)
    virtual = {"soft-8": 8, "soft-32": 32}
    return [
        *unfused.parts(asked, known),
        *choice.parts(asked, known, launch),
        *batching.parts(asked, launch, known.adapter),
        *prompts.parts(asked, Launch(adapters=tuple(virtual)), virtual, ()),
    ]


# ---- cells ---------------------------------------------------------------------------------------


@given(st.sampled_from(ENGINES), names)
def test_the_cells_of_a_pair_differ_in_one_thing(engine: str, known: Names) -> None:
    for part in all_parts(engine, known):
        things = differing(part.pair.costly, part.pair.plain)
        one_thing = set(things) <= ABLE if part.pair.part == "capability" else len(things) == 1
        assert one_thing and things, (part.pair.part, things)


@given(st.sampled_from(ENGINES), names)
def test_no_more_is_compared_than_shares_the_error(engine: str, known: Names) -> None:
    compared = sum(len(part.phases) for part in all_parts(engine, known))
    beside = len(choice.counts(BATCH)) - 1 + 2  # the cliff's steps, batching, static batches
    assert compared + beside <= judging.FAMILY


def test_a_server_that_runs_already_is_asked_only_for_what_it_serves() -> None:
    known = Names("support", ("sales",))
    launches = {cell.launch for cell in cells_of(part.pair for part in unfused.parts(setting(ENGINES[2]), known))}
    assert launches == {Launch(adapters=("support", "sales"))}


@given(st.integers(1, 12), st.integers(1, 32))
def test_requests_are_shared_out_whole(live: int, requests: int) -> None:
    asked = [f"a{number}" for number in range(live)]
    even, skew = evenly(asked, requests), skewed(asked, requests)
    counts = [skew.count(name) for name in asked]
    assert len(even) == len(skew) == requests
    assert counts == sorted(counts, reverse=True)
    assert max(even.count(name) for name in asked) - min(even.count(name) for name in asked) <= 1


# ---- judging -------------------------------------------------------------------------------------


def blocks(ratio: float, noise: float, count: int, seed: int) -> list[float]:
    dice = random.Random(seed)
    return [math.log(ratio) + dice.gauss(0, noise) for _ in range(count)]


@given(st.floats(1.2, 4.0), st.integers(0, 10_000), st.integers(12, 40))
def test_a_planted_cost_is_found(ratio: float, seed: int, count: int) -> None:
    judged = judging.judged(blocks(ratio, 0.02, count, seed))
    assert judged.finding == "costs"
    assert abs(judged.ratio.estimate / ratio - 1) < 0.05


@given(st.floats(0.3, 0.97), st.integers(0, 10_000))
def test_what_is_free_is_said_to_be(ratio: float, seed: int) -> None:
    assert judging.judged(blocks(ratio, 0.005, 12, seed)).finding == "no cost"


@pytest.mark.parametrize(("noises", "most"), [([0.01, 0.03, 0.1], 0), ([0.2, 0.6], 2)])
def test_clean_engines_have_no_costs(noises: Sequence[float], most: int) -> None:
    """All comparisons of 100 diagnoses of an engine where nothing costs anything, with spikes; where the noise is many
    times what counts as a cost, one in a hundred may err."""
    wrong = 0
    for seed in range(100):
        dice = random.Random(seed)
        logs = [[dice.gauss(0, dice.choice(noises)) for _ in range(18)] for _ in range(judging.FAMILY)]
        wrong += any(judging.judged(each).finding == "costs" for each in logs)
    assert wrong <= most


def test_the_first_look_can_decide_and_fewer_blocks_cannot() -> None:
    first = judging.LOOKS[0]
    assert judging.judged([math.log(2)] * first).finding == "costs"
    assert judging.judged([math.log(2)] * (first - 1)).finding == "undecided"
    assert sum(judging.SHARES) == pytest.approx(1)


@given(st.integers(0, 1_000))
def test_what_decided_stays_decided_when_blocks_are_added(seed: int) -> None:
    logs = blocks(1.5, 0.1, judging.LOOKS[0], seed)
    later = blocks(0.5, 0.1, 30, seed)
    first = judging.judged(logs).finding
    assert first == "undecided" or judging.judged([*logs, *later]).finding == first


def test_what_differs_between_launches_is_not_called_a_cost() -> None:
    logs = [math.log(1.06)] * 16
    assert judging.judged(logs, one_server=True).finding == "costs"
    assert judging.judged(logs, one_server=False).finding == "undecided"


@given(
    st.floats(0.9, 1.3), st.sampled_from([0.003, 0.03, 0.3]), st.integers(1, 70), st.integers(0, 10_000), st.booleans()
)
def test_the_interval_that_is_shown_is_the_one_that_was_judged(
    ratio: float, noise: float, count: int, seed: int, one_server: bool
) -> None:
    judged = judging.judged(blocks(ratio, noise, count, seed), one_server)
    assert (judged.finding == "costs") == (judged.ratio.low > judged.costly)
    assert (judged.finding == "no cost") == (judged.ratio.high < judged.free == FREE)
    assert judged.ratio.level in judging.LEVELS and judged.ratio.n <= judged.blocks == count
    assert (judged.finding == "undecided") == bool(judged.why)
    assert judging.level_text(judged.ratio.level) in judged.why or judged.finding != "undecided" or count < 12


@pytest.mark.parametrize(("level", "text"), [(0.95, "95 %"), (0.99, "99 %"), (0.99950303, "99.95 %"), (1.0, "100 %")])
def test_no_level_is_rounded_to_certainty(level: float, text: str) -> None:
    assert judging.level_text(level) == text
    assert all(judging.level_text(each) != "100 %" for each in judging.LEVELS)


def test_an_undecided_row_shows_the_interval_that_left_it_open() -> None:
    """By 95 % these blocks lie above the limit, and by the level of all comparisons together they do not."""
    noisy = [8.0 * math.exp(log) for log in [*[0.08] * 11, -0.02]]
    times = measured({PART.pair.costly: noisy, PART.pair.plain: [8.0] * 12})
    row = costs.row("unfused", PART.pair, "prefill", times, TOLD, 5)
    loose = judging.ratio(noisy, [8.0] * 12)
    assert loose and loose.low > FREE
    assert row.finding == "undecided" and row.ratio and row.ratio.low < FREE < row.ratio.high
    assert row.ratio.level == judging.LEVELS[0]
    written = json.loads(keeping.text(replace(diagnosis(), rows=(row,))))["rows"][0]
    assert written["ratio"]["level"] == judging.LEVELS[0] and "99.95 %" in written["why"]
    texts = [*page.pages(replace(diagnosis(), rows=(row,))).values(), *screen.lines(replace(diagnosis(), rows=(row,)))]
    assert all("99.95 %" in text for text in texts[:2]) and any("99.95 %" in text for text in texts[2:])


@given(st.integers(0, 200))
def test_the_next_look_is_later(count: int) -> None:
    assert judging.next_look(count) > count


# ---- rows ----------------------------------------------------------------------------------------


def turn(load: Load, ms: float, failed: Sequence[str] = ()) -> Turn:
    requests = len(load.names)
    times = () if failed else (ms,) * requests
    return Turn(
        names=load.names,
        ttft_ms=times,
        tpot_ms=times,
        longest_gap_ms=times,
        latency_ms=times,
        whole_ms=10 * ms,
        new_tokens=sum(load.answers),
        prompt_tokens=8,
        failed=tuple(failed),
    )


def measured(times: dict[Cell, Sequence[float]]) -> Measured:
    return Measured(
        [
            Kept("unfused", block, cell, turn(cell.load, ms))
            for cell, values in times.items()
            for block, ms in enumerate(values)
        ]
    )


PART = unfused.parts(setting(), Names("support"))[0]
TOLD = costs.Told("A server", "do this", 1)


@given(st.sampled_from(ENGINES), names)
def test_nothing_measured_is_never_free(engine: str, known: Names) -> None:
    asked, nothing = setting(engine), Measured([])
    rows = all_rows("unfused", asked, all_parts(engine, known), nothing)
    ladder = [choice.live(asked, known, Launch(), size) for size in (1, 2)]
    rows += choice.cliff(asked, ladder, nothing)
    rows += batching.together(asked, [lone(asked, Launch(), "support", batch) for batch in (1, 8)], nothing)
    rows += batching.continuous(asked, *batching.uneven(asked, Launch(), "support"), nothing)
    assert {row.finding for row in rows} == {"undecided"}


def test_a_cost_has_its_figures_and_what_to_do() -> None:
    times = measured({PART.pair.costly: [12.0] * 12, PART.pair.plain: [8.0] * 12})
    row = costs.row("unfused", PART.pair, "prefill", times, TOLD, 5)
    assert (row.finding, row.advice, row.blocks) == ("costs", "do this", 12)
    assert row.ratio and row.ratio.estimate == pytest.approx(1.5)
    assert row.extra and row.extra.estimate == pytest.approx(4)
    assert row.share == pytest.approx(4 / (12 + 4 * 12))


def test_what_is_undecided_says_how_to_decide_it() -> None:
    times = measured({PART.pair.costly: [12.0] * 3, PART.pair.plain: [8.0] * 3})
    row = costs.row("unfused", PART.pair, "decode", times, TOLD, 5)
    assert row.finding == "undecided" and "--more unfused" in row.advice


def test_requests_that_are_refused_are_a_fault() -> None:
    kept = [Kept("unfused", 0, cell, turn(cell.load, 1, ["HTTP 500"])) for cell in cells_of([PART.pair])]
    row = costs.row("unfused", PART.pair, "prefill", Measured(kept), TOLD, 5)
    assert row.finding == "fault" and "HTTP 500" in row.sentence


def test_the_dearest_comes_first() -> None:
    def row(finding: Finding, share: float | None) -> Row:
        return replace(costs.not_asked("unfused", "x", "y"), finding=finding, share=share)

    rows = [row("no cost", 0.9), row("costs", 0.1), row("undecided", 0.8), row("costs", 0.4), row("fault", None)]
    assert [(each.finding, each.share) for each in ordered(rows)] == [
        ("fault", None),
        ("costs", 0.4),
        ("costs", 0.1),
        ("undecided", 0.8),
        ("no cost", 0.9),
    ]


def diagnosis(*findings: Finding) -> Diagnosis:
    row = costs.not_asked("unfused", "x", "y")
    rows = tuple(replace(row, finding=finding, ratio=Interval(1.2, -math.inf, math.inf, 3)) for finding in findings)
    return Diagnosis(
        rows=rows,
        engine="eager",
        base="base",
        adapters=("support",),
        threads=1,
        seconds=1.0,
        usual_request_ms=Interval(math.nan, -math.inf, math.inf, 0),
    )


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        (("costs", "undecided"), ACCEPTED),
        (("no cost",), ACCEPTED),
        (("fault", "costs"), REJECTED),
        (("undecided", "not asked"), INCONCLUSIVE),
        (("not asked",), ENVIRONMENT),
        ((), ENVIRONMENT),
    ],
)
def test_the_exit_code_says_what_came_of_it(findings: Sequence[Finding], code: int) -> None:
    assert outcome(diagnosis(*findings)) == code


@pytest.mark.parametrize(
    ("findings", "colour", "badge"),
    [
        (("costs", "costs", "undecided", "no cost"), "rejected", "2 costs found, 1 row undecided"),
        (("costs", "no cost"), "rejected", "1 cost found"),
        (("fault", "costs"), "rejected", "1 fault, 1 cost found"),
        (("undecided", "undecided", "not asked"), "inconclusive", "no costs found, 2 rows undecided"),
        (("no cost", "not asked"), "accepted", "no costs found"),
        (("not asked",), "not-judged", "nothing measured"),
        ((), "not-judged", "nothing measured"),
    ],
)
def test_the_badge_of_a_page_says_what_was_found(findings: Sequence[Finding], colour: str, badge: str) -> None:
    text = page.pages(diagnosis(*findings))["diagnosis.html"]
    assert f'<span class="badge {colour}">{badge}</span>' in text


@pytest.mark.parametrize(
    ("extra", "unit", "shown"),
    [
        (Interval(1.92, 1.09, 3.16, 16), "MB", "1.92 MB (1.09–3.16)"),
        (Interval(1.92, -math.inf, math.inf, 2), "MB", "1.92 MB (open)"),
        (Interval(0.64, 0.5, 0.7, 16), "of requests within it", "64 % of requests within it"),
        (Interval(math.nan, -math.inf, math.inf, 0), "MB", ""),
    ],
)
def test_an_amount_is_shown_in_its_unit(extra: Interval, unit: str, shown: str) -> None:
    row = replace(costs.not_asked("unloading", "memory at rest", ""), extra=extra, unit=unit)
    assert screen.costs(row) == shown


def test_a_diagnosis_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = diagnosis("costs", "undecided")
    keeping.write(written, tmp_path)
    assert keeping.read(tmp_path).rows == written.rows
    assert keeping.text(keeping.read(tmp_path)) == keeping.text(written)


PARTS = unfused.parts(setting(), Names("support", ("sales",), "high", 8, 64))
GROUPS = groups(PARTS)
CELLS = united(GROUPS)


class Answering:
    """Servers that are up, and answer at once."""

    async def up(self, launches: Sequence[Launch]) -> None:
        return

    def asker(self, launch: Launch) -> Answering:
        return self

    async def ask(self, load: Load, block: int, cell: int) -> Turn:
        return turn(load, 1.0)


def test_a_comparison_that_stopped_short_goes_on_whole(tmp_path: Path) -> None:
    """Its plain cell has all its blocks, of another comparison; the new blocks need both."""
    whole, short = groups(unfused.parts(setting(), Names("support")))[:2]
    shared = [short[0], *whole[1:]]
    turns = Turns(tmp_path / TURNS)
    for block in range(judging.LOOKS[0]):
        for cell in united([shared, short] if block == 0 else [shared]):
            turns.add(Kept("unfused", block, cell, turn(cell.load, 1.0)))
    until = time.monotonic() + 600
    servers: Any = Answering()
    going = Pass(setting(), tmp_path, tmp_path, servers, turns, Names("support"), until, more=True)
    after = asyncio.run(going.measure("unfused", [shared, short]))
    assert after.blocks_of(short) == judging.LOOKS[0]
    assert len(after.turns(shared[1])) == judging.LOOKS[0], "what has its blocks waits for those that lag"


@given(st.lists(st.floats(0.01, 5), min_size=len(CELLS), max_size=len(CELLS)), st.floats(0, 60))
def test_comparisons_go_on_whole_as_far_as_the_time_reaches(took: list[float], seconds: float) -> None:
    times = dict(zip(CELLS, took, strict=True))
    kept = fitting(GROUPS, times, seconds)
    assert set(GROUPS[0]) <= set(kept)
    assert set(kept) == set(GROUPS[0]) or sum(times[cell] for cell in kept) <= seconds
    assert set(kept) == set(united(group for group in GROUPS if set(group) <= set(kept)))
    assert fitting(GROUPS, times, math.inf) == CELLS


# ---- the cliff and the knee ----------------------------------------------------------------------


LADDER = [choice.live(setting(), Names("a", tuple("bcdefgh")), Launch(), count) for count in (1, 2, 4, 8)]


def cliff_of(times: Sequence[float]) -> list[Row]:
    dice = random.Random(1)
    noisy = {
        cell: [ms * math.exp(dice.gauss(0, 0.01)) for _ in range(12)] for cell, ms in zip(LADDER, times, strict=True)
    }
    return choice.cliff(setting(), LADDER, measured(noisy))


@settings(max_examples=40)
@given(st.floats(0.0, 100.0), st.floats(0.1, 100.0))
def test_growth_in_proportion_is_not_a_cliff(fixed: float, each: float) -> None:
    (row,) = cliff_of([fixed + each * count for count in (1, 2, 4, 8)])
    assert row.finding != "costs"


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_cliff_is_found_where_it_is(place: int) -> None:
    (row,) = cliff_of([10.0 if number < place else 40.0 for number in range(4)])
    assert row.finding == "costs"
    assert f"From {2 ** (place - 1)} to" in row.sentence


@given(st.floats(1, 100), st.floats(0, 1))
def test_the_knee_is_where_a_request_more_adds_less_than_half(rate: float, added: float) -> None:
    rates = {1: rate, 2: rate * (1 + added)}
    assert batching.knee(rates) == (1 if added < 0.5 else None) or math.isclose(added, 0.5)


# ---- adapters that are made ----------------------------------------------------------------------


def test_padding_changes_the_rank_and_not_the_delta(tiny_lora: Path, tmp_path: Path) -> None:
    padded = making.of_rank(tiny_lora, 16, tmp_path / "padded")
    again = making.of_rank(padded, 4, tmp_path / "again")
    before, after = (open_adapter(folder) for folder in (tiny_lora, padded))
    scales = [{name: pair.scale for name, pair in (plain_pairs(each) or {}).items()} for each in (before, after)]
    assert scales[0] == scales[1]
    assert making.used_rank(tiny_lora) == (4, 4)
    assert making.used_rank(padded) == (4, 16)
    for name, entry in open_adapter(again).weights.entries.items():
        assert contents(again, name) == contents(tiny_lora, name), entry


def contents(folder: Path, name: str) -> bytes:
    with open_adapter(folder).weights as weights:
        entry = weights.entries[name]
        data = bytearray(entry.nbytes)
        weights.read(entry, 0, memoryview(data))
        return bytes(data)


def test_a_soft_prompt_fits_its_base(tiny_base: Path, tmp_path: Path) -> None:
    adapter = open_adapter(making.soft_prompt(tiny_base, 8, tmp_path / "soft"))
    assert adapter.kind == "PROMPT_TUNING"
    assert adapter.weights.entries["prompt_embeddings"].shape == (8, 64)
    assert making.shape_of(tiny_base).kv_bytes == 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, size, bf16


def test_a_rank_that_is_not_one_is_left_alone(tiny_base: Path, tmp_path: Path) -> None:
    soft = making.soft_prompt(tiny_base, 8, tmp_path / "soft")
    assert making.used_rank(soft) == (0, 0)
    with pytest.raises(BadInput):
        making.of_rank(soft, 8, tmp_path / "padded")


def test_measurements_of_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    began = setting(adapters={"support": str(tmp_path / "lora")})
    keeping.begin(began, tmp_path)
    keeping.begin(replace(began, new_tokens=9), tmp_path)  # nothing was measured yet
    (tmp_path / TURNS).touch()
    keeping.begin(replace(began, new_tokens=9, slo=("ttft <= 1 s",)), tmp_path)
    for other in ({"base": "other"}, {"engine": "vllm"}, {"adapters": {"support": "x"}}, {"prompt_tokens": 1}):
        with pytest.raises(BadInput, match="measurements of another"):
            keeping.begin(replace(began, new_tokens=9, **other), tmp_path)


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--base and --adapter"),
        (["--base", "nowhere", "--adapter", "a", "--slo", "soon"], "--slo"),
        (["--base", "nowhere", "--adapter", "a=x", "--adapter", "a=y"], "two adapters"),
        (["--more", "choices"], "no such bottleneck"),
        (["--more", "choice"], "no diagnosis"),
        (["--base", "nowhere", "--adapter", "a", "--minutes", "0"], "--minutes"),
        (["--base", "nowhere", "--adapter", "a", "--minutes", "nan"], "--minutes"),
        (["--base", "nowhere", "--adapter", "a", "--minutes", "inf"], "--minutes"),
        (["--base", "nowhere", "--adapter", "a", "--engine", "vlm"], "vllm"),
        (["--base", "nowhere", "--adapter", "nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_said(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("diagnose", *options) == BAD_INPUT
    assert named in errors(capsys)


def of_url(url: str, lora: Path, base: Path, out: Path, *more: object) -> int:
    return command(
        *("diagnose", "--base", base, "--adapter", f"support={lora}", "--adapter", f"sales={lora}"),
        *("--engine", url, "--out", out, "--minutes", 0.1, "--new-tokens", 4, "--quiet", *more),
    )


def findings(out: Path) -> dict[tuple[str, str], set[str]]:
    rows = json.loads((out / "diagnosis.json").read_text())["rows"]
    return {(row["bottleneck"], row["part"]): {r["finding"] for r in rows if r["part"] == row["part"]} for row in rows}


def test_a_server_that_runs_already_is_asked(tiny_lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    with served(gap=0.001, first=0.002) as server:
        code = of_url(server.url, tiny_lora, tiny_base, tmp_path / "out")
        asked = set(server.seen)
    found = findings(tmp_path / "out")
    assert code in (ACCEPTED, INCONCLUSIVE)
    assert asked == {"base", "support", "sales"} and not server.loaded
    assert {bottleneck for bottleneck, _ in found} >= {"unfused", "choice", "batching"}
    assert "fault" not in set().union(*found.values())


def test_an_adapter_that_changes_nothing_is_a_fault(
    tiny_lora: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served() as server:
        server.loaded["support"] = "base"  # its name answers with the base's weights
        assert of_url(server.url, tiny_lora, tiny_base, tmp_path / "out") == REJECTED
    assert findings(tmp_path / "out")[("unfused", "it changes nothing")] == {"fault"}
    assert "support" in capsys.readouterr().out


def test_blocks_are_added_to_a_diagnosis(tiny_lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with served() as server:
        of_url(server.url, tiny_lora, tiny_base, out)
        before = keeping.read(out)
        command("diagnose", "--more", "batching", "--out", out, "--minutes", 0.1, "--quiet")
    after = keeping.read(out)

    def blocks_of(which: Diagnosis, bottleneck: str) -> int:
        return sum(row.blocks for row in which.rows if row.bottleneck == bottleneck)

    assert blocks_of(after, "batching") > blocks_of(before, "batching")
    assert blocks_of(after, "unfused") == blocks_of(before, "unfused")
    assert FREE > 1 and BASE in {name for cell in cells_of([PART.pair]) for name in cell.load.names}
    assert isinstance(PART.pair, Pair)


def test_our_own_engine_is_diagnosed_from_start_to_end(tiny_lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["diagnose", "--base", tiny_base, "--adapter", f"support={tiny_lora}", "--out", out]
    words += ["--minutes", "0.2", "--new-tokens", "4", "--threads", "1", "--prompt-tokens", "8"]
    few = {"peftopt.diagnose.measuring.company:LIVE": 3}
    process = COMMANDS.begin(tmp_path / "said", "peftopt.cli", *words, workers=workers(), constants=few)
    try:
        code = process.wait(600)
    finally:
        process.kill()
    said = (tmp_path / "said").read_text()
    assert code in (ACCEPTED, INCONCLUSIVE), said
    rows = keeping.read(out).rows
    assert {row.bottleneck for row in rows} >= {"unfused", "choice", "prompts", "batching"}
    advised = [row for row in rows if row.part in ("the adapter", "virtual tokens") and row.phase == "prefill"]
    assert len(advised) == 3 and all(row.gain for row in advised)
    assert not [row for row in rows if row.finding == "fault"], said


def open_row(bottleneck: Bottleneck, share: float | None, finding: Finding = "undecided") -> Row:
    return Row(
        bottleneck=bottleneck, part="a part", phase="decode", batch=1, finding=finding, sentence="open", share=share
    )


def test_the_time_that_is_left_goes_to_what_is_undecided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may cost most is first; cycles of unloads are not added to; what adds no turn any more ends it."""
    asked: list[str] = []

    def measuring(name: Bottleneck, rounds: int) -> diagnosing.Measure:
        async def rows(whole: Pass) -> list[Row]:
            asked.append(name)
            assert whole.more and whole.left_s > 0
            if asked.count(name) <= rounds:
                whole.turns.add(Kept(name, len(asked), CELLS[0], turn(CELLS[0].load, 1.0)))
            return [open_row(name, 0.1, "no cost" if name == "choice" else "undecided")]

        return rows

    modules = {"choice": measuring("choice", 1), "unfused": measuring("unfused", 2)}
    monkeypatch.setattr(diagnosing, "MODULES", modules)
    servers: Any = Answering()
    end = time.monotonic() + 600
    whole = Pass(setting(), tmp_path, tmp_path, servers, Turns(tmp_path / TURNS), Names("support"), end)
    before = [open_row("unfused", 0.1), open_row("choice", 0.3), open_row("unloading", 0.9), open_row("unfused", None)]
    after = asyncio.run(diagnosing._decided(whole, before, end))
    assert asked == ["choice", "unfused", "unfused", "unfused"]
    assert sorted(row.bottleneck for row in after) == ["choice", "unfused", "unloading"]
    nothing_left = time.monotonic() + 1
    assert asyncio.run(diagnosing._decided(whole, before, nothing_left)) == before


def test_a_settled_load_asks_each_adapter_once_before_it_is_timed(tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    class Heard(Answering):
        async def ask(self, load: Load, block: int, cell: int) -> Turn:
            asked.append(load.names)
            return turn(load, 1.0)

    servers: Any = Heard()
    launch = Launch()
    whole = Pass(setting(), tmp_path, tmp_path, servers, Turns(tmp_path / TURNS), Names("a"), time.monotonic())
    plain = Cell(launch, Load(("a", "b", "a"), 24, (4,)))
    measured = asyncio.run(whole.measure("choice", [[plain], [choice.settled(plain)]]))
    assert sorted(asked) == [("a", "b"), *[("a", "b", "a")] * 2]
    assert measured.blocks_of([plain, choice.settled(plain)]) == 1, "what settles is no turn"
