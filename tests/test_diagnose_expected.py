"""What an adapter's arithmetic explains of its cost, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_models import make_lora
from hypothesis import given
from hypothesis import strategies as st

from peftopt.diagnose.rows import expected
from peftopt.diagnose.rows.expected import Matrices, Times, Work
from peftopt.models.checkpoint import Entry

HIDDEN, WIDE, WORDS = 64, 128, 400
BLOCKS = 10


def base(layers: int = 2, dtype: str = "F32", head: bool = False) -> list[Entry]:
    """A model of square and of wide matrices, with norms and an embedding that is the head too, unless it has one."""
    entries = [Entry("model.embed_tokens.weight", dtype, (WORDS, HIDDEN)), Entry("model.norm.weight", dtype, (HIDDEN,))]
    for layer in range(layers):
        entries.append(Entry(f"model.layers.{layer}.q_proj.weight", dtype, (HIDDEN, HIDDEN)))
        entries.append(Entry(f"model.layers.{layer}.up_proj.weight", dtype, (WIDE, HIDDEN)))
    return [*entries, Entry("lm_head.weight", dtype, (WORDS, HIDDEN))] if head else entries


def lora(rank: int, layers: int = 2, dtype: str = "F32") -> dict[str, tuple[Entry, Entry]]:
    """A pair on every square matrix."""
    modules = [f"model.layers.{layer}.q_proj" for layer in range(layers)]
    return {
        name: (Entry(f"{name}.A", dtype, (rank, HIDDEN)), Entry(f"{name}.B", dtype, (HIDDEN, rank))) for name in modules
    }


def of(rank: int, **settings: int) -> Work:
    found = expected.work(base(**settings), lora(rank, **settings))
    assert found
    return found


# ---- shapes ------------------------------------------------------------------------------------


def test_the_share_is_the_adapters_items_of_those_that_a_pass_multiplies_by() -> None:
    work = of(4)
    layers, adapter = 2 * (HIDDEN * HIDDEN + HIDDEN * WIDE), 2 * 4 * (HIDDEN + HIDDEN)
    assert work.share("prefill") == pytest.approx(adapter / layers)
    assert work.share("decode") == pytest.approx(adapter / (layers + WORDS * HIDDEN))
    assert work.dense("prefill") == pytest.approx(1 / 3)
    assert (work.rank, work.modules) == (4, 2)


@given(st.integers(1, 512), st.integers(1, 8))
def test_twice_the_rank_needs_twice_as_much_and_half_the_width_as_much_as_a_whole_matrix(rank: int, more: int) -> None:
    assert of(rank * more).share("prefill") == pytest.approx(more * of(rank).share("prefill"))
    half = of(HIDDEN // 2)
    assert half.share("decode") == pytest.approx(half.dense("decode"))


def test_a_head_of_its_own_takes_the_place_of_the_embedding() -> None:
    tied, own = expected.work(base(), lora(4)), expected.work(base(head=True), lora(4))
    assert tied and own
    assert tied.head == own.head


def test_an_adapter_in_more_bytes_an_item_than_the_base_needs_more_of_a_step_that_waits_for_memory() -> None:
    plain, fp32 = expected.work(base(dtype="BF16"), lora(4, dtype="BF16")), expected.work(base(dtype="BF16"), lora(4))
    assert plain and fp32
    assert fp32.share("decode") == pytest.approx(2 * plain.share("decode"))


def test_modules_that_the_base_does_not_have_explain_nothing() -> None:
    assert expected.work(base(layers=1), lora(4, layers=2)) is None


def test_a_folders_headers_tell_it(tiny_base: Path, tiny_lora: Path) -> None:
    work = expected.read(tiny_base, tiny_lora)
    assert work
    assert (work.rank, work.modules) == (4, 2 * 7)
    assert work.adapted == work.layers, "every linear layer is adapted"
    assert 0 < work.share("decode") < work.dense("decode") < 1


def test_experts_and_adapters_that_are_not_plain_lora_are_not_told(tiny_base: Path, tmp_path: Path) -> None:
    make_lora(tiny_base, tmp_path / "dora", use_dora=True)
    assert expected.read(tiny_base, tmp_path / "dora") is None
    routed = tmp_path / "routed"
    routed.mkdir()
    (routed / "config.json").write_text(json.dumps({"num_local_experts": 4}))
    make_lora(tiny_base, tmp_path / "plain")
    assert expected.read(routed, tmp_path / "plain") is None


# ---- times -------------------------------------------------------------------------------------

WORK = Work(Matrices(1000, 4000), Matrices(200, 800), Matrices(40, 160), Matrices(900, 3600), 28, 8)
"""Rank 8: 4 % of a prefill. One more product of each adapted matrix: 90 %."""

NOISE = st.lists(st.floats(0.99, 1.01), min_size=BLOCKS, max_size=BLOCKS)


def times(extra: float, around: float, noise: list[float], base_ms: float = 100.0, step_ms: float = 5.0) -> Times:
    """A prefill that computes a share `extra` more, and `around` ms in every pass that do not depend on its tokens."""
    prefill = [base_ms * (1 + extra) + around] * len(noise)
    return Times(
        base_prefill=[base_ms] * len(noise),
        prefill=[ms * factor for ms, factor in zip(prefill, noise, strict=True)],
        base_step=[step_ms] * len(noise),
        step=[step_ms + around] * len(noise),
    )


def reason(extra: float, around: float = 0.0, noise: list[float] | None = None, padded: float | None = None) -> str:
    measured = times(extra, around, noise or [1.0] * BLOCKS)
    padding = [100.0 * (padded - extra)] * BLOCKS if padded is not None else []
    return expected.judged(WORK, measured, padding, 64).reason


@given(st.floats(0, 0.4), st.floats(0, 200), NOISE)
def test_a_lora_is_called_its_own_whatever_small_matmuls_cost_around_it(
    extra: float, around: float, noise: list[float]
) -> None:
    assert reason(extra, around, noise) == "its own"


@given(st.floats(0.6, 3), st.floats(0, 20), NOISE)
def test_a_product_of_the_layers_size_is_more_than_a_lora_needs(
    extra: float, around: float, noise: list[float]
) -> None:
    assert reason(extra, around, noise) == "more work"


def test_padding_that_costs_nothing_though_it_should_was_there_before() -> None:
    assert reason(1.2, padded=1.2) == "padded rank"
    assert reason(1.2, padded=1.2 + 7 * WORK.share("prefill")) == "more work"
    assert reason(0.1, padded=0.1) == "its own"


def test_adapters_that_take_far_more_memory_than_their_files_are_padded() -> None:
    measured = times(1.2, 0.0, [1.0] * BLOCKS)
    assert expected.judged(WORK, measured, swollen=True).reason == "padded rank"
    assert expected.judged(WORK, times(0.2, 0.0, [1.0] * BLOCKS), swollen=True).reason == "its own"
    assert expected.swollen(257e6, 14e6), "eight adapters of rank 8, padded to 256"
    assert not expected.swollen(87e6 + 14e6, 14e6)
    assert not expected.swollen(2 * 1e9, 1e9), "bf16 held as fp32"


def test_too_few_blocks_accuse_nobody() -> None:
    measured = times(2.0, 0.0, [1.0] * (BLOCKS - 1))
    assert expected.judged(WORK, measured).reason == "its own"


def test_a_row_names_the_rank_that_would_cost_as_much_and_what_to_do() -> None:
    row = expected.row(WORK, "support", 8, expected.judged(WORK, times(1.2, 0.0, [1.0] * BLOCKS), [0.0] * BLOCKS, 64))
    assert row
    assert (row.bottleneck, row.part, row.finding, row.batch) == ("unfused", "padded rank", "fault", 8)
    assert "240" in row.sentence and "rank 8" in row.sentence
    assert row.advice
    assert row.ratio and row.ratio.estimate == pytest.approx(2.2)


def test_no_row_for_a_lora_that_does_its_own_work() -> None:
    assert expected.row(WORK, "support", 8, expected.judged(WORK, times(0.2, 3.0, [1.0] * BLOCKS))) is None


def test_what_arithmetic_explains_is_told_beside_what_it_costs() -> None:
    costly, cheap = expected.explained(WORK, "prefill", 1.6), expected.explained(WORK, "prefill", 1.02)
    assert "4.0 %" in costly and "60 %" in costly and "merge" in costly
    assert "4.0 %" in cheap and "merge" not in cheap
