"""The engine `vllm` keeps the engines' contract on the real server; its command line and its refusals need none."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from helpers import packed
from helpers.command_line import command
from helpers.finished_runs import finished_run, on_engine
from helpers.launched import launched
from helpers.remote_engine import Remote
from helpers.tiny_models import make_lora, make_prompt

from peftopt import corpus, environments, plugins
from peftopt.deploy import monitoring, reading
from peftopt.deploy import vllm as script
from peftopt.deploy.monitoring.sources import VLLM, le
from peftopt.engines import TOP_K, Scores, vllm
from peftopt.engines._prefix import Reuse
from peftopt.engines.eager import shared_prefix
from peftopt.errors import BadInput
from peftopt.loadtest.arrivals import SERVE_CHECK, SERVE_LOG
from peftopt.records import Model, Step
from peftopt.runner import preflight
from peftopt.transforms import bake
from peftopt.watch.promise import Bound, Promise

ROOT = Path(__file__).parent.parent
BASE, ADAPTER = ROOT / "models" / "smollm2-135m-instruct", ROOT / "demo" / "adapter"
LACKING, HOW = environments.lacking(plugins.catalogue()["vllm"])
QUESTIONS = ("My blender JU-88649 never came. I want my 821.49 EUR back!", "Hola, ¿dónde está mi silla?", "Hi")
there = pytest.mark.skipif(bool(LACKING) or not BASE.exists(), reason=HOW or "make models")


def real(test: Any) -> Any:
    return pytest.mark.engines(there(test))


def arguments(model: Model, **params: Any) -> str:
    return " ".join(vllm.command(model, vllm.Params(**params), 8123, [vllm.name_of(a) for a in model.adapters])[0])


# ---- without a server --------------------------------------------------------------------------


def test_its_command_line_names_the_model_its_adapter_and_a_rank_that_vllm_knows(
    tiny_base: Path, tiny_lora: Path
) -> None:
    merged = arguments(Model(str(tiny_base)))
    assert f"serve {tiny_base} " in merged and "--port 8123" in merged and "--enforce-eager" in merged
    assert "lora" not in merged and "--no-enable-prefix-caching" in merged
    served = arguments(Model(str(tiny_base), (str(tiny_lora),)), compile=True, max_loras=2, max_num_seqs=8)
    assert "--enable-lora --max-lora-rank 8 --max-loras 2" in served, "rank 4 is not one of vLLM's"
    assert f"--lora-modules {tiny_lora.name}={tiny_lora}" in served
    assert "--enforce-eager" not in served and "--max-num-seqs 8" in served
    assert arguments(Model(str(tiny_base)), args="--dtype float32").endswith("--dtype float32")


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "no kernels for bitsandbytes on a CPU"),
        ({"config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}}}, "no kernels for FP8 on a CPU"),
    ],
)
def test_a_format_without_kernels_on_a_cpu_is_refused_before_a_server_starts(
    quantization: dict[str, Any], says: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**json.loads((tiny_base / "config.json").read_text()), "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(vllm, "_has_cuda", lambda: False)
    with pytest.raises(BadInput, match=says):
        vllm.open(Model(str(tmp_path)), vllm.Params())
    assert vllm.without_kernels(str(tiny_base)) == ""
    integers = {"config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4}}}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": integers}))
    assert vllm.without_kernels(str(tmp_path)) == ""


def test_a_server_takes_so_much_memory_for_keys_and_values_or_a_share_of_a_gpu(tiny_base: Path) -> None:
    beside_others = arguments(Model(str(tiny_base)), kv_cache_gb=4)
    assert "--kv-cache-memory-bytes 4294967296" in beside_others
    assert "--gpu-memory-utilization 0.01" in beside_others, "vLLM's own share would refuse the second one on a GPU"
    alone = arguments(Model(str(tiny_base)), gpu_memory=0.9)
    assert "--gpu-memory-utilization 0.9" in alone and "--kv-cache" not in alone


@pytest.mark.parametrize(
    ("change", "says"),
    [({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"r": 1000}, "rank 512")],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused_before_it_starts(
    change: dict[str, Any], says: str, tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_lora, tmp_path / "odd")
    config = tmp_path / "odd" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(BadInput, match=says) as caught:
        arguments(Model(str(tiny_base), (str(tmp_path / "odd"),)))
    assert "merge it" in caught.value.hint
    with pytest.raises(BadInput, match="one adapter"):
        vllm.open(Model(str(tiny_base), (str(tiny_lora), str(tiny_lora))), vllm.Params())


def test_prompt_log_probabilities_become_scores() -> None:
    first = {"7": {"logprob": -0.1, "rank": 1}, "9": {"logprob": -2.5, "rank": 2}, "4": {"logprob": -9.0, "rank": 300}}
    second = {"2": {"logprob": -0.7, "rank": 2}, "3": {"logprob": -0.6, "rank": 1}}
    found = vllm.scores([first, second], [4, 2])
    assert found.logprobs == [-9.0, -0.7] and found.best == [7, 3] and found.finite
    assert found.top_ids == [[7, 9], [3, 2]] and found.top_logprobs == [[-0.1, -2.5], [-0.6, -0.7]]


def test_serve_refuses_what_cannot_be_served(
    tiny_base: Path,
    tiny_lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    twice = ("--adapter", tiny_lora, "--adapter", tiny_lora)
    assert command("serve", "--base", tiny_base, *twice) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err
    monkeypatch.setenv("PEFTOPT_ENVIRONMENTS", str(tmp_path))
    assert command("serve", "--engine-only", "--base", tiny_base) == 4
    assert "peftopt env install vllm" in capsys.readouterr().err
    (tmp_path / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "vllm" / "bin" / "python").symlink_to(sys.executable)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert command("serve", "--engine-only", "--base", tiny_base, "--port", taken.getsockname()[1]) == 4
    assert "is taken" in capsys.readouterr().err


# ---- the real server ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Any:
    remote = Remote("vllm", Model(str(BASE), (str(ADAPTER),)), max_model_len=1024)
    yield remote
    remote.close()


@pytest.fixture(scope="module")
def eager() -> Any:
    plugin = plugins.module("engine", "eager")
    return plugin.open(Model(str(BASE), (str(ADAPTER),)), plugin.Params())


def ids(engine: Any) -> list[list[int]]:
    return [engine.encode([{"role": "user", "content": text}])[0] for text in QUESTIONS]


def gap(one: list[Scores], other: list[Scores]) -> float:
    """The mean difference of log-probabilities, in nats."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a.logprobs, b.logprobs, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@real
def test_words_and_predictions_are_those_of_transformers(engine: Any, eager: Any) -> None:
    assert ids(engine) == ids(eager)
    assert (engine.eos, engine.special_tokens) == (eager.eos, eager.special_tokens)
    questions = ids(engine)
    answers = [g.tokens for g in eager.generate(questions, 12, False)]
    found, theirs = engine.score(questions, answers), eager.score(questions, answers)
    assert gap(found, theirs) < 0.1, "bf16 summed in another order; another adapter is nats away"
    same = [a == b for f, t in zip(found, theirs, strict=True) for a, b in zip(f.best, t.best, strict=True)]
    assert sum(same) / len(same) > 0.9
    for one in found:
        assert one.finite and [row[0] for row in one.top_ids] == one.best
        assert all(len(row) == TOP_K and row == sorted(row, reverse=True) for row in one.top_logprobs)


@real
def test_a_batch_is_exactly_as_long_as_asked_and_ends_by_itself_where_it_may(engine: Any) -> None:
    for answer in engine.generate(ids(engine), 24, False):
        assert len(answer.tokens) == len(answer.times) == 24 and not answer.stopped
        assert answer.times == sorted(answer.times)
    row = corpus.read(str(ROOT / "demo" / "data" / "eval.jsonl"), "short")[0]
    (answer,) = engine.generate([engine.encode(row.messages)[0]], 64, True)
    assert answer.stopped and answer.tokens[-1] in engine.eos
    found, wanted = json.loads(engine.decode(answer.tokens)), json.loads(row.expected)
    assert (found.keys(), found["order"]) == (wanted.keys(), wanted["order"]), "the adapter is at work"


@real
@pytest.mark.parametrize("made", [packed.autogptq, packed.autoawq])
def test_checkpoints_of_autogptq_and_autoawq_are_read_by_vllm_itself(made: Any, tmp_path: Path) -> None:
    """transformers needs GPTQModel for them, which need not be here."""
    folder, same = made(BASE, tmp_path)
    preflight.check_base(folder, quantized=True, ours=False)
    plugin = plugins.module("engine", "eager")
    plain, base = (plugin.open(Model(str(each)), plugin.Params()) for each in (same, BASE))
    remote = Remote("vllm", Model(str(folder)), max_model_len=1024)
    try:
        questions = ids(plain)
        answers = [g.tokens for g in plain.generate(questions, 24, False)]
        found, packed_, whole = (each.score(questions, answers) for each in (remote, plain, base))
    finally:
        remote.close()
    own, quantizers = gap(found, packed_), gap(whole, packed_)
    assert own < quantizers / 2 and own < 0.25, (own, quantizers)


@real
def test_virtual_tokens_as_words_are_served_as_the_live_adapter(tmp_path: Path) -> None:
    live = Model(str(BASE), (str(make_prompt(BASE, tmp_path / "prompt", "prompt", tokens=40)),))
    copy = bake.transform(live, bake.Params(target="vllm", certify="own"), tmp_path / "words", [], 0)
    plugin = plugins.module("engine", "eager")
    theirs, base = (plugin.open(model, plugin.Params()) for model in (live, Model(str(BASE))))
    remote = Remote("vllm", copy, max_model_len=1024, prefix_caching=True, args="--block-size 32")
    try:
        questions = ids(theirs)
        assert [question[40:] for question in ids(remote)] == questions
        answers = [g.tokens for g in theirs.generate(questions, 24, False)]
        exact, plain = (each.score(questions, answers) for each in (theirs, base))
        for _ in range(2):  # the second time the words' keys and values are in vLLM's prefix cache
            assert gap(remote.score(ids(remote), answers), exact) < min(0.1, gap(plain, exact) / 4)
    finally:
        remote.close()


@real
def test_it_reuses_what_prompts_share_and_tells_how_much(engine: Any) -> None:
    """Whole blocks of its cache. Answers are those of a server that reuses nothing, and says nothing of it."""
    model = Model(str(BASE), (str(ADAPTER),))
    remote = Remote("vllm", model, reuse=Reuse(), max_model_len=1024, args="--block-size 32")
    messages = [[{"role": "system", "content": "Be brief. " * 40}, {"role": "user", "content": q}] for q in QUESTIONS]
    prompts = [engine.encode(each)[0] for each in messages]
    whole = shared_prefix(prompts) // 32 * 32
    try:
        wanted = [engine.generate([prompt], 6, False)[0] for prompt in prompts]
        answers = [remote.generate([prompt], 6, False)[0] for prompt in prompts]
        assert whole > 96 and [answer.reused for answer in answers] == [0, whole, whole]
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in wanted]
        assert not any(answer.reused is not None for answer in wanted)
        played = remote.load(prompts, 4, False, [0.0] * len(prompts), 1)
        assert all(request["reused"] >= whole for request in played["requests"])
        assert "KV cache of 1 GiB" in remote.facts()["log"][1]
    finally:
        remote.close()


@real
def test_another_adapter_takes_its_place(engine: Any, tmp_path: Path) -> None:
    from helpers.tiny_models import make_lora

    (question, *_), target = ids(engine), tmp_path / "other"
    make_lora(BASE, target, std=0.05)
    (before,) = engine.generate([question], 12, False)
    try:
        assert engine.switch(str(target)) > 0
        (other,) = engine.generate([question], 12, False)
    finally:
        engine.switch(str(ADAPTER))
    (after,) = engine.generate([question], 12, False)
    assert other.tokens != before.tokens == after.tokens


@real
def test_the_server_is_counted_while_it_lives_and_gone_afterwards(engine: Any) -> None:
    processes = engine.processes()
    assert sum(psutil.Process(pid).memory_info().rss for pid in processes) > BASE.stat().st_size
    engine._call("call", "close")
    assert not any(map(psutil.pid_exists, processes))


@real
def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)server died.*unrecognized arguments: --no-such-thing"):
        Remote("vllm", Model(str(BASE)), args="--no-such-thing")
    assert not [p for p in psutil.process_iter(["cmdline"]) if "--no-such-thing" in (p.info["cmdline"] or ())]


@contextlib.contextmanager
def serving(folder: Path, *flags: object) -> Iterator[str]:
    """The URL of vLLM by `peftopt serve` on the model and its adapter, once it answers; ended as by Ctrl-C."""
    port, program = vllm.free_port(), Path(sys.executable).with_name("peftopt")
    served = ["--base", BASE, "--adapter", f"support={ADAPTER}", "--port", port]
    with launched([program, "serve", *served, *flags], port, folder) as url:
        yield url


@real
def test_serve_answers_until_it_is_interrupted(tmp_path: Path) -> None:
    ask = {"model": "support", "prompt": "Hi", "max_tokens": 4}
    with serving(tmp_path, "--engine-only") as url:
        listed = httpx2.get(f"{url}/v1/models", trust_env=False).json()["data"]
        assert httpx2.post(f"{url}/v1/completions", json=ask, trust_env=False, timeout=120).status_code == 200
        metrics = httpx2.get(f"{url}/metrics", trust_env=False).text
    assert [model["id"] for model in listed] == ["base", "support"]
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url, trust_env=False)
    check_what_is_monitored(metrics)


def check_what_is_monitored(metrics: str) -> None:
    """What `peftopt export` watches of vLLM is what this vLLM tells: the names, and the buckets' bounds."""
    promise = Promise("run", "variant", tuple(Bound(time, time, 0.5, 0.05) for time in ("latency", "ttft", "tpot")))
    files = {file.name: file.text for file in monitoring.exported(promise, "vllm").files}
    told = set(re.findall(r"^([a-z0-9_:]+)\{", metrics, re.MULTILINE)) | set(VLLM.times.values())
    for name in ("recording.yaml", "alerts.yaml", "dashboard.json", "slo.yaml"):
        assert set(re.findall(r"vllm:[a-z0-9_]+", files[name])) - told == set()
    for each, name in VLLM.times.items():
        bounds = re.findall(rf'^{name}_bucket\{{.*le="([0-9.]+)"', metrics, re.MULTILINE)
        assert {le(bound) for bound in VLLM.bounds[each]} == set(bounds)


@real
def test_the_canary_catches_both_faults_of_this_vllm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all slots are taken it computes the base's requests with the adapter's weights of their batch; with prefix
    caching it answers a reloaded adapter's requests from blocks of the one before. One after another, each name gets
    its own prefix."""
    from helpers.tiny_models import make_lora

    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")  # who serves the engine alone says so himself
    make_lora(BASE, tmp_path / "other", std=0.05)
    swap = ["--swap", ADAPTER, "--swap", tmp_path / "other"]
    few = ["--prompts", ROOT / "demo" / "data" / "eval.jsonl", "--fingerprints", 1, "--rounds", 1]
    with serving(tmp_path, "--engine-only", "--slots", 1, "--prefix-caching") as url:
        named = ["--model", "base", "--model", "support"]
        assert command("canary", url, *few, *named, "--json", "--quiet") == 1
        mixed = json.loads(capsys.readouterr().out)
        assert command("canary", url, *few, *swap, "--json", "--quiet") == 1
    assert mixed["apart"] and {answer["model"] for answer in mixed["wrong"]} == {"base"}
    turn = mixed["in_turn"]
    assert turn["asked"] == 3 and turn["reused"] > 0 and not turn["borrowed"] and not turn["failed"]
    found = json.loads(capsys.readouterr().out)
    assert found["residents"] == ["base", "support"] and not found["alike"] and not found["kept"]
    assert {answer["model"] for answer in found["stale"]} == {"peftopt-canary"}
    assert {answer["model"] for answer in found["wrong"]} == {"base"}, "and no adapter's answer was another's"


@real
def test_the_gateway_reloads_an_adapter_of_the_same_name_without_a_stale_answer(tmp_path: Path) -> None:
    """With prefix caching, where the engine alone answers a reloaded name from blocks of the adapter before."""
    make_lora(BASE, tmp_path / "other", std=0.05)
    program, admin = Path(sys.executable).with_name("peftopt"), f"unix:{tmp_path}/serve-state/admin.sock"
    flags = ("--prefix-caching", "--adapters-from", tmp_path, "--log", "requests.jsonl", "--engine", "vllm")
    prompt = [{"role": "user", "content": "the parcel is late " * 40}]
    ask = {"model": "support", "messages": prompt, "max_tokens": 8, "temperature": 0}

    def text(url: str) -> str:
        answer = httpx2.post(f"{url}/v1/chat/completions", json=ask, trust_env=False, timeout=120)
        return str(answer.json()["choices"][0]["message"]["content"])

    with serving(tmp_path, *flags) as url:
        before = text(url)
        for folder in (tmp_path / "other", ADAPTER, tmp_path / "other"):
            put = [program, "adapters", "put", f"support={folder}", "--admin", admin]
            assert subprocess.run(list(map(str, put)), check=False).returncode == 0
            assert (text(url) == before) is (folder == ADAPTER)
    every = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert {line["verdict"] for line in every if line["kind"] == SERVE_CHECK} == {"own"}
    lines = [line for line in every if line["kind"] == SERVE_LOG]
    assert len({line["version"] for line in lines}) == 2 and len(lines) == 4
    assert all(line["sources"]["generation_latency_ms"] == "engine" for line in lines)


# ---- exported scripts --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on vLLM with the adapter apart, whose load met its limit."""
    results = tmp_path_factory.mktemp("results")
    eager = finished_run(results, BASE, ADAPTER, require=("ttft.p95@peak <= 770 ms",), built=False)
    return on_engine(eager, Step("vllm", "engine", "", {"max_model_len": 1024}))


@real
def test_an_exported_script_starts_a_server_that_answers_by_the_adapter(run: Path, tmp_path: Path) -> None:
    assert command("export", "vllm", run, "--variant", "adapter", "--to", tmp_path) == 0
    program, port = Path(environments.python("vllm")).with_name("vllm"), vllm.free_port()
    variables = {"VLLM": str(program), "PORT": str(port), "VLLM_NO_USAGE_STATS": "1"}
    row = corpus.read(str(ROOT / "demo" / "data" / "eval.jsonl"), "short")[0]
    body = {"messages": list(map(dict, row.messages)), "max_tokens": 64, "temperature": 0}
    with launched([tmp_path / "vllm.sh"], port, variables=variables) as url:
        texts = [answer_of(url, {**body, "model": name}) for name in ("adapter", "base")]
    assert json.loads(texts[0]).keys() == json.loads(row.expected).keys() and texts[0] != texts[1]


def answer_of(url: str, body: dict[str, Any]) -> str:
    answer = httpx2.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=120)
    return str(answer.json()["choices"][0]["message"]["content"])


@real
def test_this_vllm_has_every_option_that_scripts_name(run: Path) -> None:
    """Those of quantized weights and of an engine that was not measured too."""
    measured = replace(reading.chosen(run, "adapter"), quantized="compressed-tensors")
    merged = replace(measured, decided=replace(measured.decided, model=Model(str(BASE))))
    eager = replace(measured, decided=replace(measured.decided, measured_on=Step("eager", "engine", ""), params={}))
    texts = [script.exported(each).files[0].text.partition("set -euo")[2] for each in (measured, merged, eager)]
    options = {option for text in texts for option in re.findall(r"--[a-z][a-z-]+", text)}
    main = [environments.python("vllm"), "-m", "vllm.entrypoints.cli.main", "serve", "--help=all"]
    printed = subprocess.run(main, capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"--[a-z][a-z-]+", printed))
    assert len(options) > 12 and options <= known, options - known
