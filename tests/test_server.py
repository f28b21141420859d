"""Our own engines behind OpenAI's API: the tokens are the engine's, and no request is lost or computed in vain."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from helpers.command_line import command
from helpers.our_server import PATIENCE_S, TOKENS, Gate, Running, serving, until
from helpers.tiny_models import make_lora

from peftopt.engines import _rows, eager
from peftopt.engines._server import free_port
from peftopt.records import Model
from peftopt.server import __main__ as starting

CHAT = [{"role": "user", "content": "count the stars"}]
PROMPTS = [[5, 9, 77, 30], [8, 8, 100, 41, 33, 200, 12], [7]]


@pytest.fixture(scope="module")
def adapters(tiny_base_fp32: Path, tiny_lora: Path) -> dict[str, Path]:
    other = tiny_base_fp32.parent / "other"
    make_lora(tiny_base_fp32, other, std=0.2)
    return {"one": tiny_lora, "two": other}


@pytest.fixture(scope="module")
def server(tiny_base_fp32: Path, adapters: dict[str, Path]) -> Iterator[Running]:
    with serving(_rows.Served(str(tiny_base_fp32), "cpu"), adapters) as running:
        yield running


def alone(base: Path, folder: Path | None, prompts: list[list[int]] = PROMPTS, new_tokens: int = TOKENS) -> Any:
    """What the eager engine answers to each prompt alone."""
    model = Model(str(base), (str(folder),) if folder else ())
    engine = eager.open(model, eager.Params("cpu"))
    answers = [engine.generate([prompt], new_tokens, False)[0].tokens for prompt in prompts]
    engine.close()
    return answers


@pytest.fixture(scope="module")
def expected(tiny_base_fp32: Path, adapters: dict[str, Path]) -> dict[str, list[list[int]]]:
    return {name: alone(tiny_base_fp32, folder) for name, folder in {"base": None, **adapters}.items()}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


def sent(server: Running, **body: Any) -> socket.socket:
    """A request on a connection of its own, whose answer nobody reads yet."""
    fixed = {"prompt": PROMPTS[0], "ignore_eos": True}
    data = json.dumps({**fixed, **body}).encode()
    line = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=PATIENCE_S)
    line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))
    return line


def messages(stream: str) -> list[Any]:
    lines = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---- what is answered --------------------------------------------------------------------------


def test_each_model_answers_alone_and_among_others_as_the_eager_engine(server: Running, expected: dict) -> None:
    assert len({str(answers) for answers in expected.values()}) == 3
    for name, answers in expected.items():
        assert [server.ids(name, prompt) for prompt in PROMPTS] == answers
    jobs = [(name, n) for n in range(len(PROMPTS)) for name in expected]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: server.ids(job[0], PROMPTS[job[1]]), jobs))
    assert found == [expected[name][n] for name, n in jobs]


def test_rows_that_join_and_leave_a_batch_change_no_answer(server: Running, gate: Gate, expected: dict) -> None:
    lengths = (TOKENS, 5, TOKENS)
    before = server.scheduler.counts["computed"]
    with ThreadPoolExecutor(3) as pool:
        found = []
        for n, length in enumerate(lengths):
            found.append(pool.submit(server.ids, "one", PROMPTS[n], max_tokens=length))
            until(lambda n=n: server.scheduler.running + server.scheduler.waiting == n + 1)
            gate.steps(2)
            until(gate.taken)
            assert server.scheduler.running == n + 1
        gate.open()
        assert [f.result() for f in found] == [a[:n] for a, n in zip(expected["one"], lengths, strict=True)]
    assert server.scheduler.counts["computed"] - before == sum(lengths)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_stream_says_what_the_whole_answer_says(server: Running, path: str) -> None:
    body: dict[str, Any] = {"model": "one", "max_tokens": 12, "logprobs": 3, "return_token_ids": True}
    body |= {"messages": CHAT, "logprobs": True, "top_logprobs": 3} if "chat" in path else {"prompt": "the stars"}
    whole = server.post(path, **body).json()
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = messages(server.post(path, **body, **usage).text)
    choice, choices = whole["choices"][0], [piece["choices"][0] for piece in pieces]
    texts = [c["delta"]["content"] if "chat" in path else c["text"] for c in choices]
    assert "".join(texts) == (choice["message"]["content"] if "chat" in path else choice["text"])
    assert [i for c in choices for i in c["token_ids"]] == choice["token_ids"]
    told = [c["logprobs"] for c in choices if c["logprobs"]]
    for key, values in choice["logprobs"].items():
        assert [each for one in told for each in one[key]] == values
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + [choice["finish_reason"]]
    assert (
        last["usage"] == whole["usage"] and last["choices"] == [] and whole["usage"]["completion_tokens"] == len(told)
    )
    assert all("metrics" not in piece for piece in pieces)
    times = {"queue_time_ms", "time_to_first_token_ms", "generation_time_ms", "mean_itl_ms", "tokens_per_second"}
    assert last["metrics"].keys() == whole["metrics"].keys() == times and min(last["metrics"].values()) > 0
    *_, final = messages(server.post(path, **body, stream=True).text)
    assert final["choices"][0]["finish_reason"] and final["metrics"].keys() == times and "usage" not in final


def test_the_text_is_the_tokens_text(server: Running, tiny_base_fp32: Path) -> None:
    engine = eager.open(Model(str(tiny_base_fp32)), eager.Params("cpu"))
    prompt, _ = engine.encode(CHAT)
    tokens = engine.generate([prompt], 40, True)[0].tokens
    choice = server.post("chat/completions", model="base", messages=CHAT, max_tokens=40).json()["choices"][0]
    assert choice["message"]["content"] == engine.decode(tokens)
    parts = [{"role": "user", "content": [{"type": "text", "text": "count the "}, {"type": "text", "text": "stars"}]}]
    again = server.post("chat/completions", model="base", messages=parts, max_tokens=40).json()["choices"][0]
    assert again["message"] == choice["message"]


def test_stop_strings_end_an_answer_before_them(server: Running) -> None:
    body = {"model": "two", "prompt": PROMPTS[1], "max_tokens": 30, "ignore_eos": True}
    text = server.post("completions", **body).json()["choices"][0]["text"]
    stop = text[12:15]
    found = server.post("completions", **body, stop=["never said", stop]).json()
    assert found["choices"][0]["text"] == text[: text.find(stop)] and found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] < 30
    pieces = messages(server.post("completions", **body, stop=stop, stream=True).text)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text[: text.find(stop)]


def test_what_may_become_a_stop_string_is_held_back_and_given_out_in_the_end() -> None:
    from peftopt.server.answer import _Text

    class Letters:
        def text(self, tokens: list[int]) -> str:
            return "".join(map(chr, tokens))

    held = _Text(Letters(), ["abc"])
    assert [held.add(ord(letter)) for letter in "xabab"] == [
        ("x", False),
        *[("", False)] * 2,
        ("ab", False),
        ("", False),
    ]
    assert held.rest() == "ab" and held.add(ord("c")) == ("", True)


def test_sampling_is_repeated_by_its_seed_and_cold_sampling_is_greedy(server: Running, expected: dict) -> None:
    hot = {"temperature": 3.0, "seed": 7}
    assert server.ids("base", PROMPTS[0], **hot) == server.ids("base", PROMPTS[0], **hot) != expected["base"][0]
    assert server.ids("base", PROMPTS[0], temperature=3.0, seed=8) != server.ids("base", PROMPTS[0], **hot)
    assert server.ids("base", PROMPTS[0], temperature=3.0, top_p=1e-6) == expected["base"][0]
    assert server.ids("base", PROMPTS[0], repetition_penalty=1e-3) != expected["base"][0]


def test_the_openai_client_works_unchanged(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["base", "one", "two"]
    asked: dict[str, Any] = {"model": "one", "messages": CHAT, "max_completion_tokens": 6}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=5)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens and len(content[0].top_logprobs) == 5
    assert content[0].top_logprobs[0].token == content[0].token
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *pieces, last = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
    assert last.usage == whole.usage
    text = client.completions.create(model="base", prompt="the stars", max_tokens=4, logprobs=2)
    assert len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", messages=CHAT)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="one", messages=CHAT, temperature=-1)

    async def twice() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as both:
            answers = await asyncio.gather(*(both.chat.completions.create(**asked) for _ in range(2)))
        return [answer.choices[0].message.content or "" for answer in answers]

    assert asyncio.run(twice()) == [whole.choices[0].message.content] * 2


def test_the_canary_passes(server: Running, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": str(n), "prompt": f"count to {n}"}) + "\n" for n in range(3)))
    flags = ["--prompts", prompts, "--model", "base", "--model", "one", "--model", "two", "--rounds", "1", "--quiet"]
    assert command("canary", server.url, *flags) == 0


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", b"{not json", None),
        ("chat/completions", b"[]", None),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("chat/completions", {"messages": CHAT, "temperature": "hot"}, "temperature"),
        ("chat/completions", {"messages": CHAT, "max_tokens": 0}, "max_tokens"),
        ("chat/completions", {"messages": CHAT, "max_tokens": True}, "max_tokens"),
        ("chat/completions", {"messages": CHAT, "max_tokens": 5000}, "messages"),
        ("chat/completions", {"messages": CHAT, "top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {"messages": CHAT, "n": 2}, "n"),
        ("chat/completions", {"messages": CHAT, "tools": [{}]}, "tools"),
        ("chat/completions", {"messages": CHAT, "stop": [1]}, "stop"),
        ("chat/completions", {"messages": CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"messages": CHAT, "model": 5}, "model"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": [1, "x"]}, "prompt"),
        ("completions", {"prompt": [10**9]}, "prompt"),
        ("completions", {"prompt": ["one", "two"]}, "prompt"),
        ("completions", {"prompt": "x", "echo": True}, "echo"),
        ("load_lora_adapter", {"lora_name": "x"}, "lora_path"),
        ("unload_lora_adapter", {"lora_name": 3}, "lora_name"),
    ],
)
def test_a_bad_body_is_answered_400_with_the_field(server: Running, path: str, body: Any, param: str | None) -> None:
    data = body if isinstance(body, bytes) else json.dumps({"model": "base", **body}).encode()
    answer = server.http.post(f"/v1/{path}", content=data)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_unknown_fields_are_ignored_and_unknown_names_are_not_there(server: Running) -> None:
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    assert server.post("completions", **body, user="me", store=True, n=1, logit_bias={}, stop=None).status_code == 200
    for answer in (server.post("completions", **{**body, "model": "nobody"}), server.post("nothing")):
        assert answer.status_code == 404 and answer.json()["error"]["message"]
    assert server.http.get("/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--engine", "continuous"], "eager"),
        (["--engine", "compiled", "--adapter", "x=/nowhere"], "merge"),
        (["--adapter", "x=/nowhere"], "/nowhere"),
        (["--adapter", "x=/a", "--adapter", "x=/b"], "NAME=FOLDER"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(
    flags: list[str], what: str, tiny_base_fp32: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert starting.main(["--base", str(tiny_base_fp32), "--port", str(free_port()), "--device", "cpu", *flags]) == 2
    assert what in capsys.readouterr().err


# ---- adapters that come and go -----------------------------------------------------------------


def test_adapters_are_loaded_unloaded_and_reloaded(
    server: Running, adapters: dict[str, Path], expected: dict, tmp_path: Path
) -> None:
    place = shutil.copytree(adapters["one"], tmp_path / "place")
    load = {"lora_name": "x", "lora_path": str(place)}
    assert server.post("load_lora_adapter", **load).status_code == 200
    assert server.ids("x", PROMPTS[0]) == expected["one"][0]
    for again in (load, {**load, "lora_path": str(adapters["two"])}, {**load, "lora_name": "base"}):
        assert server.post("load_lora_adapter", **again).status_code == 400
    assert server.ids("x", PROMPTS[0]) == expected["one"][0]
    assert server.post("unload_lora_adapter", lora_name="x").status_code == 200
    assert server.post("completions", model="x", prompt="x").status_code == 404
    assert server.post("unload_lora_adapter", lora_name="x").status_code == 404
    shutil.rmtree(place)
    assert server.post("load_lora_adapter", **load).status_code == 404
    shutil.copytree(adapters["two"], place)
    assert server.post("load_lora_adapter", **load).status_code == 200
    assert server.ids("x", PROMPTS[0]) == expected["two"][0]
    assert server.ids("one", PROMPTS[0]) == expected["one"][0]
    assert server.post("unload_lora_adapter", lora_name="x").status_code == 200
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["base", "one", "two"]


def test_requests_under_way_are_finished_before_their_adapter_goes(
    server: Running, gate: Gate, adapters: dict[str, Path], expected: dict
) -> None:
    model: Any = server.scheduler._model
    server.post("load_lora_adapter", lora_name="x", lora_path=str(adapters["one"]))
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(server.ids, "x", PROMPTS[0])
        until(lambda: server.scheduler.running == 1)
        gone = pool.submit(server.post, "unload_lora_adapter", lora_name="x")
        until(lambda: "x" not in server.scheduler.served)
        gate.steps(1)
        assert len(model._names) == 3 and not gone.done()
        gate.open()
        assert answer.result() == expected["one"][0] and gone.result().status_code == 200
    assert len(model._names) == 2
    layers = [module for module in model._model.modules() if hasattr(module, "lora_A")]
    assert layers and all(len(layer.lora_A) == 2 for layer in layers), "its weights are freed"


def test_an_adapter_that_would_change_the_base_for_others_is_refused(
    server: Running, adapters: dict[str, Path], expected: dict, tmp_path: Path
) -> None:
    changes = {"bias": "all"}, {"peft_type": "XLORA"}, {"init_lora_weights": "pissa"}, {"layer_replication": [[0, 1]]}
    for n, change in enumerate((*changes, {"r": 8})):  # the last does not fit its own weights
        folder = shutil.copytree(adapters["one"], tmp_path / str(n))
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
        answer = server.post("load_lora_adapter", lora_name="bad", lora_path=str(folder))
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_path", change
    for name, answers in expected.items():
        assert server.ids(name, PROMPTS[0]) == answers[0]


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_served_one_by_one(kind: str, tiny_base_fp32: Path, tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_base_fp32)
    made = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for parameter in made.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    made.save_pretrained(tmp_path / "virtual")
    expected = alone(tiny_base_fp32, tmp_path / "virtual")
    model = _rows.Served(str(tiny_base_fp32), "cpu")
    with serving(model, {"virtual": tmp_path / "virtual"}) as server, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda prompt: server.ids("virtual", prompt), PROMPTS))
        assert found == expected != alone(tiny_base_fp32, None)
        assert [server.ids("base", prompt) for prompt in PROMPTS] == alone(tiny_base_fp32, None)
        assert server.post("unload_lora_adapter", lora_name="virtual").status_code == 200


def test_a_base_whose_last_adapter_goes_is_as_it_was(tiny_base_fp32: Path, adapters: dict[str, Path]) -> None:
    model = _rows.Served(str(tiny_base_fp32), "cpu")
    names = {name for name, _ in model._model.named_modules()}
    with serving(model, {"one": adapters["one"]}) as server:
        server.post("unload_lora_adapter", lora_name="one")
        assert {name for name, _ in model._model.named_modules()} == names
        assert server.ids("base", PROMPTS[0]) == alone(tiny_base_fp32, None)[0]


# ---- clients that leave, and failures ----------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_computing(server: Running, gate: Gate, stream: bool, expected: dict) -> None:
    counts = server.scheduler.counts
    left, computed = counts["left"], counts["computed"]
    line = sent(server, model="one", max_tokens=900, stream=stream)
    gate.steps(3)
    until(lambda: gate.reached == 4)  # the model's thread stands at the gate, so who comes now waits
    assert counts["computed"] - computed == 4
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(server.ids, "one", PROMPTS[1])
        until(lambda: server.scheduler.waiting == 1)
        line.close()
        until(lambda: any(job.gone for batch in server.scheduler._batches for job in batch.jobs))
        gate.open()
        assert other.result() == expected["one"][1]
    until(lambda: counts["left"] - left == 1 and not server.scheduler.running)
    assert counts["computed"] - computed <= 4 + 1 + TOKENS


def test_a_client_that_leaves_the_queue_is_never_computed(
    gate: Gate, tiny_base_fp32: Path, adapters: dict[str, Path], expected: dict
) -> None:
    model = _rows.Served(str(tiny_base_fp32), "cpu")
    with serving(model, adapters, max_batch=1) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.ids, "base", PROMPTS[0])
        until(lambda: server.scheduler.running == 1)
        line = sent(server, model="one", max_tokens=900)
        until(lambda: server.scheduler.waiting == 1)
        line.close()
        until(lambda: all(job.gone for job in server.scheduler._waiting))
        gate.open()
        assert first.result() == expected["base"][0]
        until(lambda: server.scheduler.counts["left"] == 1)
        assert server.scheduler.counts["computed"] == TOKENS


def test_who_is_more_than_may_wait_is_refused_and_the_others_are_answered(gate: Gate, tiny_base_fp32: Path) -> None:
    model = _rows.Served(str(tiny_base_fp32), "cpu")
    with serving(model, max_batch=1, max_queued=1) as server, ThreadPoolExecutor() as pool:
        runs = pool.submit(server.ids, "base", PROMPTS[0])
        until(lambda: server.scheduler.running == 1)
        waits = pool.submit(server.ids, "base", PROMPTS[1])
        until(lambda: server.scheduler.waiting == 1)
        refused = server.post("completions", model="base", prompt=PROMPTS[2], max_tokens=2)
        gate.steps(1000)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
        assert len(runs.result(PATIENCE_S)) == len(waits.result(PATIENCE_S)) == TOKENS


def test_no_adapter_waits_for_the_batch_of_another(server: Running, gate: Gate, expected: dict) -> None:
    long = sent(server, model="one", max_tokens=900)
    until(lambda: server.scheduler.running == 1)
    with ThreadPoolExecutor(1) as pool:
        short = pool.submit(server.ids, "two", PROMPTS[0])
        gate.steps(3 * TOKENS)
        assert short.result() == expected["two"][0]
        until(lambda: server.scheduler.running == 1)  # the long one goes on
    long.close()


def test_the_oldest_goes_first_whatever_its_adapter(
    gate: Gate, tiny_base_fp32: Path, adapters: dict[str, Path]
) -> None:
    model = _rows.Served(str(tiny_base_fp32), "cpu")
    with serving(model, adapters, max_batch=1) as server, ThreadPoolExecutor(5) as pool:
        order: list[str] = []
        answers = []
        for n, name in enumerate(("one", "two", "one", "base", "two")):
            answers.append(pool.submit(server.ids, name, PROMPTS[0]))
            answers[-1].add_done_callback(lambda _, name=name: order.append(name))
            until(lambda n=n: server.scheduler.running + server.scheduler.waiting == n + 1)
        scheduled = [job.adapter for job in server.scheduler._waiting]
        gate.open()
        assert all(answer.result() for answer in answers)
        assert scheduled == ["adapter2", "adapter1", "", "adapter2"] and sorted(order) == sorted(
            ["one", "two", "one", "base", "two"]
        )


def test_a_failed_forward_pass_is_told_and_the_server_lives_on(
    server: Running, monkeypatch: pytest.MonkeyPatch, expected: dict
) -> None:
    forward, calls = _rows.Served.forward, iter(range(100))

    def failing(at: int) -> Callable[..., Any]:
        def call(*args: Any, **inputs: Any) -> Any:
            if next(calls) == at:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return forward(*args, **inputs)

        return call

    monkeypatch.setattr(_rows.Served, "forward", failing(0))
    answer = server.post("completions", model="one", prompt=PROMPTS[0])
    assert answer.status_code == 500 and "can't allocate memory" in answer.json()["error"]["message"]
    monkeypatch.setattr(_rows.Served, "forward", failing(4))
    body = {"model": "one", "prompt": PROMPTS[0], "stream": True, "ignore_eos": True}
    *pieces, last = messages(server.post("completions", **body).text)
    assert len(pieces) == 3 and last["error"]["type"] == "server_error"
    monkeypatch.setattr(_rows.Served, "forward", forward)
    assert server.ids("one", PROMPTS[0]) == expected["one"][0]
    assert server.http.get("/health").status_code == 200


def test_its_metrics_are_what_the_load_generator_reads(server: Running, gate: Gate) -> None:
    from peftopt.loadtest import prometheus

    line = sent(server, model="one", max_tokens=900)

    def totals() -> dict[str, float]:
        return prometheus.totals(server.http.get("/metrics").text)

    until(lambda: prometheus.moment(totals()) == {"running": 1, "waiting": 0})
    found = totals()
    assert found["peftopt_server_memory_reserved_bytes"] > 0
    assert found["vllm:request_queue_time_seconds_count"] > 0 and found["peftopt_server_computed_tokens_total"] > 0
    line.close()


# ---- the end -----------------------------------------------------------------------------------


def test_what_does_not_end_in_time_is_told_so(gate: Gate, tiny_base_fp32: Path) -> None:
    with serving(_rows.Served(str(tiny_base_fp32), "cpu"), max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        body = {"model": "base", "prompt": PROMPTS[0], "max_tokens": 900, "ignore_eos": True}
        streamed = pool.submit(server.post, "completions", **body, stream=True)
        until(lambda: server.scheduler.running == 1)
        queued = pool.submit(server.post, "completions", **body)
        until(lambda: server.scheduler.waiting == 1)
        server.stop()
        until(lambda: bool(server.scheduler.broken))
        gate.open()
        assert messages(streamed.result().text)[-1]["error"]["code"] == "server_ends"
        assert queued.result().status_code == 503


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(tiny_base_fp32: Path, adapters: dict[str, Path]) -> None:
    port = free_port()
    flags = ["--base", tiny_base_fp32, "--adapter", f"one={adapters['one']}", "--port", port, "--drain", PATIENCE_S]
    process = subprocess.Popen([sys.executable, "-m", "peftopt.server", *map(str, flags), "--threads", "1"])
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, trust_env=False) as http:

            def health() -> int:
                try:
                    return http.get("/health").status_code
                except httpx2.ConnectError:
                    assert process.poll() is None
                    return 0

            until(lambda: health() == 200)
            body = {"model": "one", "prompt": PROMPTS[0], "max_tokens": 900, "ignore_eos": True, "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                text = [next(lines)]
                process.send_signal(signal.SIGTERM)
                until(lambda: health() == 503)
                assert http.post("/v1/completions", json={**body, "max_tokens": 1}).status_code == 503
                text += lines
            assert len(messages("\n".join(text))) == 900
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


# ---- the compiled engine -----------------------------------------------------------------------


def test_the_compiled_engine_serves_a_model_without_adapters(tiny_base_fp32: Path, adapters: dict[str, Path]) -> None:
    model = _rows.CompiledServed(str(tiny_base_fp32), "cpu", max_batch=2, context=64, backend="eager")
    expected = alone(tiny_base_fp32, None)
    with serving(model, max_batch=2) as server, ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda prompt: server.ids("base", prompt), PROMPTS)) == expected
        lengths = [TOKENS, 4, 9]
        found = list(pool.map(lambda n: server.ids("base", PROMPTS[n], max_tokens=lengths[n]), range(3)))
        assert found == [answer[:n] for answer, n in zip(expected, lengths, strict=True)]
        wide = [(list(range(3, 43)), 20), (PROMPTS[0], 55)]  # each fits the cache, and not both in one batch
        found = list(pool.map(lambda job: server.ids("base", job[0], max_tokens=job[1]), wide))
        assert found == [alone(tiny_base_fp32, None, [prompt], count)[0] for prompt, count in wide]
        answer = server.post("load_lora_adapter", lora_name="one", lora_path=str(adapters["one"]))
        assert answer.status_code == 400 and "merge" in answer.json()["error"]["message"]
        assert server.post("completions", model="base", prompt=PROMPTS[0], max_tokens=64).status_code == 400
