"""Who goes on, who waits and who is refused, and the limits that say so: the gateway's pure core."""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt import environments
from peftopt.environments.llamacpp import SERVER
from peftopt.errors import BadInput
from peftopt.gateway import backends, limits
from peftopt.gateway.admission import Admission, Refused, Ticket
from peftopt.gateway.backends import Wanted
from peftopt.gateway.limits import Held, Limits
from peftopt.records import Model

NAMES = st.sampled_from("abc")


def room(running: int, waiting: int, **more: float) -> Admission:
    return Admission(Limits(running=running, waiting=waiting, **more))


def refusal(admission: Admission, ticket: Ticket, now: float = 0.0) -> Refused | None:
    """Take a request in; why it is refused, None where it is not."""
    admission.arrive(ticket, now)
    return ticket.refused


def served(admission: Admission, inside: list[Ticket], tokens: int) -> list[str]:
    """Answer those that are inside, and whoever goes on then, until nobody is left; whose requests, in order."""
    order = []
    while inside:
        ticket = inside.pop(0)
        order.append(ticket.adapter)
        inside += admission.leave(ticket, tokens, 2.0)
    return order


# ---- who comes in ------------------------------------------------------------------------------


def test_without_limits_everybody_goes_on() -> None:
    admission, tickets = Admission(Limits()), [Ticket("a") for _ in range(100)]
    assert not any(refusal(admission, ticket) for ticket in tickets)
    assert not any(ticket.waits for ticket in tickets) and admission.running == 100


def test_who_is_one_too_many_waits_and_who_is_more_than_that_is_refused() -> None:
    admission = room(1, 1)
    first, second, third = (Ticket("a") for _ in range(3))
    assert refusal(admission, first) is None and not first.waits
    assert refusal(admission, second) is None and second.waits
    refused = refusal(admission, third)
    assert refused and refused.reason == "waiting" and refused.retry_s >= 1
    assert admission.leave(first, 10, 1.0) == [second] and second.admitted == 1.0


def test_a_wait_that_would_be_too_long_is_refused_at_once_and_names_where_the_limit_is_from() -> None:
    admission = room(1, 100, wait_ms=1000.0, rate=2.0, source="run 20261128-demo")
    assert [refusal(admission, Ticket("a")) for _ in range(3)] == [None] * 3, "two wait, a second at 2 requests/s"
    refused = refusal(admission, Ticket("a"))
    assert refused and refused.reason == "wait" and "run 20261128-demo" in refused.said and refused.retry_s >= 1


def test_one_that_took_long_to_come_in_has_less_of_its_limit_left() -> None:
    """Its body took 600 ms of the second: half a second more would be too late."""
    admission = room(1, 100, wait_ms=1000.0, rate=2.0)
    admission.arrive(Ticket("a"), 10.0)
    refused = refusal(admission, Ticket("a", arrived=9.4), 10.0)
    assert refused and refused.reason == "wait"
    assert refusal(admission, Ticket("a", arrived=9.6), 10.0) is None


def test_an_engine_that_is_slower_than_it_was_makes_the_wait_longer() -> None:
    """It is known for ten a second and gives one: two that wait take two seconds."""
    admission = room(1, 100, wait_ms=1500.0, rate=10.0)
    inside = [Ticket("a")]
    admission.arrive(inside[0], 0.0)
    for second in range(1, 12):
        admission.arrive(Ticket("a"), second - 0.5)
        inside = admission.leave(inside[0], 5, float(second))
    assert refusal(admission, Ticket("a"), 11.0) is None
    refused = refusal(admission, Ticket("a"), 11.0)
    assert refused and refused.reason == "wait"


def test_a_quiet_hour_does_not_make_an_engine_slow() -> None:
    """How fast requests left an engine that had room says how fast they came."""
    admission = room(2, 100, wait_ms=1000.0, rate=10.0)
    for hour in range(20):
        both = [Ticket("a"), Ticket("a")]
        for ticket in both:
            admission.arrive(ticket, 3600.0 * hour)
        for ticket in both:
            admission.leave(ticket, 5, 3600.0 * hour + 0.1)
    assert [refusal(admission, Ticket("a"), 72_000.0) for _ in range(8)] == [None] * 8


def test_one_who_leaves_the_queue_lets_nobody_in_and_is_not_there_any_more() -> None:
    admission = room(1, 5)
    running, gone, next_ = Ticket("a"), Ticket("a"), Ticket("a")
    for ticket in (running, gone, next_):
        admission.arrive(ticket, 0.0)
    assert admission.leave(gone, 0, 1.0) == [] and admission.waiting == 1
    assert admission.leave(running, 5, 2.0) == [next_]


def test_one_that_has_waited_as_long_as_it_may_is_refused_and_gone() -> None:
    admission = room(1, 5, wait_ms=500.0)
    running, late = Ticket("a"), Ticket("a")
    for ticket in (running, late):
        admission.arrive(ticket, 1.0)
    assert admission.may_wait_s(late, 1.2) == pytest.approx(0.3)
    assert admission.give_up(late, 1.5) == [] and late.refused and late.refused.reason == "wait"
    assert admission.waiting == 0 and admission.leave(running, 5, 2.0) == []


def test_caps_hold_for_one_adapter_and_for_one_key() -> None:
    admission, first = Admission(Limits(), per_adapter=2, per_key=3), Ticket("a", "k")
    assert [refusal(admission, ticket) for ticket in (first, Ticket("a", "k"))] == [None, None]
    refused = refusal(admission, Ticket("a", "other"))
    assert refused and refused.reason == "adapter"
    assert refusal(admission, Ticket("b", "k")) is None
    refused = refusal(admission, Ticket("c", "k"))
    assert refused and refused.reason == "key"
    admission.leave(first, 5, 1.0)
    assert refusal(admission, Ticket("a", "k")) is None, "there is room again"


# ---- whose turn it is --------------------------------------------------------------------------


def test_an_adapter_that_is_new_does_not_go_before_one_that_has_long_been_served() -> None:
    """Nobody waited when it came: it starts level with the one that has gone on last, not at nothing."""
    admission, old, new = room(1, 100), Ticket("old"), Ticket("new")
    admission.arrive(old, 0.0)
    admission.leave(old, 1_000_000, 1.0)
    admission.arrive(new, 1.0)
    for adapter in ["new"] * 20 + ["old"]:
        admission.arrive(Ticket(adapter), 1.0)
    assert served(admission, [new], 10).index("old") <= 2


def test_one_that_comes_back_has_saved_nothing_up() -> None:
    """It was away while the other was served a thousand times: from then on they take turns."""
    admission, busy, back = room(1, 1000), Ticket("busy"), Ticket("back")
    admission.arrive(back, 0.0)
    admission.leave(back, 10, 0.0)
    admission.arrive(busy, 0.0)
    for _ in range(1000):
        admission.arrive(Ticket("busy"), 0.0)
        (busy,) = admission.leave(busy, 10, 0.0)
    for adapter in ["busy"] * 10 + ["back"] * 10:
        admission.arrive(Ticket(adapter), 1.0)
    first = Counter(served(admission, [busy], 10)[1:13])
    assert abs(first["busy"] - first["back"]) <= 2


def test_an_adapter_that_sends_ten_times_its_share_does_not_make_the_others_wait_for_it() -> None:
    admission, first = room(1, 1000), Ticket("loud")
    for ticket in [first, *(Ticket("loud") for _ in range(100)), Ticket("quiet")]:
        admission.arrive(ticket, 0.0)
    order = served(admission, [first], 10)
    assert len(order) == 102
    assert "quiet" in order[:3], "one that runs and one more are all that it may wait for"


def test_long_answers_are_charged_when_they_go_on_and_not_only_at_their_end() -> None:
    """Both have answers of a hundred tokens. Of ten places one gets five, though none of its requests has ended."""
    admission = room(10, 1000)
    for name in ("one", "two"):
        ticket = Ticket(name)
        admission.arrive(ticket, 0.0)
        admission.leave(ticket, 100, 0.0)
    fillers = [Ticket("filler") for _ in range(10)]
    for ticket in fillers:
        admission.arrive(ticket, 0.0)
    for name in ["one"] * 20 + ["two"] * 20:
        admission.arrive(Ticket(name), 0.0)
    gone_on = Counter(ticket.adapter for filler in fillers for ticket in admission.leave(filler, 1, 1.0))
    assert gone_on == {"one": 5, "two": 5}


def test_what_a_request_took_counts_once() -> None:
    """One has answers of a hundred tokens, the other of ten: it gets ten for one."""
    admission, inside = room(1, 1000), Ticket("short")
    for ticket in [inside] + [Ticket("short") for _ in range(110)] + [Ticket("long") for _ in range(20)]:
        admission.arrive(ticket, 0.0)
    got: Counter[str] = Counter()
    for _ in range(110):
        tokens = 100 if inside.adapter == "long" else 10
        got[inside.adapter] += 1
        (inside,) = admission.leave(inside, tokens, 1.0)
    assert 9 <= got["long"] <= 11


def test_the_first_of_an_adapter_to_come_is_the_first_to_go_on() -> None:
    admission, tickets = room(1, 10), [Ticket("a") for _ in range(5)]
    for ticket in tickets:
        admission.arrive(ticket, 0.0)
    assert [admission.leave(ticket, 5, 1.0) for ticket in tickets] == [*([t] for t in tickets[1:]), []]


def test_one_that_fills_the_room_gives_up_a_place_of_its_own() -> None:
    admission = room(1, 4)
    loud = [Ticket("loud") for _ in range(5)]
    for ticket in loud:
        admission.arrive(ticket, 0.0)
    quiet = Ticket("quiet")
    assert loud[-1] in admission.arrive(quiet, 0.0), "it is told at once"
    assert quiet.waits and loud[-1].refused and loud[-1].refused.reason == "waiting"
    assert admission.waiting == 4 and refusal(admission, Ticket("loud")) is not None


def test_a_short_queue_of_ones_own_is_not_refused_for_the_long_one_of_another() -> None:
    """Ten of the other's wait a second each, and a second is allowed; this one goes on after one of them."""
    admission = room(1, 100, wait_ms=2000.0, rate=1.0)
    for _ in range(3):
        admission.arrive(Ticket("loud"), 0.0)
    assert (refusal(admission, Ticket("loud")) or Refused("", 0, "")).reason == "wait"
    assert refusal(admission, Ticket("quiet")) is None


# ---- whatever comes ----------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), NAMES, st.integers(0, 9)),
        st.tuples(st.sampled_from(["leave", "give up", "go away"]), st.integers(0, 99), st.integers(0, 50)),
    ),
    max_size=120,
)


@given(STEPS, st.integers(1, 3), st.integers(0, 6), st.sampled_from([0.0, 300.0]))
def test_every_request_is_answered_or_refused_whatever_comes(
    steps: list[tuple[str, object, int]], running: int, waiting: int, wait_ms: float
) -> None:
    """Never more run or wait than may; within an adapter the first to come is the first to go on; who is told of a fate
    has one; counters never fall while their adapter waits; in the end nobody is left."""
    admission, now = room(running, waiting, wait_ms=wait_ms, rate=5.0), 0.0
    tickets: list[Ticket] = []
    ended: set[int] = set()
    told: list[Ticket] = []
    order: defaultdict[str, list[int]] = defaultdict(list)

    def hear(fates: list[Ticket]) -> None:
        told.extend(fates)
        for ticket in fates:
            assert not ticket.waits
            if not ticket.refused:
                order[ticket.adapter].append(tickets.index(ticket))

    def end(number: int, tokens: int, given_up: bool = False) -> None:
        ended.add(number)
        leave = admission.give_up(tickets[number], now) if given_up else admission.leave(tickets[number], tokens, now)
        hear(leave)

    for what, which, number in steps:
        now += number / 10
        if what == "arrive":
            tickets.append(Ticket(str(which)))
            hear(admission.arrive(tickets[-1], now))
        else:
            there = [n for n, ticket in enumerate(tickets) if n not in ended and not ticket.refused]
            queued = [n for n in there if tickets[n].waits]
            of = {"leave": [n for n in there if n not in queued], "give up": queued, "go away": there}[what]
            if of:
                end(of[int(str(which)) % len(of)], number, what == "give up")
        inside = [t for n, t in enumerate(tickets) if n not in ended and not t.refused]
        assert admission.running == sum(not ticket.waits for ticket in inside) <= running
        assert admission.waiting == sum(ticket.waits for ticket in inside) <= waiting
        assert not admission.waiting or admission.running == running, "nobody waits where there is room"
    while there := [n for n, t in enumerate(tickets) if n not in ended and not t.waits and not t.refused]:
        end(there[0], 5)
    assert admission.running == admission.waiting == 0
    assert all(ticket.refused or not math.isnan(ticket.admitted) for n, ticket in enumerate(tickets) if n not in ended)
    assert all(numbers == sorted(numbers) for numbers in order.values())
    assert len(set(map(id, told))) == len(told), "each is told once"


@given(
    st.lists(st.floats(0.0, 0.5), min_size=1, max_size=60),
    st.integers(1, 4),
    st.floats(0.5, 20.0),
    st.floats(0.0, 3.0),
)
def test_no_request_is_refused_that_could_have_been_answered_in_time(
    gaps: list[float], running: int, rate: float, wait_s: float
) -> None:
    """An engine with so many places that gives `rate` a second when it is full. One that is refused would have gone on
    after its limit, had it waited, or too late for one more to be answered before: how far those that run have come is
    not known."""
    carried = Held(rate, running / rate, "ttft <= 1 s", wait_s, 0.0, "test").limits()
    admission = Admission(Limits(running, carried.waiting, carried.wait_ms, carried.rate))
    takes_s, now = running / rate, 0.0
    ends: list[tuple[float, int, Ticket]] = []
    goes_on: list[float] = [0.0] * running
    """When each place is free, were everybody taken in that was."""

    def pass_until(moment: float) -> None:
        while ends and ends[0][0] <= moment:
            at, _, ticket = heapq.heappop(ends)
            for other in admission.leave(ticket, 5, at):
                heapq.heappush(ends, (at + takes_s, id(other), other))

    for gap in gaps:
        now += gap
        pass_until(now)
        ticket = Ticket("a")
        admission.arrive(ticket, now)
        free = max(now, heapq.heappop(goes_on))
        if ticket.refused:
            heapq.heappush(goes_on, free)
            assert free - now > wait_s - takes_s - 1e-9, "a place would have been free in time"
            continue
        heapq.heappush(goes_on, free + takes_s)
        if not ticket.waits:
            heapq.heappush(ends, (now + takes_s, id(ticket), ticket))


@given(st.lists(st.tuples(NAMES, st.integers(1, 50)), min_size=2, max_size=60), st.integers(1, 3))
def test_adapters_that_wait_are_served_alike(sent: list[tuple[str, int]], running: int) -> None:
    """Two that both have requests waiting all the time are at most so far apart as VTC's bound says: what may run at
    once, twice, of the largest request."""
    admission, took = room(running, 1000), {}
    tickets = []
    for adapter, tokens in sent:
        ticket = Ticket(adapter)
        took[ticket] = tokens
        tickets.append(ticket)
        admission.arrive(ticket, 0.0)
    inside = [ticket for ticket in tickets if not ticket.waits]
    got: Counter[str] = Counter()
    left = Counter(ticket.adapter for ticket in tickets if ticket.waits)
    backlogged = set(left)
    while inside and all(left[name] for name in backlogged):
        ticket = inside.pop(0)
        got[ticket.adapter] += took[ticket]
        for other in admission.leave(ticket, took[ticket], 1.0):
            left[other.adapter] -= 1
            inside.append(other)
    most = max(took.values())
    before = running * most
    """What those took that were there before anybody waited."""
    for one in backlogged:
        for other in backlogged:
            assert got[one] - got[other] <= 2 * (running + 1) * most + before


# ---- limits ------------------------------------------------------------------------------------


def test_limits_are_read_and_what_is_none_is_named() -> None:
    assert limits.parse("off") == Limits() == limits.parse("")
    read = limits.parse("running=32,waiting=64,wait=400ms,rate=2.5/s")
    assert (read.running, read.waiting, read.wait_ms, read.rate) == (32, 64, 400.0, 2.5)
    assert limits.parse("running=1,wait=2s").wait_ms == 2000
    for wrong in ("running", "running=x", "waiting=3", "running=3ms", "wait=400,running=1", "running=1,running=2"):
        with pytest.raises(BadInput):
            limits.parse(wrong)


@pytest.mark.parametrize("text", ["running=0.5", "running=2,waiting=1.5", "running=0"])
def test_a_limit_that_would_be_none_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        limits.parse(text)


def test_the_engines_own_caps_stand_behind_and_leave_room_for_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM counts those that run and wait, and tokens of prompts; each of six served names is asked eight at once."""
    monkeypatch.setattr(environments, "python", lambda name: "/bin/true")
    wanted = Wanted("vllm", Model("m"), adapters=3, rank=8, running=4, waiting=2, queued_tokens=500)
    told = list(backends.start(wanted).command)
    requests, tokens = (int(told[told.index(f"--max-num-queued-{what}") + 1]) for what in ("reqs", "tokens"))
    assert requests >= 4 + 2 + 6 * 8 and tokens >= 500
    free = list(backends.start(Wanted("vllm", Model("m"))).command)
    assert not any("queued" in option for option in free)


@pytest.mark.parametrize("engine", ["vllm", "eager", "compiled"])
def test_an_engine_serves_its_model_by_the_name_that_it_is_given(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "python", lambda name: "/bin/true")
    how = backends.start(Wanted(engine, Model("m"), name="support@1"))
    assert how.brings == {"support@1": "support@1"} and "support@1" in how.command


@pytest.mark.parametrize(
    ("params", "asked", "kept", "ram"),
    [
        ({}, False, False, "0"),
        ({"cache_prompt": True, "cache_ram": 512}, False, True, "512"),
        ({"cache_prompt": True, "cache_ram": 512}, True, True, "512"),
        ({}, True, True, "1024"),
    ],
)
def test_llamacpps_server_reuses_prefixes_where_the_run_did_or_its_owner_says_so(
    params: dict[str, Any], asked: bool, kept: bool, ram: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binary = tmp_path / "lib" / "python3" / "site-packages" / "llama_cpp" / SERVER
    binary.parent.mkdir(parents=True)
    binary.touch()
    monkeypatch.setattr(environments, "python", lambda name: str(tmp_path / "bin" / "python"))
    wanted = Wanted("llamacpp_server", Model("m"), params={"slots": 3, **params}, prefix_caching=asked)
    told = list(backends.start(wanted).command)
    assert ("--cache-prompt" in told, "--no-cache-prompt" in told) == (kept, not kept)
    assert told[told.index("--cache-ram") + 1] == ram and told[told.index("--parallel") + 1] == "3"


def test_limits_of_a_load_that_held_are_those_of_littles_law() -> None:
    """Four a second of two seconds each are eight at once. The limit is a second, of which the engine needs 400 ms."""
    found = Held(4.0, 2.0, "ttft <= 1 s", 1.0, 0.4, "run x", prefill=500.0).limits()
    assert (found.running, found.waiting, found.wait_ms, found.rate) == (8, 2, pytest.approx(600.0), 4.0)
    assert found.queued_tokens == 500 and "run x" in found.source and "ttft <= 1 s" in found.source
    none_left = Held(4.0, 0.1, "ttft <= 1 s", 1.0, 1.2, "run x").limits()
    assert (none_left.running, none_left.waiting, none_left.wait_ms) == (1, 0, 0.0)
