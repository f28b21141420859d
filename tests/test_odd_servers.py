"""What a server may answer: one odd reply is one failed request with its reason, and none ends a run or hangs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command, errors
from helpers.raw_server import CHUNKED, SSE, Write, answering, at_once, broken_off, dripping, endless, http
from helpers.records import lines_of
from helpers.scripted import COUNTS, DONE, LAST, LISTED, TOKEN, WHOLE, event, piece
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.errors import BROKEN, MissingEnvironment
from peftopt.gateway.upstream import Fault, Timeouts, Upstream
from peftopt.loadtest import client, events, prometheus, protocols
from peftopt.loadtest import http as http_client
from peftopt.watch.sources import fetching, scrape

MIB = 2**20
ODD = 3
"""The request that is answered oddly, from 0; request 0 is the warm-up."""


def usage(text: str) -> bytes:
    return TOKEN * 4 + LAST + event(b'{"choices": [], "usage": ' + text.encode() + b"}") + DONE


def counted(text: str) -> bytes:
    return usage(f'{{"prompt_tokens": 5, "completion_tokens": {text}}}')


STREAMS = {
    "a count of tokens is NaN": counted("NaN"),
    "a count of tokens is Infinity": counted("1e400"),
    "a count of tokens is [4]": counted("[4]"),
    'a count of tokens is "4"': counted('"4"'),
    "a count of tokens is -1": counted("-1"),
    "a count of tokens is true": counted("true"),
    "a count of tokens is 1000": counted("1" + "0" * 400),
    "garbage in the answer": counted("1" + "0" * 5000),
    "usage is NaN, not a mapping": usage("NaN"),
    "usage is [1], not a mapping": usage("[1]"),
    'usage is "four", not a mapping': usage('"four"'),
    "the stream ended early, after 0 tokens": event({"id": "1"}) * 3 + DONE,
    "choices is 5, not a list": event({"choices": 5}),
    'choices is {"0": {}}, not a list': event({"choices": {"0": {}}}),
    "a choice is [1], not a mapping": event({"choices": [[1]]}),
    'delta is "ab", not a mapping': event({"choices": [{"delta": "ab"}]}),
    "content is 7, not a text": event(piece(7)),
    'ids of tokens are "abc", not a list': event({"choices": [{"delta": {"content": "a"}, "token_ids": "abc"}]}),
    "the id of a token is -1": event({"choices": [{"delta": {"content": "a"}, "token_ids": [1, -1]}]}),
    'finish_reason is ["stop"], not a text': TOKEN + event(piece(None, ["stop"])),  # type: ignore[arg-type]
    "a part of content is 1, not a mapping": event(piece([1, 2])),
    "a message is [1, 2], not a mapping": event([1, 2]),
    "RecursionError": event(b"[" * 200_000 + b"]" * 200_000),
}
CHUNK_OF_TWO = CHUNKED + b"%x\r\n" % len(TOKEN * 2) + TOKEN * 2 + b"\r\n"
WRITES: dict[str, Write] = {
    **{says: at_once(SSE + stream) for says, stream in STREAMS.items()},
    "a message longer than 1048576 bytes": endless(SSE + b"data: ", b"x", most=100 * MIB),
    "the answer is longer than 2 MiB": endless(SSE, TOKEN, most=100 * MIB),
    "connection lost after 2 tokens": at_once(CHUNK_OF_TWO),
    "connection lost": broken_off(CHUNK_OF_TWO),
    "HTTP 502: bad gateway": at_once(http(b"bad gateway", "502 Bad Gateway", "text/plain")),
    "HTTP 500: xxx": endless(b"HTTP/1.1 500 Oh\r\nConnection: close\r\n\r\n", b"x"),
    "HTTP 307: it redirects to http://127.0.0.1:1/": at_once(
        http(b"", "307 Temporary Redirect", more="Location: http://127.0.0.1:1/\r\n")
    ),
    "does not stream": endless(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"{", most=2 * MIB),
    "no answer within 2 s": dripping(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 300, 30),
}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "prompt": f"count to {n}"}) + "\n" for n in range(5)))
    return path


@pytest.mark.parametrize("says", WRITES)
def test_one_odd_reply_is_one_failed_request_and_all_others_are_kept(
    says: str,
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_client, "MOST_BYTES", 2 * MIB)
    out = tmp_path / "measurements.jsonl"
    usual = at_once(SSE + WHOLE)
    with answering(lambda number: WRITES[says] if number == ODD else usual) as url:
        flags = ["--prompts", questions, "--requests", 7, "--concurrency", 1, "--new-tokens", 4, "--timeout", 2]
        code = command("load", url, *flags, "--out", out, "--json")
    captured = capsys.readouterr()
    assert code == 0 and "Traceback" not in captured.err
    (kept,) = lines_of(out)
    failed = [r["error"] for r in kept.values["requests"] if r["error"]]
    assert len(failed) == 1 and says in failed[0], failed
    assert len(kept.values["requests"]) == 8 and len(failed[0]) < 400
    figures = json.loads(captured.out)["figures"]
    assert (figures["requests"], figures["failed"]) == (7, 1)


def test_a_server_that_only_answers_oddly_has_measured_nothing(
    questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(lambda number: at_once(SSE + counted("[4]"))) as url:
        assert command("load", url, "--prompts", questions, "--requests", 3, "--concurrency", 1) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_text_that_is_not_utf_8_is_an_answer_with_marks_in_it(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = event(b'{"choices": [{"delta": {"content": "caf\xe9 \xff"}}]}') + TOKEN * 3 + LAST + COUNTS + DONE
    with answering(lambda number: at_once(SSE + stream)) as url:
        assert command("load", url, "--prompts", questions, "--requests", 2, "--concurrency", 1, "--new-tokens", 4) == 0
    capsys.readouterr()


# ---- what a server says of itself --------------------------------------------------------------


def test_a_list_of_models_that_drips_in_is_given_up_within_the_timeout(
    questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each drop comes in time; the whole would take half a minute, and then be right."""
    slow = dripping(http(json.dumps(LISTED).encode()))
    with answering(models=slow) as url:
        assert command("load", url, "--prompts", questions, "--timeout", 1) == 4
    assert "no whole list of models within 1 s" in errors(capsys)


def test_a_list_of_models_without_an_end_takes_no_memory(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with answering(models=endless(http(b"")[:-2].replace(b"Content-Length: 0\r\n", b"") + b"\r\n", b" ")) as url:
        assert command("load", url, "--prompts", questions, "--timeout", 60) == 4
    assert "longer than 64 MiB" in errors(capsys)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 300 * 1024, "64 MiB are held once or twice, and 400 are sent"


@pytest.mark.parametrize(
    "metrics",
    [
        dripping(http(b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 1\n", kind="text/plain")),
        endless(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n# TYPE a gauge\n", b"a 1\n"),
        at_once(http(b"# TYPE a gauge\nvllm:num_requests_running NaN\nvllm:request_queue_time_seconds_count 1e400\n")),
        at_once(http(b"# TYPE a gauge\n\xff\xfe{{{ 1 2 3\n", "500 Oh")),
    ],
    ids=["drips", "endless", "odd numbers", "5xx"],
)
def test_metrics_that_are_no_use_are_left_out(
    metrics: Write, questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "MOST_BYTES", 2 * MIB)
    usual = at_once(SSE + WHOLE)
    flags = ["--prompts", questions, "--requests", 3, "--concurrency", 1, "--new-tokens", 4, "--timeout", 1, "--json"]
    with answering(lambda number: usual, metrics=metrics) as url:
        assert command("load", url, *flags) == 0
    engine = json.loads(capsys.readouterr().out)["engine"]
    assert not any(engine.values()), engine


def test_a_watched_server_that_drips_or_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "LONGEST_S", 1.0)
    with answering(metrics=dripping(http(b"x" * 300))) as url, pytest.raises(MissingEnvironment, match="within 1 s"):
        fetching.get(url, "/metrics", "", "hint")
    monkeypatch.setattr(fetching, "LONGEST_S", 60.0)
    monkeypatch.setattr(http_client, "MOST_BYTES", 2 * MIB)
    forever = endless(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"x\n")
    with answering(metrics=forever) as url, pytest.raises(MissingEnvironment, match="longer than 2 MiB"):
        fetching.get(url, "/metrics", "", "hint")


@pytest.mark.parametrize("text", [b"a b c d e f\n", b'a{x="1', b"\xff\xfe", b"# TYPE a histogram\na_bucket 1\n", b"{}"])
def test_watch_names_metrics_that_are_none(text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peftopt.watch.sources.server import Server

    with answering(metrics=at_once(http(text, kind="text/plain"))) as url, pytest.raises(MissingEnvironment):
        Server(url, None).read(1.0).__next__()  # type: ignore[arg-type]


# ---- the gateway's engine ----------------------------------------------------------------------


def asked_of_engine(write: Write) -> tuple[tuple[int, bytes], Fault | None]:
    """What the gateway hears of /metrics, and the fault of a request that is answered the same way."""

    async def session(url: str) -> tuple[tuple[int, bytes], Fault | None]:
        async with Upstream(url, Timeouts(first=5, gap=5)) as upstream:
            status = await upstream.get("/metrics", limit_s=2)
            try:
                async with upstream.ask("/v1/chat/completions", b"{}", {}) as answer:
                    await answer.whole(MIB)
            except Fault as fault:
                return status, fault
            return status, None

    with answering(lambda number: write, metrics=write) as url:
        return asyncio.run(session(url))


def test_the_gateway_follows_no_redirect_of_its_engine() -> None:
    """A user's prompt would go to where the engine says."""
    elsewhere: list[int] = []

    def other(number: int) -> Write:
        elsewhere.append(number)
        return at_once(http(b"{}"))

    with answering(other, metrics=at_once(http(b"a 1\n"))) as there:
        moved = at_once(http(b"", "307 Temporary Redirect", more=f"Location: {there}/metrics\r\n"))
        (status, _), fault = asked_of_engine(moved)
    assert status == 307 and not elsewhere
    assert fault and fault.kind == "upstream" and there in fault.detail and there not in str(fault)


def test_an_engine_that_never_ends_takes_no_memory_of_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftopt.gateway.upstream.MOST_ANSWER_BYTES", MIB)
    (status, why), fault = asked_of_engine(endless(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"x"))
    assert status == 0 and b"more than" in why
    assert fault and "more than" in str(fault)


# ---- what is read of a reply, whatever it is ---------------------------------------------------

OF_STREAMS = ("choices", "usage", "delta", "content", "token_ids", "finish_reason", "text", "token", "details", "id")
OTHERS = ("tokens", "prompt_tokens", "completion_tokens", "stop", "stop_type", "error", "message", "data", "models")
WORDS = (*OF_STREAMS, *OTHERS, "generated_text", "generated_length", "prompt_length")
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=5),
    st.just("\ud800"),
    st.just(10**400),
)
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=3))
REPLIES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(protocols.NAMES), REPLIES)
def test_any_json_is_a_message_or_garbage(protocol: str, reply: Any) -> None:
    try:
        found = protocols.module(protocol).read(reply)
    except BROKEN:
        return
    assert isinstance(found.text, str) and isinstance(found.error, str) and isinstance(found.finish, str)
    assert all(type(each) is int for each in found.ids)
    for number in (found.prompt_tokens, found.new_tokens):
        assert number is None or (type(number) is int and 0 <= number <= protocols.MOST_TOKENS)
    answer = client.Reply(sent=0)
    answer.add(found, 1)
    assert math.isfinite(answer.new_tokens)


@settings(max_examples=100, deadline=None)
@given(REPLIES)
def test_any_json_is_a_list_of_models_or_is_none(reply: Any) -> None:
    try:
        listed = client._models(reply)
    except BROKEN:
        return
    assert all(isinstance(model["id"], str) for model in listed)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.binary(max_size=40) | st.sampled_from([TOKEN, DONE, b"data: {", b"\n", b"\r", b"data: [\n"]), max_size=8
    )
)
def test_any_bytes_are_messages_or_garbage(pieces: list[bytes]) -> None:
    async def arriving() -> AsyncIterator[tuple[int, bytes]]:
        for number, each in enumerate(pieces):
            yield number, each

    async def whole() -> None:
        async for _ in events.messages(arriving()):
            pass

    with contextlib.suppress(BROKEN):
        asyncio.run(whole())


NAMES = [*(name for names in prometheus.GAUGES.values() for name in names), prometheus.BUSY, prometheus.DECODES]
NAMES += [f"{name}{end}" for name in prometheus.QUEUES for end in ("_sum", "_count")]
NUMBERS = st.one_of(st.floats().map(str), st.text(max_size=4), st.just("1" + "0" * 400), st.just("1e308"))
METRICS = st.lists(st.tuples(st.sampled_from(NAMES), NUMBERS).map(" ".join) | st.text(max_size=20), max_size=8)


@settings(max_examples=100, deadline=None)
@given(METRICS, METRICS)
def test_any_metrics_have_an_account_of_finite_numbers(before: list[str], after: list[str]) -> None:
    first, last = (prometheus.totals("\n".join(lines)) for lines in (before, after))
    account = prometheus.summary([prometheus.moment(first), prometheus.moment(last)], first, last)
    values = [account.queue_ms, account.busy, *(g.mean for g in (account.running, account.kv_cache) if g)]
    assert all(value is None or math.isfinite(value) for value in values)
    try:
        look = scrape.of_text("\n".join(after) + "\n", 1.0, NAMES)
    except BROKEN:
        return
    assert all(math.isfinite(value) for _, _, value in look.series())
    assert scrape.growth(look, look).total(NAMES[0]) == 0.0
