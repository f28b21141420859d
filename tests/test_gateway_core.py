"""The gateway's pure core: who goes on, who waits, which version answers, what a stream says."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt.errors import BadInput
from peftopt.gateway import keys
from peftopt.gateway.frames import Frames
from peftopt.gateway.lines import Line, Log
from peftopt.gateway.routes import Route, Table, Version

# ---- routes ------------------------------------------------------------------------------------

OLD, NEW = Version("aaa", "support@aaa"), Version("bbb", "support@bbb")


def test_a_user_keeps_the_arm_and_the_share_of_users_is_the_weight() -> None:
    route = Route(OLD, NEW, 0.1)
    chosen = [route.choose(f"user-{n}")[0] for n in range(5000)]
    assert chosen == [route.choose(f"user-{n}")[0] for n in range(5000)]
    assert 0.08 < chosen.count("canary") / 5000 < 0.12
    more = Route(OLD, NEW, 0.3)
    assert all(more.choose(f"user-{n}")[0] == "canary" for n, arm in enumerate(chosen) if arm == "canary")


def test_a_canary_is_promoted_or_rolled_back_and_a_live_one_goes_back_to_the_one_before() -> None:
    route = Route(OLD, NEW, 0.1)
    assert route.promoted() == Route(NEW, previous=OLD)
    assert route.rolled_back() == Route(OLD)
    assert route.promoted().rolled_back() == Route(OLD, previous=NEW)
    for nothing in (Route(OLD).promoted, Route(OLD).rolled_back):
        with pytest.raises(LookupError):
            nothing()


def test_every_version_that_a_route_names_stays_loaded() -> None:
    table = Table().with_route("support", Route(OLD, NEW, 0.1)).with_route("base", Route(Version("", "base")))
    assert table.served() == {"support@aaa": "support", "support@bbb": "support", "base": "base"}
    assert table.without("support").served() == {"base": "base"}


# ---- keys --------------------------------------------------------------------------------------


def test_a_key_is_known_by_its_hash_and_may_do_what_its_line_says() -> None:
    hashed = hashlib.sha256(b"secret").hexdigest()
    known = keys.parse(f"# ours\n{hashed} team adapters=support,sales rate=2/s\n", "keys.txt")
    key = known.of("Bearer secret")
    assert key and key.name == "team" and key.may_ask("sales") and not key.may_ask("base")
    assert known.of("Bearer other") is None and known.of("") is None and known.of("Basic secret") is None
    assert [key.wait_s(0.0) > 0 for _ in range(3)] == [False, False, True], "two a second"
    assert key.wait_s(1.0) == 0.0
    assert keys.Keys().of("") is keys.ANYONE


@pytest.mark.parametrize(
    "line",
    [
        "secret team",
        "",
        f"{'a' * 64}",
        f"{'a' * 64} team rate=fast",
        f"{'a' * 64} team rate=0/s",
        f"{'a' * 64} t rate=1.2.3/s",
    ],
)
def test_a_file_of_keys_that_is_none_says_which_line(line: str) -> None:
    with pytest.raises(BadInput, match="keys"):
        keys.parse(line, "keys.txt")


# ---- frames ------------------------------------------------------------------------------------


def message(**value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


ROLE = message(choices=[{"delta": {"role": "assistant", "content": ""}}])
WORD = message(choices=[{"delta": {"content": "a\n\nb"}}])
LAST = message(choices=[{"delta": {}, "finish_reason": "stop"}])
USAGE = message(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 2}, metrics={"queue_time_ms": 1.5})
STREAM = ROLE + WORD + WORD + LAST + USAGE + b"data: [DONE]\n\n"


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=12), st.booleans())
def test_a_stream_is_understood_however_it_is_cut(cuts: list[int], carriage: bool) -> None:
    stream = STREAM.replace(b"\n\n", b"\r\n\r\n") if carriage else STREAM
    at = sorted({0, *cuts, len(stream)})
    frames = Frames()
    for start, end in pairwise(at):
        frames.add(stream[start:end])
    ended = frames.ended()
    assert frames.messages == 6 and frames.done and frames.first_token
    assert (ended.finish, ended.prompt_tokens, ended.new_tokens) == ("stop", 5, 2)
    assert ended.metrics == {"queue_time_ms": 1.5} and ended.error == ""


def test_the_first_token_is_not_the_role() -> None:
    frames = Frames()
    frames.add(ROLE)
    assert not frames.first_token
    frames.add(WORD)
    assert frames.first_token


def test_an_error_in_a_stream_is_heard_and_garbage_is_passed_over() -> None:
    frames = Frames()
    frames.add(WORD + b"data: {not json\n\n" + message(error={"message": "EngineCore died"}))
    assert frames.ended().error == "EngineCore died" and not frames.done


@pytest.mark.parametrize(
    "data", ["[" * 60_000, '{"choices": 5}', '{"choices": [5]}', '{"choices": [{"delta": 5}]}', "5"]
)
def test_nonsense_in_a_stream_is_passed_over(data: str) -> None:
    frames = Frames()
    frames.add(f"data: {data}\n\ndata: [DONE]\n\n".encode())
    assert frames.done and frames.messages == 2 and frames.ended().new_tokens is None


def test_the_account_that_llamacpp_gives_of_a_request_is_read() -> None:
    frames = Frames()
    frames.add(WORD + message(choices=[], timings={"prompt_ms": 60.0, "predicted_ms": 80.0}) + b"data: [DONE]\n\n")
    assert frames.ended().metrics == {"time_to_first_token_ms": 60.0, "generation_time_ms": 80.0}


# ---- lines -------------------------------------------------------------------------------------


def a_line(**more: object) -> Line:
    return Line("r", arrived=10.0, at=1e9, adapter="support", **more)  # type: ignore[arg-type]


def test_a_line_says_where_a_requests_time_went() -> None:
    line = a_line(waited=0.1, sent=10.1, first=10.3, last=10.9, done=11.0, new_tokens=4, status=200)
    said = line.as_json()
    assert said["request_duration_ms"] == 1000 and said["queue_gateway_ms"] == 100 == said["queue_time_ms"]
    assert said["ttft_ms"] == 300 and said["tpot_ms"] == 200 and said["generation_latency_ms"] == 900
    line.engine = {"queue_time_ms": 50.0, "time_to_first_token_ms": 100.0, "generation_time_ms": 600.0}
    said = line.as_json()
    assert said["queue_time_ms"] == 150 and said["queue_engine_ms"] == 50 and said["generation_latency_ms"] == 700
    assert said["sources"]["generation_latency_ms"] == "engine"


def test_a_log_that_is_full_is_set_aside_and_no_line_is_lost(tmp_path) -> None:
    log = Log(str(tmp_path / "requests.jsonl"), rotate_bytes=3000)
    for _ in range(20):
        log.write(a_line(done=11.0))
    log.close()
    files = sorted(tmp_path.glob("requests.jsonl*"))
    read = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(read) == 20 == log.written and len(files) > 1 and not log.lost


def test_a_log_that_cannot_be_set_aside_goes_on(tmp_path, monkeypatch) -> None:
    """As in a folder of another user's, where the file itself may be written."""

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.rename", denied)
    log = Log(str(tmp_path / "requests.jsonl"), rotate_bytes=3000)
    for _ in range(20):
        log.write(a_line(done=11.0))
    log.close()
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 20 and not log.lost


def test_a_log_that_cannot_be_written_loses_lines_and_counts_them(tmp_path, monkeypatch) -> None:
    log = Log(str(tmp_path / "requests.jsonl"))
    log.write(a_line(done=11.0))
    with monkeypatch.context() as full:

        def no_space(fd: int, text: bytes) -> int:
            raise OSError(28, "No space left on device")

        full.setattr("os.write", no_space)
        log.write(a_line(done=11.0))
    log.write(a_line(done=11.0))
    assert (log.written, log.lost) == (2, 1)
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 2
