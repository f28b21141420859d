"""Streams as servers and the proxies before them send them: what is whole counts as answered, what failed says why."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command
from helpers.records import lines_of
from helpers.scripted import COUNTS, DONE, LAST, SSE, TOKEN, WHOLE, Answer, event, piece, scripted, streamed
from hypothesis import given
from hypothesis import strategies as st

from peftopt.errors import BadInput
from peftopt.loadtest import events, runs
from peftopt.loadtest.client import Client, Reply, Target
from peftopt.loadtest.protocols import Prompt
from peftopt.loadtest.runs import Traffic

HELLO = Prompt(({"role": "user", "content": "hello"},), "hello")


def read(*pieces: bytes) -> list[Any]:
    async def arriving() -> AsyncIterator[tuple[int, bytes]]:
        for number, piece_ in enumerate(pieces):
            yield number, piece_

    async def whole() -> list[Any]:
        return [message async for message in events.messages(arriving())]

    return asyncio.run(whole())


def asked(answer: Callable[[dict[str, Any]], Answer], protocol: str = "chat") -> Reply:
    async def session(url: str) -> Reply:
        async with Client(Target(url, protocol, timeout_s=10)) as client:
            return await client.ask(HELLO, "m", 4)

    with scripted(answer) as server:
        return asyncio.run(session(server.url))


def loaded(server_url: str, *names: str, new_tokens: int = 4) -> runs.Loaded:
    kind = Traffic({"1": HELLO}, dict.fromkeys(names, 1.0), new_tokens, requests=3, concurrency=1)
    return runs.run(Target(server_url, timeout_s=10), kind, 1.0, lambda done, what: None)


# ---- server-sent events ------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@given(cuts=st.lists(st.integers(0, 200), max_size=8))
def test_lines_end_in_any_of_three_ways_wherever_packets_are_cut(end: bytes, cuts: list[int]) -> None:
    pretty = b"".join(
        b"data: " + line.encode() + b"\n" for line in json.dumps({"a": ["日本", 1]}, indent=1).split("\n")
    )
    text = b"\xef\xbb\xbf: hi\nid: 1\n\n" + pretty + b"\n" + event({"b": "\u2028"}) + DONE
    raw = text.replace(b"\n", end)
    edges = [0, *sorted(min(c, len(raw)) for c in cuts), len(raw)]
    found = read(*(raw[a:b] for a, b in itertools.pairwise(edges)))
    assert [message for _, message in found] == [{"a": ["日本", 1]}, {"b": "\u2028"}, events.DONE]


def test_a_message_has_the_time_of_its_last_byte_not_of_the_blank_line() -> None:
    assert read(b'data: {"a"', b": 1}\n", b"\n", b'data: {"b": 1}\n\n') == [(1, {"a": 1}), (3, {"b": 1})]


@pytest.mark.parametrize(
    "extra",
    [
        b"data:\n\n",
        b"data: : keepalive\n\n",
        b": OPENROUTER PROCESSING\n\n",
        b'event: ping\ndata: {"type": "ping"}\n\n',
        b'data: {"type": "ping"}\n\n',
        b"event: ping\ndata: pong\n\n",
        b"retry: 3000\n\nid: 7\nevent: message\n\n",
        event({"object": "chat.completion.chunk", "usage": None}),
        event({"choices": None}),
    ],
)
def test_what_keeps_a_stream_alive_is_no_token_and_no_failure(extra: bytes) -> None:
    reply = asked(streamed(TOKEN + extra + TOKEN * 3 + extra + LAST + COUNTS + DONE))
    assert (reply.error, len(reply.times), reply.new_tokens, reply.text) == ("", 4, 4, "ab" * 4)


@pytest.mark.parametrize(
    "stream",
    [
        event(piece("ab", "")) * 4 + DONE,
        event({"choices": [{"delta": {"content": "ab"}}]}) * 4 + DONE,
        TOKEN * 4 + LAST + event({"usage": {"completion_tokens": 4}}) + DONE,
        TOKEN * 4 + LAST,
        (TOKEN * 4 + LAST).replace(b"\n\n", b"\n"),
        event(piece([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}])) * 2
        + event(piece([{"type": "text", "text": "ab"}])) * 2
        + LAST
        + DONE,
        b'data: {"choices":[{"delta":{"content":"\xf0\x9f"},"finish_reason":null}]}\n\n' + TOKEN * 3 + LAST + DONE,
    ],
)
def test_a_stream_that_is_whole_is_an_answer(stream: bytes) -> None:
    reply = asked(streamed(stream))
    assert (reply.error, len(reply.times)) == ("", 4)


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (TOKEN * 3, "ended early, after 3 tokens"),
        (DONE, "ended early, after 0 tokens"),
        (event({"foo": 1}) * 3, "ended early"),
        (TOKEN + b'error: {"code": 500, "message": "no context shift"}\n\n', "no context shift"),
        (TOKEN + b"error: out of memory\n\n", "out of memory"),
        (TOKEN + b'event: error\ndata: {"message": "Overloaded"}\n\n', "Overloaded"),
        (TOKEN + b'{"error": {"message": "engine died"}}\n', "engine died"),
        (TOKEN + event({"error": {"message": "engine died"}}) + DONE, "engine died"),
        (TOKEN + b"<html>bad gateway</html>\n", "garbage"),
        (TOKEN + b"data: {not json\n\n", "garbage"),
        (b"data: [1, 2]\n\n", "garbage"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "garbage"),
    ],
)
def test_a_stream_that_is_not_whole_failed_and_says_why(stream: bytes, says: str) -> None:
    assert says in asked(streamed(stream)).error


@pytest.mark.parametrize("kind", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json"}])
def test_a_stream_is_known_by_its_bytes_whatever_it_is_called(kind: dict[str, str]) -> None:
    reply = asked(lambda body: (200, kind, b"\n: hi\n\n" + WHOLE))
    assert (reply.error, reply.new_tokens) == ("", 4)


def test_what_is_no_stream_fails_in_the_servers_own_words() -> None:
    overloaded = json.dumps({"error": {"message": "Model is overloaded"}}).encode()
    assert "Model is overloaded" in asked(lambda body: (200, {"Content-Type": "application/json"}, overloaded)).error
    assert (
        "does not stream" in asked(lambda body: (200, {"Content-Type": "application/json"}, b'{"choices": []}')).error
    )
    moved = asked(lambda body: (307, {"Location": "https://other.example/v1/"}, b""))
    assert "https://other.example/v1/" in moved.error


def test_half_characters_do_not_leave_the_client() -> None:
    halves = [event(b'{"choices":[{"delta":{"content":"' + half + b'"}}]}') for half in (rb"\ud83d", rb"\ude00")]
    assert asked(streamed(halves[0] + halves[1] + LAST + DONE)).text == "😀"
    reply = asked(lambda body: (500, {}, rb'{"error": {"message": "cannot detokenize \ud83d"}}'))
    assert "cannot detokenize" in reply.error and reply.error.encode()


def test_a_ping_on_tgis_own_protocol_is_skipped() -> None:
    token = {"token": {"id": 1, "text": "a", "special": False}, "details": None}
    last = {**token, "details": {"finish_reason": "length", "generated_tokens": 2, "input_length": 3}}
    reply = asked(streamed(event(token) + event({"type": "wait"}) + event(last)), "tgi")
    assert (reply.error, reply.new_tokens) == ("", 2)


# ---- fields that a server refuses --------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (("stream_options",), "stream_options: Extra inputs are not permitted"),
        (("stream_options", "return_token_ids"), "Extra inputs are not permitted"),
        (("max_tokens",), "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        (("max_tokens", "ignore_eos", "stream_options"), "Extra inputs; use max_completion_tokens, not max_tokens"),
    ],
)
def test_fields_that_a_server_refuses_are_left_out_from_then_on(refused: tuple[str, ...], words: str) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        if any(name in body for name in refused):
            return 422, {}, json.dumps({"error": {"message": words}}).encode()
        return 200, SSE, WHOLE

    with scripted(answer) as server:
        found = loaded(server.url, "m")
        last = server.bodies[-1]
    assert not [r.error for r in found.played.requests if r.error] and len(found.played.requests) == 3
    assert not set(refused) & set(last) and (last.get("max_completion_tokens") or last.get("max_tokens")) == 4


def test_a_request_that_is_refused_for_something_else_keeps_all_fields() -> None:
    async def session(url: str) -> tuple[Reply, bytes, bytes]:
        async with Client(Target(url, timeout_s=10)) as client:
            before = client.encoded(HELLO, "m", 4, False)
            return await client.ask(HELLO, "m", 4), before, client.encoded(HELLO, "m", 4, False)

    with scripted(lambda body: (400, {}, b'{"error": {"message": "the prompt is too long"}}')) as server:
        reply, before, after = asyncio.run(session(server.url))
    assert reply.error == "HTTP 400: the prompt is too long" and before == after


# ---- counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [b"", event({"choices": [], "usage": {"completion_tokens": 0}})])
def test_tokens_that_were_counted_by_message_are_said(counts: bytes) -> None:
    with scripted(streamed(event(piece("four tokens in one")) * 8 + LAST + counts + DONE)) as server:
        found = loaded(server.url, "m", new_tokens=32)
    assert any("usage" in note for note in found.notes)
    assert not any("ignore_eos" in note for note in found.notes), "that answers are short is not known"
    with scripted(streamed(WHOLE)) as server:
        assert not any("usage" in note for note in loaded(server.url, "m").notes)


# ---- the list of models ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "listed",
    [
        (404, '{"detail": "Not Found"}'),
        (403, "{}"),
        (500, "oops"),
        (200, "<html>hello</html>"),
        (200, "[" * 100_000),
        {"object": "list", "data": None},
        {"object": "list", "data": []},
        [{"id": "m"}, {"id": "n"}, {"name": "nameless"}],
    ],
)
def test_a_named_model_is_loaded_whatever_the_list_is(listed: Any) -> None:
    with scripted(streamed(WHOLE), listed) as server:
        assert [r.error for r in loaded(server.url, "m").played.requests] == [""] * 3


def test_an_alias_is_tried_and_said_and_a_wrong_name_is_refused() -> None:
    def answer(body: dict[str, Any]) -> Answer:
        known = body["model"] in ("m", "m-latest")
        return (200, SSE, WHOLE) if known else (404, {}, b'{"error": {"message": "no such model"}}')

    with scripted(answer) as server:
        found = loaded(server.url, "m-latest")
        assert [r.error for r in found.played.requests] == [""] * 3 and any("m-latest" in n for n in found.notes)
        with pytest.raises(BadInput, match="serves no 'm-lates'") as refused:
            loaded(server.url, "m-lates")
    assert "it serves: m" in refused.value.hint


def test_without_a_name_a_list_is_needed() -> None:
    with (
        scripted(streamed(WHOLE), (404, "{}")) as server,
        pytest.raises(BadInput, match="HTTP 404") as refused,
    ):
        loaded(server.url)
    assert "--model" in refused.value.hint
    with scripted(streamed(WHOLE), [{"id": "m"}]) as server:
        loaded(server.url)
        assert server.bodies[-1]["model"] == "m"


# ---- what is kept ------------------------------------------------------------------------------


def test_a_run_keeps_when_it_began_and_what_no_file_can_hold(tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "m.jsonl"
    prompts.write_text('{"id": "1", "prompt": "hi"}\n')
    asked_for = iter(range(100))

    def answer(body: dict[str, Any]) -> Answer:
        good = next(asked_for) < 2
        return (200, SSE, WHOLE) if good else (500, {}, rb'{"error": "half \ud83d"}' + "\u2028".encode())

    with scripted(answer) as server:
        flags = ["--prompts", prompts, "--requests", 3, "--concurrency", 1, "--new-tokens", 4, "--out", out]
        assert command("load", server.url, *flags) == 0
        assert command("load", server.url, *flags) == 4
    first, second = lines_of(out)
    assert [bool(r["error"]) for r in first.values["requests"]] == [False, False, True, True]
    began = [datetime.fromisoformat(m.values["started"]) for m in (first, second)]
    assert began[0] < began[1] <= datetime.fromisoformat(second.at) and began[0].tzinfo
