"""Adapters that come and go on a running server: what is kept, and what never returns, is told."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.faulty_server import Started, started
from helpers.servers import served
from helpers.tiny_models import make_lora

from peftopt.diagnose.records import Row
from peftopt.diagnose.unloading import cycled, cycles, leaks
from peftopt.diagnose.unloading.cycled import Cycled, Step
from peftopt.diagnose.unloading.cycles import Limits
from peftopt.engines import _rows
from peftopt.loadtest.protocols import Prompt, Target
from peftopt.models import hf

PROMPTS = [Prompt(messages=({"role": "user", "content": f"count to {number}"},)) for number in range(3)]
PATIENT = Limits(load_s=300, use_s=300, unload_s=300)
BUDGET_S = 600.0
FEW = 16
"""Cycles that decide, where tests say so."""


@pytest.fixture(scope="module")
def adapters(tiny_base_fp32: Path, tiny_lora: Path) -> list[Path]:
    """Two, of other ranks."""
    other = tiny_base_fp32.parent / "of another rank"
    make_lora(tiny_base_fp32, other, std=0.2, r=16)
    return [tiny_lora, other]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "LOOKS", (FEW,))
    monkeypatch.setattr(leaks, "LEAK_FROM", FEW)


def by_part(rows: Sequence[Row]) -> dict[str, Row]:
    assert {row.bottleneck for row in rows} == {"unloading"}
    return {row.part: row for row in rows}


def nothing(done: int, what: str) -> None:
    """Show nothing."""


@pytest.mark.usefixtures("few")
def test_our_server_frees_what_it_unloads(tiny_base_fp32: Path, adapters: list[Path], tmp_path: Path) -> None:
    with started("none", tiny_base_fp32, tmp_path) as server:
        seen = asyncio.run(cycles.cycles(server, adapters, PROMPTS, BUDGET_S, limits=PATIENT, most=FEW))
        metrics = httpx2.get(f"{server.target.url}/metrics", trust_env=False).text
        listed = httpx2.get(f"{server.target.url}/v1/models", trust_env=False).json()["data"]
    rows = by_part(cycled.rows(seen))
    assert seen.cycles == FEW and len(seen.host) == FEW + 1
    assert rows["memory at rest"].finding in ("no cost", "undecided"), seen.host  # few cycles say it where all is still
    assert rows["load and unload"].finding == "no cost"
    assert not [step for step in seen.steps if step.error]
    assert f'peftopt_server_requests_total{{outcome="left"}} {FEW}.0' in metrics, "in each cycle a client leaves"
    assert [model["id"] for model in listed] == ["base"]


@pytest.mark.usefixtures("few")
def test_a_megabyte_that_each_unload_keeps_is_found(tiny_base_fp32: Path, adapters: list[Path], tmp_path: Path) -> None:
    with started("leak", tiny_base_fp32, tmp_path) as server:
        rows = by_part(asyncio.run(cycles.measure(server, adapters, PROMPTS, BUDGET_S, nothing, PATIENT)))
    row = rows["memory at rest"]
    assert row.finding == "costs" and row.extra and row.unit == "MB a cycle"
    assert 1.5 < row.extra.low <= row.extra.high < 3, "two unloads in each cycle"
    assert "a load, a request and an unload" in row.sentence, "no other kind of use has to come with it"
    assert row.advice


def test_an_unload_that_never_returns_is_an_outcome(tiny_base_fp32: Path, adapters: list[Path], tmp_path: Path) -> None:
    limits = Limits(load_s=300, use_s=300, unload_s=3)
    with started("stuck", tiny_base_fp32, tmp_path) as server:
        rows = by_part(asyncio.run(cycles.measure(server, adapters, PROMPTS, BUDGET_S, nothing, limits)))
    assert {row.finding for row in rows.values()} == {"fault"}
    assert "never returned" in rows["memory at rest"].sentence
    assert "still answered" in rows["load and unload"].sentence


# ---- servers that are no processes of ours -----------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(f"the weights of {name}")
    return [tmp_path / "one", tmp_path / "two"]


def test_without_processes_memory_is_not_asked_and_unloads_are(folders: list[Path]) -> None:
    with served() as server:
        seen = asyncio.run(cycles.cycles(Started(Target(server.url)), folders, PROMPTS, BUDGET_S, most=3))
        asked = [body["model"] for body in server.bodies if body["model"].startswith("peftopt-cycle")]
    rows = by_part(cycled.rows(seen))
    assert rows["memory at rest"].finding == "not asked" and rows["memory at rest"].why
    assert rows["load and unload"].finding == "no cost" and rows["load and unload"].blocks == 3
    assert not server.loaded, "all is unloaded"
    assert len(set(asked)) == 3 and len(asked) == 3 * 4, "a name a cycle, with four requests each"


def test_a_server_that_loads_no_adapters_is_said(folders: list[Path]) -> None:
    with served(loads=False) as server:
        rows = by_part(asyncio.run(cycles.measure(Started(Target(server.url)), folders, PROMPTS, BUDGET_S, nothing)))
    assert rows["load and unload"].finding == "not asked"
    assert "cannot load" in rows["load and unload"].why


def test_each_step_that_is_late_is_named() -> None:
    for what in ("load", "request", "unload under way"):
        seen = Cycled(cycles=4, host=[1.0, 1.0], steps=[Step(what, 9.0, "no answer within 9 s", late=True)])
        rows = by_part(cycled.rows(seen))
        assert rows["load and unload"].finding == "fault" and what in rows["load and unload"].sentence
        memory = rows["memory at rest"].finding
        assert memory == ("fault" if what.startswith("unload") else "undecided")


def test_steps_that_fail_are_a_fault() -> None:
    good, bad = (
        [Step(what, 0.1) for what in ("load", "request", "unload")],
        Step("request", 0.1, "HTTP 500: out of luck"),
    )
    rows = by_part(cycled.rows(Cycled(cycles=2, steps=[*good, *good[:1], bad, *good[2:]])))
    assert rows["load and unload"].finding == "fault" and "out of luck" in rows["load and unload"].sentence


# ---- PEFT in process ---------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"r": 16, "use_dora": True}])
def test_no_tensor_of_an_adapter_outlives_it(tiny_base_fp32: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Not even until objects in cycles are looked for."""
    make_lora(tiny_base_fp32, tmp_path / "adapter", **settings)
    model = _rows.Served(str(tiny_base_fp32), "cpu")
    before = {id(parameter) for parameter in model._owners[-1].parameters()}
    gc.collect()
    gc.disable()
    try:
        for number in range(2):
            name = f"adapter{number}"
            model.add(name, str(tmp_path / "adapter"))
            own = [weakref.ref(each) for each in model._model.parameters() if id(each) not in before]
            assert own
            model.begin([[5, 9, 77]], name).step([8])
            model.remove(name)
            assert not [each for each in own if each() is not None]
    finally:
        gc.enable()


def test_a_load_keeps_no_objects(tiny_base_fp32: Path, tiny_lora: Path) -> None:
    """safetensors' readers of files keep two for each tensor."""
    model = _rows.Served(str(tiny_base_fp32), "cpu")

    def cycle(number: int) -> int:
        model.add(f"adapter{number}", str(tiny_lora))
        model.remove(f"adapter{number}")
        if number >= 20:  # what is imported and compiled at first is there
            gc.collect()
        return sys.getallocatedblocks()

    blocks = [cycle(number) for number in range(31)]
    tensors = len(hf.adapter_weights(str(tiny_lora)))
    assert (blocks[-1] - blocks[20]) / 10 < tensors
