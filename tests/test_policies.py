"""Requests are changed only as a policy says, and what it says is kept: short inputs, templates, lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt.engines import eager
from peftopt.policies import Policed, Request, cap, truncate
from peftopt.records import Model, Step

OVERHEAD = 3


def count(messages: Sequence[Mapping[str, str]]) -> int:
    """A tokenizer of one token per four characters begun, and a template of three tokens a message."""
    return sum(OVERHEAD + -(-len(m["content"]) // 4) for m in messages)


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=200)}),
    min_size=1,
    max_size=4,
)


@given(messages, st.integers(1, 120), st.sampled_from(["tail", "head"]))
def test_only_long_inputs_are_cut_to_the_limit_and_keep_their_side(
    given_: list[dict[str, str]], over: int, keep: str
) -> None:
    before = Request(given_, 9)
    after = truncate.apply(before, truncate.Params(over, keep), count)
    if count(given_) <= over:
        assert after == before
        return
    assert [m["role"] for m in after.messages] == [m["role"] for m in given_], "no message is dropped"
    for old, new in zip(given_, after.messages, strict=True):
        whole, part = old["content"], new["content"]
        assert whole.endswith(part) if keep == "tail" else whole.startswith(part)
    assert count(after.messages) <= max(over, OVERHEAD * len(given_))
    touched = [o["role"] for o, n in zip(given_, after.messages, strict=True) if o != n]
    users = [m for m in given_ if m["role"] != "system" and m["content"]]
    if "system" in touched:
        assert all(n["content"] == "" for o, n in zip(given_, after.messages, strict=True) if o in users)


def test_a_cut_takes_off_little_more_than_it_must() -> None:
    text = "word " * 2000
    after = truncate.apply(Request([{"role": "user", "content": text}], 9), truncate.Params(1000), count)
    assert 950 <= count(after.messages) <= 1000


@given(st.integers(1, 500), st.integers(1, 500))
def test_a_cap_only_shortens(asked: int, most: int) -> None:
    request = Request([{"role": "user", "content": "hi"}], asked)
    assert cap.apply(request, cap.Params(most), count) == Request(request.messages, min(asked, most))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: truncate.Params(keep="middle"), "tail or head"),
        (lambda: truncate.Params(over=0), "over"),
        (lambda: cap.Params(0), "max_new_tokens"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()  # type: ignore[operator]


def test_behind_an_engine_the_template_stays_whole_and_fixed_lengths_stay_fixed(
    tiny_base: Path, tiny_lora: Path
) -> None:
    engine = eager.open(Model(str(tiny_base), (str(tiny_lora),)), eager.Params(device="cpu"))
    policies = [
        Step("truncate", "policy", "truncate", {"over": 40, "keep": "tail"}),
        Step("cap", "policy", "shorten", {"max_new_tokens": 5}),
    ]
    policed = Policed(engine, policies)
    short = [{"role": "user", "content": "the lazy dog"}]
    long = [{"role": "system", "content": "count"}, {"role": "user", "content": "the quick brown fox " * 40 + "end"}]
    assert policed.encode(short) == engine.encode(short) and policed.uncut(short) is None
    prompt, _ = policed.encode(long)
    text = engine._tokenizer.decode(prompt)
    assert text.startswith("<|im_start|>system\ncount<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("fox end<|im_end|>\n<|im_start|>assistant\n") and 30 <= len(prompt) <= 40
    assert policed.uncut(long) == len(engine.encode(long)[0])
    assert len(policed.generate([prompt], 12, stop=False)[0].tokens) == 12
    assert len(policed.generate([prompt], 12, stop=True)[0].tokens) <= 5
    assert policed.eos == engine.eos and policed.scores and policed.device == "cpu"
    with engine.without_adapters():
        base = engine.score([prompt], [[5, 6, 7]])[0].logprobs
    assert base != engine.score([prompt], [[5, 6, 7]])[0].logprobs
