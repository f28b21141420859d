"""The engine `endpoint` and its client: any server's answer is tokens with their times, any fault a message."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command, prompts
from helpers.records import lines_of
from helpers.servers import FAULTS, Server, served

from peftopt import plugins
from peftopt.corpus import Row
from peftopt.errors import BadInput, MissingEnvironment, WorkerFailed
from peftopt.loadtest.client import Client, Reply, Target
from peftopt.loadtest.protocols import Prompt, tgi
from peftopt.measurements import NO_ACCOUNT
from peftopt.probes import load, speed
from peftopt.records import Model

HELLO = [{"role": "user", "content": "the quick fox"}]
PLUGIN = plugins.module("engine", "endpoint")


def opened(base: Path, server: Server, **params: Any) -> Any:
    url = server.url + ("/mii/demo" if params.get("protocol") == "mii" else "")
    return PLUGIN.open(Model(str(base)), PLUGIN.Params(url=url, **{"model": "support", **params}))


def ask(server: Server, model: str, protocol: str = "chat", n: int = 8, stop: bool = False, limit: float = 30) -> Reply:
    async def once() -> Reply:
        url = server.url + ("/mii/demo" if protocol == "mii" else "")
        async with Client(Target(url, protocol, timeout_s=limit)) as client:
            return await client.ask(Prompt(HELLO), model, n, stop)

    return asyncio.run(once())


# ---- the wire ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["completions", "chat"])
def test_openai_gives_each_token_its_time_and_a_fixed_length(protocol: str) -> None:
    with served(gap=0.05) as server:
        reply = ask(server, "support", protocol)
    assert (reply.error, reply.finish, reply.new_tokens, reply.prompt_tokens) == ("", "length", 8, 7)
    assert reply.text == " s" * 8 and reply.ids == list(range(10, 18))
    assert len(reply.times) == 8 and reply.times == sorted(set(reply.times))
    assert reply.sent < reply.times[0] and reply.times[-1] <= reply.done
    assert reply.times[-1] - reply.times[0] >= 7 * 25e6, "the gaps between tokens are the server's, of 50 ms"
    body = server.bodies[-1]
    assert body["stream"] and body["ignore_eos"] and body["min_tokens"] == body["max_tokens"] == 8
    assert body["temperature"] == 0 and body["stream_options"] == {"include_usage": True}


def test_llamacpp_as_its_own_form_has_it(tiny_base: Path) -> None:
    with served() as server:
        reply = ask(server, "support", "llamacpp")
        assert (reply.error, reply.finish, reply.new_tokens, reply.prompt_tokens) == ("", "length", 8, 7)
        assert reply.ids == list(range(10, 18)) and len(reply.times) == 8
        body = server.bodies[-1]
        assert body["n_predict"] == 8 and body["ignore_eos"] and body["return_tokens"] and body["top_k"] == 1
        assert ask(server, "support", "llamacpp", stop=True).finish == "stop"
        engine = opened(tiny_base, server, protocol="llamacpp")
        assert engine.generate([engine.encode(HELLO)[0]], 8, stop=False)[0].tokens == list(range(10, 18))
        assert server.bodies[-1]["prompt"] == engine.encode(HELLO)[0]
        lost = Reply(sent=0, done=9, times=[1, 2], text="five", ids=[3], finish="length", counted=2, status=200)
        found = engine._generation(lost, 2, stop=False)
        assert len(found.tokens) == 2 and found.tokens[0] == engine._tokenizer("five").input_ids[0], "ids are missing"
        engine.close()


@pytest.mark.parametrize("protocol", ["completions", "chat", "llamacpp"])
def test_what_a_server_says_that_it_reused_is_told(protocol: str, tiny_base: Path) -> None:
    with served() as server:
        assert ask(server, "support", protocol).reused is None
    with served(caching="own") as server:
        assert [ask(server, "support", protocol).reused for _ in range(2)] == [0, 4]
        engine, row = opened(tiny_base, server, protocol=protocol), Row("p", HELLO, "")
        told = [speed.turn(engine, [[row]], 4, 0)[0].reused for _ in range(2)]
        assert told[-1] == 4
        requests, _ = load.turn(engine, [row, row], 4, False, 1, 0.0, 0)
        assert [request.reused for request in requests] == [4, 4]
        engine.remote = False
        assert load.turn(engine, [row], 4, False, 1, 0.0, 0)[0][0].reused is None, "of ours, it was told to reuse none"
        engine.reuses = True
        assert engine.generate([engine.encode(HELLO)[0]], 4, stop=False)[0].reused == 4
        engine.close()


def test_tgi_and_mii_as_their_schemas_have_them() -> None:
    with served() as server:
        reply = ask(server, "support", "tgi")
        assert server.bodies[-1] == {
            "inputs": "the quick fox",
            "parameters": {"max_new_tokens": 8, "do_sample": False, "details": True, "adapter_id": "support"},
        }
        assert (reply.error, reply.finish, reply.new_tokens, reply.prompt_tokens) == ("", "stop", 5, 7)
        assert reply.ids == [10, 11, 12, 13, 14]
        whole = ask(server, "", "mii")
        assert server.bodies[-1] == {
            "prompts": ["the quick fox"],
            "max_new_tokens": 8,
            "do_sample": False,
            "ignore_eos": True,
        }
        assert (whole.error, whole.finish, whole.new_tokens, whole.text) == ("", "length", 8, " x" * 8)


def form(required: str, optional: str = "", **parts: Any) -> dict[str, Any]:
    """A closed object of a published schema, from "name:type" words; `parts` are fields of a form of their own."""
    words = dict(word.split(":") for word in f"{required} {optional}".split())
    fields = {name: parts.get(name) or {"type": kind.split("|")} for name, kind in words.items()}
    names = [word.split(":")[0] for word in required.split()]
    return {"type": "object", "required": names, "properties": fields, "additionalProperties": False}


TGI_PARAMETERS = form(
    "",
    "adapter_id:string best_of:integer decoder_input_details:boolean details:boolean do_sample:boolean "
    "frequency_penalty:number grammar:object max_new_tokens:integer repetition_penalty:number return_full_text:boolean "
    "seed:integer stop:array temperature:number top_k:integer top_n_tokens:integer top_p:number truncate:integer "
    "typical_p:number watermark:boolean",
)
TGI_DETAILS = form("finish_reason:string generated_tokens:integer input_length:integer", "seed:integer|null")
TGI_TOKEN = form("id:integer text:string logprob:number|null special:boolean")
TGI = {
    "GenerateRequest": form("inputs:string", "parameters:object", parameters=TGI_PARAMETERS),
    "StreamResponse": form(
        "index:integer token:object",
        "generated_text:string|null details:object|null top_tokens:array",
        token=TGI_TOKEN,
        details={"anyOf": [{"type": "null"}, TGI_DETAILS]},
    ),
    "ErrorResponse": form("error:string error_type:string"),
}
"""What docs/openapi.json of text-generation-inference 2.4.1 says of /generate_stream, in words of our own."""


@pytest.mark.parametrize("adapter", ["", "support"])
def test_what_is_sent_to_tgi_and_what_the_fake_one_answers_fit_its_published_definitions(adapter: str) -> None:
    from jsonschema import validate

    prompt = Prompt(HELLO)
    for stop, extensions in ((True, True), (False, True), (True, False)):
        validate(tgi.body(prompt, adapter, 8, stop, extensions), TGI["GenerateRequest"])
    fake = Server()
    messages = [fake.token("/generate_stream", "support", i, 5, 8, {}) for i in range(5)]
    for message in messages:
        validate(message, TGI["StreamResponse"])
    last = tgi.read(messages[-1])
    assert last.finish in ("stop", "length") and last.new_tokens == 5
    told = {"error": "Model is overloaded", "error_type": "overloaded"}
    validate(told, TGI["ErrorResponse"])
    assert tgi.read(told).error == "Model is overloaded"


def test_a_server_that_refuses_ignore_eos_is_asked_without_it_from_then_on() -> None:
    async def twice(server: Server) -> tuple[str, list[Reply]]:
        async with Client(Target(server.url)) as client:
            return client.refused, [await client.ask(Prompt(HELLO), "base", 8, False) for _ in range(2)]

    with served(strict=True) as server:
        _, replies = asyncio.run(twice(server))
        assert [r.error for r in replies] == ["", ""] and [r.new_tokens for r in replies] == [5, 5]
        assert ["ignore_eos" in body for body in server.bodies] == [True, False, False]


SAYS = {
    "silent": "no answer within 3 s",
    "stall": "stalled after 2 tokens, for 3 s in all",
    "reset": "connection lost after 2 tokens",
    "garbage": "garbage in the answer",
    "early": "the stream ended early, after 2 tokens",
    "plain": "does not stream: it answered application/json",
    "broken": "HTTP 503: the engine is overloaded",
    "said": "EngineCore died",
    "nobody": "HTTP 404: The model `nobody` does not exist.",
}


@pytest.mark.parametrize("fault", SAYS)
def test_a_fault_is_an_answer_with_its_reason(fault: str) -> None:
    assert set(FAULTS) - {"refused", "burst"} < set(SAYS)
    with served() as server:
        reply = ask(server, fault, limit=3 if fault in ("silent", "stall") else 30)
    assert SAYS[fault] in reply.error


@pytest.mark.parametrize(("keeps", "error"), [(2, ""), (0, "connection lost after 0 tokens")])
def test_a_connection_that_the_server_let_go_of_is_made_anew_once(keeps: int, error: str) -> None:
    async def five() -> list[Reply]:
        async with Client(Target(server.url, "completions")) as client:
            return [await client.ask(Prompt(HELLO), "support", 3) for _ in range(5)]

    with served(keeps=keeps) as server:
        replies = asyncio.run(five())
    assert all(reply.error.startswith(error) and bool(reply.error) == bool(error) for reply in replies)
    assert [reply.new_tokens for reply in replies] == ([0] * 5 if error else [3] * 5)


def test_a_server_that_is_not_there() -> None:
    with served() as server:
        pass
    reply = ask(server, "base")
    assert "cannot connect" in reply.error and not reply.times


@pytest.mark.fault(36, "a key is in the request's header and nowhere else")
def test_a_key_travels_in_the_header_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "canary-7f3a")

    async def once(server: Server) -> Reply:
        async with Client(Target(server.url, key_env="MY_KEY")) as client:
            return await client.ask(Prompt(HELLO), "broken", 8)

    with served() as server:
        reply = asyncio.run(once(server))
        assert "Bearer canary-7f3a" in server.headers[-1]
        assert "canary" not in f"{reply} {server.bodies}"
    with pytest.raises(BadInput, match="OTHER_KEY"):
        Client(Target("http://localhost:1", key_env="OTHER_KEY"))


@pytest.mark.parametrize(
    ("url", "protocol", "says"),
    [
        ("localhost:8000", "chat", "'localhost:8000'"),
        ("http://localhost:8000/v1", "chat", "ends in /v1"),
        ("http://me:secret@localhost", "chat", "holds a password"),
        ("http://localhost", "grpc", "no protocol named 'grpc'"),
    ],
)
def test_a_target_that_cannot_be_one(url: str, protocol: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Client(Target(url, protocol))


# ---- the engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["completions", "chat", "llamacpp", "mii"])
def test_the_engine_keeps_the_contract(tiny_base: Path, protocol: str) -> None:
    with served() as server:
        engine = opened(tiny_base, server, protocol=protocol)
        prompts = [engine.encode([{"role": "user", "content": text}])[0] for text in ("the fox", "seven dogs")]
        for answer in engine.generate(prompts, 8, stop=False):
            assert len(answer.tokens) == len(answer.times) == 8 and not answer.stopped
            assert answer.times == sorted(answer.times)
        for answer in engine.generate(prompts, 8, stop=True):
            assert answer.stopped and answer.tokens[-1] in engine.eos and len(answer.times) == len(answer.tokens)
        assert not engine.scores and engine.decode(engine.encode(HELLO, "five stars")[1]) == "five stars"
        asked = server.bodies[-1]
        if protocol == "completions":
            assert asked["prompt"] == prompts[1], "token ids, so that every variant is asked the same"
        if protocol == "chat":
            assert asked["messages"] == [{"role": "user", "content": "seven dogs"}]
        engine.close()


def test_a_batch_travels_at_once_and_is_timed_to_its_last_token(tiny_base: Path) -> None:
    with served(first=0.05, meeting=4) as server:
        engine = opened(tiny_base, server)
        rows = [Row(str(n), tuple(HELLO)) for n in range(4)]
        (request,) = speed.turn(engine, [rows], 8, 0)
        assert server.most == 4
        assert request.new_tokens == 32 and request.batch == 4
        assert 50 <= request.ttft_ms < request.request_duration_ms
        engine.close()


def test_users_ask_when_answered_and_a_rate_comes_anyway(tiny_base: Path) -> None:
    rows = [Row(f"row {n}", tuple(HELLO)) for n in range(12)]
    with served(first=0.02, meeting=3) as server:
        engine = opened(tiny_base, server)
        requests, account = load.turn(engine, rows, 6, False, users=3, rate=0.0, seed=1)
        assert server.most == 3 and account != NO_ACCOUNT and account.slots is None, (
            "another's server has not told them"
        )
        engine.slots = 6  # as a server that is started here knows them
        assert load.turn(engine, rows, 6, False, users=3, rate=0.0, seed=1)[1].slots == 6
        assert [r.id for r in requests] == [row.id for row in rows]
        assert {r.new_tokens for r in requests} == {6} and len({r.turn_ms for r in requests}) == 1
        assert all(20 <= r.ttft_ms < r.request_duration_ms < r.turn_ms for r in requests)
        early, late = (load.turn(engine, rows, 6, False, 0, rate, 1)[0] for rate in (1000.0, 50.0))
        assert [r.scheduled / 20 for r in late] == pytest.approx([r.scheduled for r in early])
        with pytest.raises(BadInput, match="gave 5 tokens, not 9"):
            engine._client.extensions = False
            load.turn(engine, rows, 9, False, 2, 0.0, 1)
        engine._model = "refused"
        with pytest.raises(WorkerFailed, match="6 of 12 under load: HTTP 503"):
            load.turn(engine, rows, 6, False, 4, 0.0, 1)
        engine.close()


def test_a_server_without_token_ids_gets_text(tiny_base: Path) -> None:
    with served(ids=False) as server:
        engine = opened(tiny_base, server)
        assert engine.generate([engine.encode(HELLO)[0]], 4, stop=False)[0].tokens == [10, 11, 12, 13]
        assert server.bodies[-1]["prompt"].startswith("<|im_start|>user\nthe quick fox")
        engine.close()


def test_lengths_that_cannot_be_fixed_are_refused(tiny_base: Path) -> None:
    with served(strict=True) as server:
        engine = opened(tiny_base, server)
        prompt = engine.encode(HELLO)[0]
        with pytest.raises(BadInput, match="gave 5 tokens, not 8: it refuses ignore_eos"):
            engine.generate([prompt], 8, stop=False)
        engine.close()
        tgi = opened(tiny_base, server, protocol="tgi")
        with pytest.raises(BadInput, match="tgi cannot generate a fixed number"):
            tgi.generate([prompt], 8, stop=False)
        assert tgi.generate([prompt], 8, stop=True)[0].stopped
        tgi.close()
        opened(tiny_base, server, protocol="tgi", model="").close()
        assert "adapter_id" not in server.bodies[-1]["parameters"], "its list names the base, which is no adapter"


def test_what_is_wrong_is_said_when_it_is_opened(tiny_base: Path) -> None:
    with served() as server:
        with pytest.raises(BadInput, match="serves no 'suport'") as refused:
            opened(tiny_base, server, model="suport")
        assert "support" in refused.value.hint
        with pytest.raises(BadInput, match="several models"):
            opened(tiny_base, server, model="")
        with pytest.raises(BadInput, match="does not answer: does not stream"):
            opened(tiny_base, server, model="plain", protocol="chat")
        engine = opened(tiny_base, server, model="refused", protocol="completions")
        with pytest.raises(WorkerFailed, match="HTTP 503"):
            engine.generate([engine.encode(HELLO)[0]] * 2, 4, stop=True)
        engine.close()
    with pytest.raises(MissingEnvironment, match="no server at"):
        opened(tiny_base, server)
    with served(models=("only",)) as server:
        engine = opened(tiny_base, server, model="")
        assert server.bodies[-1]["model"] == "only"
        engine.close()


def test_a_recipe_puts_its_servers_under_load(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    questions = prompts(tmp_path / "eval.jsonl", 4, "eval")
    with served(gap=0.004, meeting=3) as now, served(gap=0.001, meeting=3) as then:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {{base: {tiny_base}, adapter: {tiny_lora}}}\n"
            f"workloads:\n  peak: {{prompts: {questions}, new_tokens: 4, users: 3, requests: 6}}\n"
            "require: [throughput@peak >= 1 tokens/s, throughput@peak >= 0.1x]\n"
            "measure: {warmup: 1, max_blocks: 10, relaunch: 1}\nvariants:\n"
            f"  adapter: [{{engine: {{endpoint: {{url: '{now.url}', model: support}}}}}}]\n"
            f"  quick: [{{engine: {{endpoint: {{url: '{then.url}', model: support}}}}}}]\n"
            "minimize: ttft.p50@peak\n"
        )
        assert command("run", recipe, "--results", tmp_path / "results", "--quiet") in (0, 1, 3)
    assert (now.most, then.most) == (3, 3)
    (run,) = (tmp_path / "results" / "runs").iterdir()
    (turn, *_) = [m for m in lines_of(run / "measurements.jsonl") if m.probe == "speed" and m.variant == "quick"]
    warm, *timed = turn.values["requests"]
    assert warm["warmup"] and len(timed) == 6 and not any(r["warmup"] for r in timed) and turn.values["engine"]
    decision = json.loads((run / "decision.json").read_text())
    quick = next(v for v in decision["variants"] if v["name"] == "quick")
    assert {v["outcome"] for v in quick["verdicts"] if v["rule"].startswith("require")} == {"accepted"}
    report = (run / "report.md").read_text()
    assert "in the server's queue@peak" in report
    assert quick["figures"]["server_queue@peak"]["estimate"] == pytest.approx(10), "as its metrics have it"


@pytest.mark.fresh_workers
def test_a_recipe_runs_a_variant_on_a_server(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole job, with the server beside the adapter in process: raced and decided on."""
    questions = prompts(tmp_path / "eval.jsonl", 4, "eval")
    with served() as server:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {{base: {tiny_base}, adapter: {tiny_lora}}}\n"
            f"workloads:\n  chat: {{prompts: {questions}, new_tokens: 4}}\n"
            "require: [throughput@chat >= 1 tokens/s]\nmeasure: {requests: 1, max_blocks: 10, relaunch: 20}\n"
            f"variants:\n  adapter: []\n  served: [{{engine: {{endpoint: {{url: '{server.url}', model: support}}}}}}]\n"
            "minimize: latency.p50@chat\n"
        )
        assert command("run", recipe, "--results", tmp_path / "results", "--quiet") in (0, 1, 3)
    assert "trying once more" not in capsys.readouterr().err, "workers outlive the thread that started them"
    (run,) = (tmp_path / "results" / "runs").iterdir()
    kept = [m for m in lines_of(run / "measurements.jsonl") if m.variant == "served"]
    assert {m.probe for m in kept} == {"launch", "speed", "memory"}
    assert all("peak_memory_bytes" not in m.values for m in kept if m.probe == "memory")
