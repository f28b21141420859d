"""Planted faults do what they say, and the benchmark tells a fault that was found from one that was not."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.launched import launched

from peftopt.diagnose.records import Diagnosis, Row
from peftopt.engines import _rows
from peftopt.engines._server import free_port
from peftopt.models.adapter import open_adapter
from peftopt.records import Interval
from peftopt.server.scheduler import Scheduler

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FAULTS = runpy.run_path(str(BENCHMARKS / "faulty" / "faults.py"))
PROMPT = [5, 9, 77, 30]


def faulty(name: str, base: Path) -> Any:
    """A model of a class of its own that has the fault."""
    served = type("Faulty", (_rows.Served,), {})
    FAULTS["FAULTS"][name](served, type("Unasked", (), {}))
    return served(str(base), "cpu")


def says(model: Any, adapter: str) -> Any:
    """What is next after a prompt."""
    return model.begin([PROMPT], adapter).logits


@pytest.fixture(scope="module")
def soft_prompt(tiny_base_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_base_fp32)
    adapted = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    folder = tmp_path_factory.mktemp("soft") / "prompt"
    adapted.save_pretrained(folder)
    return folder


# ---- the faults --------------------------------------------------------------------------------


def test_an_extra_matmul_is_computed_at_every_adapted_layer_and_changes_no_answer(
    tiny_base_fp32: Path, tiny_lora: Path
) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counted = []
    answers = []
    for model in (_rows.Served(str(tiny_base_fp32), "cpu"), faulty("extra-matmul", tiny_base_fp32)):
        model.add("one", str(tiny_lora))
        for name in ("", "one"):
            with FlopCounterMode(display=False) as flops:
                answers.append(says(model, name))
            counted.append(flops.get_total_flops())
    clean_base, clean, base, extra = counted
    layers = sum(entry.items for entry in weights(tiny_base_fp32) if "layers" in entry.name and len(entry.shape) == 2)
    assert base == clean_base
    assert extra - clean == 2 * len(PROMPT) * layers
    assert torch.equal(answers[1], answers[3])


def weights(base: Path) -> Any:
    from peftopt.models.checkpoint import open_model

    return open_model(base).entries.values()


def test_a_padded_rank_multiplies_zeros_and_changes_no_answer(tiny_base_fp32: Path, tiny_lora: Path) -> None:
    clean, padded = _rows.Served(str(tiny_base_fp32), "cpu"), faulty("padded-rank", tiny_base_fp32)
    for model in (clean, padded):
        model.add("one", str(tiny_lora))
    ranks = {layer.r["one"] for layer in FAULTS["adapted_layers"](padded)}
    assert ranks == {FAULTS["PADDED_RANK"]}
    assert says(padded, "one").sub(says(clean, "one")).abs().max() < 1e-4
    assert open_adapter(tiny_lora).config["r"] == 4, "the user's folder is left as it is"


def test_beyond_four_live_adapters_each_request_of_another_loads(tiny_base_fp32: Path, tiny_lora: Path) -> None:
    model = faulty("slot-cliff", tiny_base_fp32)
    loads = []
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        model.add(name, str(tiny_lora))
    attach = _rows.hf.attach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rows.hf, "attach", lambda *args, **more: loads.append(args[2]) or attach(*args, **more))
        for name in [*names[:4], *names[:4]]:
            says(model, name)
        assert loads == [], "four fit"
        for name in [*names, *names]:
            says(model, name)
    assert len(loads) == 1 + len(names), "the fifth, and then each, since the one that comes next was evicted last"
    model.remove("a")
    says(model, "b")


def test_each_unload_keeps_a_megabyte(tiny_base_fp32: Path, tiny_lora: Path) -> None:
    model = faulty("leak", tiny_base_fp32)
    for _ in range(3):
        model.add("one", str(tiny_lora))
        model.remove("one")
    assert sum(map(len, model.kept)) == 3 * 2**20


def test_a_soft_prompt_that_is_not_injected_answers_as_the_base(tiny_base_fp32: Path, soft_prompt: Path) -> None:
    import torch

    clean, silent = _rows.Served(str(tiny_base_fp32), "cpu"), faulty("silent-prompt", tiny_base_fp32)
    for model in (clean, silent):
        model.add("tone", str(soft_prompt))
    assert not torch.allclose(says(clean, "tone"), says(clean, ""), atol=1e-3)
    assert torch.equal(says(silent, "tone"), says(silent, ""))
    rows = silent.begin([PROMPT], "tone")
    rows.step([7])
    assert rows.logits.shape[0] == 1


def test_an_unload_never_returns() -> None:
    scheduler = type("Stuck", (Scheduler,), {})
    FAULTS["FAULTS"]["stuck-unload"](type("Unasked", (), {}), scheduler)

    async def waits() -> bool:
        unload = asyncio.ensure_future(scheduler.unload(object(), "one"))  # type: ignore[attr-defined]
        done, _ = await asyncio.wait([unload], timeout=0.05)
        unload.cancel()
        return not done

    assert asyncio.run(waits())


# ---- the server that has one -------------------------------------------------------------------


def variables(fault: str) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS / "faulty"), str(BENCHMARKS.parent)]), "PLANTED_FAULT": fault}


@pytest.mark.fresh_workers
def test_a_server_gets_its_fault_from_outside(tiny_base_fp32: Path, tiny_lora: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "peftopt.server", "--base", tiny_base_fp32, "--port", port]
    with (
        launched([*command, "--adapter", f"one={tiny_lora}"], port, variables=variables("stuck-unload")) as url,
        httpx2.Client(base_url=url, trust_env=False, timeout=60.0) as http,
    ):
        with pytest.raises(httpx2.ReadTimeout):
            http.post("/v1/unload_lora_adapter", json={"lora_name": "one"}, timeout=1.0)
        asked = {"model": "one", "prompt": PROMPT, "max_tokens": 2}
        assert http.post("/v1/completions", json=asked).status_code == 200


@pytest.mark.parametrize(("module", "said"), [("peftopt.server", True), ("json.tool", False)])
def test_only_our_server_is_touched_and_an_unknown_fault_starts_none(module: str, said: bool) -> None:
    command = [sys.executable, "-m", module, "--help"]
    environment = {**os.environ, **variables("no-such-fault")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode != 0) == said
    assert ("no-such-fault" in ended.stderr) == said


# ---- the judge ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> Iterator[dict[str, Any]]:
    path = list(sys.path)
    yield runpy.run_path(str(BENCHMARKS / "planted.py"))
    sys.path[:] = path


ROW = Row(bottleneck="unfused", part="the adapter", phase="prefill", batch=1, finding="costs", sentence="it costs")
SURE = Interval(1.5, 1.4, 1.6, 10)


def diagnosis(*rows: Row) -> Diagnosis:
    return Diagnosis(
        rows=rows, engine="eager", base="b", adapters=("a",), threads=2, seconds=9.0, usual_request_ms=SURE
    )


def shown(planted: dict[str, Any], fault: str) -> Row:
    row = planted["SHOWN"][fault]
    return replace(ROW, bottleneck=row.bottleneck, part=row.parts[0], finding=row.finding)


def test_a_fault_is_found_by_its_own_row_alone(planted: dict[str, Any]) -> None:
    assert planted["SHOWN"].keys() == FAULTS["FAULTS"].keys()
    for fault in planted["SHOWN"]:
        own = shown(planted, fault)
        for other in planted["SHOWN"]:
            assert (planted["row_of"](other, diagnosis(ROW, own)) == own) == (other == fault)
        assert planted["row_of"](fault, diagnosis(replace(own, finding="undecided"))) is None


def test_a_clean_run_may_name_costs_and_no_fault(planted: dict[str, Any]) -> None:
    accusations = planted["accusations"]
    assert accusations(diagnosis(ROW)) == []
    for fault in planted["SHOWN"]:
        own = shown(planted, fault)
        assert accusations(diagnosis(ROW, own)) == [own]
        assert accusations(diagnosis(ROW, own), fault) == []
        assert accusations(diagnosis(replace(own, finding="no cost"))) == []
    beside = replace(ROW, bottleneck="unloading", part="memory at rest", finding="fault")
    assert accusations(diagnosis(beside), "stuck-unload") == []
    assert accusations(diagnosis(beside), "slot-cliff") == [beside]


def test_the_other_clean_runs_are_the_truth_about_a_cost(planted: dict[str, Any]) -> None:
    def run(ratio: float, finding: Any) -> Diagnosis:
        return diagnosis(replace(ROW, ratio=replace(SURE, estimate=ratio), finding=finding))

    costly, free = [run(1.4 + 0.01 * n, "costs") for n in range(8)], [run(1 + 0.001 * n, "no cost") for n in range(8)]
    contradictions = planted["contradictions"]
    assert contradictions(run(1.5, "costs"), costly) == []
    assert contradictions(run(1.3, "undecided"), costly) == []
    assert len(contradictions(run(1.0, "no cost"), costly)) == 1
    assert contradictions(run(1.0, "no cost"), free) == []
    assert len(contradictions(run(1.3, "costs"), free)) == 1
    assert contradictions(run(1.3, "costs"), free[:2]) == [], "two runs are not the truth"


def test_the_report_counts_what_was_found(planted: dict[str, Any], tmp_path: Path) -> None:
    from peftopt.diagnose import keeping

    (tmp_path / planted["ORDER"]).write_text(json.dumps(["leak", "", "slot-cliff", ""]))
    told = [shown(planted, "leak"), ROW, ROW, shown(planted, "stuck-unload")]
    for number, row in enumerate(told):
        folder = tmp_path / f"run-{number:02}"
        folder.mkdir()
        keeping.write(diagnosis(row), folder)
    lines = list(planted["report"](tmp_path))
    assert "1 of 2" in lines[-1] and "1 of 2" in lines[-1].partition("clean")[2]
