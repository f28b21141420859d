"""The `gguf` transform and the `llamacpp` engine keep their contracts, in their own environment, on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from helpers.asked import ask, ids
from helpers.command_line import command, prompts
from helpers.engine_contract import (  # noqa: F401
    test_a_batch_answers_as_one_by_one_and_exactly_as_long_as_asked,
    test_a_request_longer_than_the_room_makes_room,
    test_each_row_ends_at_its_own_end_of_sequence,
    test_scores_are_those_of_transformers_whatever_the_batch,
)
from helpers.finished_runs import finished_run
from helpers.launched import launched
from helpers.records import lines_of
from helpers.remote_engine import Remote

from peftopt import corpus, environments, plugins
from peftopt.deploy import llamacpp, reading
from peftopt.engines import llamacpp_server
from peftopt.engines._prefix import Reuse
from peftopt.engines._server import free_port
from peftopt.environments.llamacpp import SERVER
from peftopt.errors import BadInput
from peftopt.jobs import Transformed, TransformJob
from peftopt.records import Model, Step
from peftopt.runner import single

ROOT = Path(__file__).parent.parent
BASE, ADAPTER = ROOT / "models" / "smollm2-135m-instruct", ROOT / "demo" / "adapter"
LACKING, HOW = environments.lacking(plugins.catalogue()["llamacpp"])
pytestmark = [pytest.mark.engines, pytest.mark.skipif(bool(LACKING), reason=HOW or "installed")]


def convert(model: Model, out: Path, **params: str) -> Transformed:
    return single.transform(TransformJob(plugin="gguf", params=params, model=model, out=str(out)))


@pytest.fixture(scope="module")
def model(tiny_base_fp32: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The base and its LoRA as GGUF in fp32: greedy answers are then transformers'."""
    out = tmp_path_factory.mktemp("gguf") / "f32"
    convert(Model(str(tiny_base_fp32), (str(tiny_lora),)), out, type="f32")
    return Model(str(out), (str(tiny_lora),))


@pytest.fixture(scope="module")
def engine(model: Model) -> Any:
    remote = Remote("llamacpp", model)
    yield remote
    remote.close()


@pytest.fixture(scope="module")
def eager(tiny_base_fp32: Path, tiny_lora: Path) -> Any:
    plugin = plugins.module("engine", "eager")
    return plugin.open(Model(str(tiny_base_fp32), (str(tiny_lora),)), plugin.Params())


def test_the_folder_says_what_made_it_and_keeps_what_serving_needs(model: Model, tiny_base_fp32: Path) -> None:
    out = Path(model.path)
    said = json.loads((out / "quantization.json").read_text())
    assert said.keys() >= {"method", "libraries", "params", "notices", "verified"}
    assert said["method"] == "gguf" and said["params"]["type"] == "f32"
    assert "splits text in another way" in said["notices"][0]
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / file).read_bytes() == (tiny_base_fp32 / file).read_bytes(), file
    assert len(list((out / "adapters").iterdir())) == 1
    assert not list(out.glob("*.safetensors"))
    with pytest.raises(BadInput, match="already quantized"):
        convert(Model(model.path), out.with_name("twice"))


def test_words_and_answers_are_those_of_transformers(engine: Any, eager: Any) -> None:
    assert ids(engine) == ids(eager)
    message = [{"role": "user", "content": "the fox"}]
    assert engine.encode(message, "five stars") == eager.encode(message, "five stars")
    assert (engine.eos, engine.special_tokens) == (eager.eos, eager.special_tokens)
    assert engine.decode(ids(engine)[0]) == eager.decode(ids(eager)[0])
    assert ask(engine, 16) == ask(eager, 16)
    assert engine.adapter_switch_time > 0 and engine.threads >= 1 and engine.device == "cpu"


def test_an_adapter_that_was_not_converted_is_refused(model: Model, tiny_base: Path, tmp_path: Path) -> None:
    from helpers.tiny_models import make_lora

    make_lora(tiny_base, tmp_path / "other", std=0.2)
    with pytest.raises(RuntimeError, match=r"BadInput.*no GGUF form of adapter"):
        Remote("llamacpp", Model(model.path, (str(tmp_path / "other"),)))


@pytest.fixture(scope="module")
def server(model: Model) -> Any:
    remote = Remote("llamacpp_server", model, slots=2, context=1024)
    yield remote
    remote.close()


def test_its_server_keeps_the_contract(server: Any, engine: Any) -> None:
    assert ids(server) == ids(engine) and server.scores is False
    # what is no text comes without its ids, so of this model's babble only the first tokens can be compared
    assert [answer[0] for answer in ask(server, 16)] == [answer[0] for answer in ask(engine, 16)]
    for answer in server.generate(ids(server), 24, False):
        assert len(answer.tokens) == len(answer.times) == 24 and answer.times == sorted(answer.times)
    assert len(server.processes()) == 1 and server.device == "cpu"
    assert "2 slots" in server.facts()["log"][0]
    played = server.load(ids(server), 8, False, [0.0, 0.0, 0.01], 0)
    assert [r["new_tokens"] for r in played["requests"]] == [8, 8, 8] and not played["stopped"]
    (pid,) = server.processes()
    server.close_engine()
    assert not psutil.pid_exists(pid)


def test_its_server_reuses_what_prompts_share_and_tells_how_much(model: Model) -> None:
    """With the adapter apart, on slots of its own and, once others have taken these, from its memory."""
    several = Remote("llamacpp_server", model, slots=2), Remote("llamacpp_server", model, reuse=Reuse(), slots=2)
    plain, reusing = several
    system, others = list(range(5, 90)), [[20 + n] * 40 for n in range(3)]
    try:
        for tail, there in (([3, 4, 5], 0), ([6, 7], 85), ([8] * 20, 85)):
            (wanted,), (answer,) = (each.generate([system + tail], 8, False) for each in several)
            assert answer.tokens == wanted.tokens and (answer.reused, wanted.reused) == (there, None)
        reusing.generate(others, 2, False)
        assert reusing.generate([[*system, 9]], 2, False)[0].reused == 85
        played = [each.load([[*system, 9, n] for n in range(3)], 4, False, [0.0] * 3, 1) for each in several]
        assert [r["reused"] for r in played[0]["requests"]] == [None] * 3
        assert all(r["reused"] >= 85 for r in played[1]["requests"])
        assert "1024 MiB" in reusing.facts()["log"][1] and len(plain.facts()["log"]) == 1
    finally:
        for each in several:
            each.close()


@pytest.mark.skipif(not BASE.exists(), reason="make models")
def test_its_server_answers_as_the_library_does_with_the_adapter_on_top(tmp_path: Path) -> None:
    model = Model(str(tmp_path / "q8"), (str(ADAPTER),))
    convert(Model(str(BASE), (str(ADAPTER),)), tmp_path / "q8", type="q8_0")
    rows = [row for row in corpus.read(str(ROOT / "demo" / "data" / "eval.jsonl")) if "short" in row.slices][:5]
    found = []
    for engine in (Remote("llamacpp", model), Remote("llamacpp_server", model, slots=2)):
        prompts = [engine.encode(row.messages)[0] for row in rows]
        found.append(engine.generate(prompts, 64, True))
        engine.close()
    library, server = found
    assert [answer.tokens for answer in server] == [answer.tokens for answer in library]
    assert all(answer.stopped and len(answer.times) == len(answer.tokens) for answer in server)


def test_a_server_that_cannot_start_says_why(model: Model, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"server died.*unknown argument|invalid argument"):
        Remote("llamacpp_server", model, args="--no-such-option")
    with pytest.raises(RuntimeError, match=r"BadInput.*holds no"):
        Remote("llamacpp_server", Model(str(tmp_path)))


def test_four_bits_by_hand_beside_the_adapter_in_transformers(
    tiny_base: Path,
    tiny_lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    questions = prompts(tmp_path / "eval.jsonl", 4, "eval")
    assert command("quantize", "--method", "gguf", "--type", "q4_k_m", "--model", tiny_base, "--out", "q4") == 0
    said = json.loads((tmp_path / "q4" / "quantization.json").read_text())
    assert "multiple of 256" in said["notices"][0] and "64" in said["notices"][0]
    capsys.readouterr()
    models = ("--model", tiny_base, "--model", "q4", "--engine", "eager", "--engine", "llamacpp")
    arguments = ("--adapter", tiny_lora, "--prompts", questions, "--new-tokens", 3, "--blocks", 2, "--batch", 2)
    assert command("bench", *models, *arguments, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["models"]
    assert first["ratio"] is None and second["ratio"]["n"] == 2
    assert all(r["new_tokens"] == 6 for turn in second["turns"] for r in turn)
    assert command("bench", "--model", "q4", "--prompts", questions) == 2
    assert "use --engine llamacpp" in capsys.readouterr().err
    assert command("quantize", "--method", "gguf", "--type", "q4_7", "--model", tiny_base, "--out", "x") == 2
    assert "q4_1" in capsys.readouterr().err


def test_a_recipe_s_own_servers_are_started_for_a_load_one_after_the_other(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, recipe, results = prompts(tmp_path / "eval.jsonl", 6, "chat"), tmp_path / "load.yaml", tmp_path / "results"
    recipe.write_text(
        f"model: {{base: {tiny_base}, adapter: {tiny_lora}}}\n"
        f"workloads:\n  peak: {{prompts: {asked}, slice: short, new_tokens: 200, batch: 2}}\n"
        "variants:\n  adapter: []\n"
        "  apart: [{gguf: {type: f16}}, {engine: {llamacpp_server: {slots: 2, context: 512}}}]\n"
        "  one: [merge, {gguf: {type: f16}}, {engine: {llamacpp_server: {slots: 3, context: 512}}}]\n"
        "minimize: latency.p50@peak\n"
    )
    out = tmp_path / "measurements.jsonl"
    assert command("load", recipe, "--results", results, "--out", out) == 0
    printed = capsys.readouterr()
    assert "of 2 slots" in printed.out and "of 3 slots" in printed.out, "a server of ours has told its slots"
    kept = lines_of(out)
    assert [(m.variant, m.workload, len(m.values["requests"])) for m in kept] == [
        ("apart", "peak", 33),
        ("one", "peak", 33),
    ]
    assert {r["id"] for m in kept for r in m.values["requests"]} == {"chat-1", "chat-3", "chat-5"}
    left = [p for p in psutil.process_iter(["cmdline"]) if str(results) in " ".join(p.info["cmdline"] or ())]
    assert not left, "the servers are gone"
    assert command("load", recipe, "--results", results, "--variant", "one", "--requests", "3") == 0
    assert "cached" in capsys.readouterr().err, "what a load has built, the next finds"


def test_an_exported_script_starts_a_server_that_answers(
    model: Model, tiny_base_fp32: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    """With the adapter apart, by the options of a run on this server, all of which the server has."""
    eager = reading.chosen(finished_run(tmp_path, tiny_base_fp32, tiny_lora, built=False), "adapter")
    engine = Step("llamacpp_server", "engine", "", {"slots": 2, "context": 512})
    decided = replace(eager.decided, model=model, measured_on=engine, params=engine.params)
    chosen = replace(eager, decided=decided, format="gguf", scaled=llamacpp_server.scaled(model), amx=True)
    (file,) = llamacpp.exported(chosen).files
    (tmp_path / file.name).write_text(file.text)
    (binary,) = Path(environments.python("llamacpp")).parent.parent.glob(
        f"lib/python*/site-packages/llama_cpp/{SERVER}"
    )
    port = free_port()
    variables = {"LLAMA_SERVER": str(binary), "PORT": str(port)}
    body = {"model": "lora", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 4}
    with launched(["bash", tmp_path / file.name], port, variables=variables) as url:
        applied = httpx2.get(f"{url}/lora-adapters", trust_env=False).json()
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 4 and [each["scale"] for each in applied] == [1.0]
    printed = subprocess.run([binary, "--help"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"--[a-z][a-z-]+", file.text.partition("set -euo")[2])) <= set(
        re.findall(r"--[a-z][a-z-]+", printed)
    )
