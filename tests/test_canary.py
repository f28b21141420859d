"""The canary sings when a served name answers as another, and only then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import command
from helpers.servers import served
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.canary import fingerprint
from peftopt.canary.fingerprint import Known, judge

logprobs = st.dictionaries(st.sampled_from("abcdefg"), st.floats(-20, 0), min_size=1, max_size=5)
prints = st.lists(st.tuples(st.sampled_from("abcdefg"), logprobs), min_size=1, max_size=6)


@settings(deadline=None)
@given(prints, prints)
def test_distance_is_one(a: list, b: list) -> None:
    assert fingerprint.distance(a, a) == 0
    assert fingerprint.distance(a, b) == pytest.approx(fingerprint.distance(b, a)) and fingerprint.distance(a, b) >= 0


def test_after_they_part_nothing_is_compared() -> None:
    a = [("x", {"x": -0.1}), ("y", {"y": -0.1})]
    b = [("z", {"x": -0.1, "z": -0.1}), ("y", {"y": -9.0})]
    assert fingerprint.distance(a, b) < 1


def test_an_answer_is_its_models_or_anothers_or_nobodys() -> None:
    def level(nats: float) -> list:
        return [("x", {"x": -nats, "y": -2.0})]

    known = Known({"base": {"p": level(0.1)}, "support": {"p": level(1.5)}}, {"base": 0.01, "support": 0.02})
    assert known.alike() == [] and known.apart("base", "support") == ["p"]
    assert judge(known, "base", "p", level(0.11)) is None
    assert judge(known, "base", "p", level(0.5)) is None, (
        "far from its noise, and yet nearer to itself than to any other"
    )
    assert judge(known, "base", "p", level(1.5)).like == "support"
    assert judge(known, "base", "p", level(9.0)).like == ""
    twins = Known({"a": {"p": level(0.1)}, "b": {"p": level(0.1)}}, {"a": 0.0, "b": 0.0})
    assert twins.alike() == [("a", "b")]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "prompt": f"count to {n}"}) + "\n" for n in range(4)))
    return path


@pytest.mark.parametrize(("leaky", "code"), [(False, 0), (True, 1)])
def test_the_verb(leaky: bool, code: int, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(leaky=leaky, first=0.02 if leaky else 0.002) as server:  # in which requests share a batch
        flags = ["--prompts", questions, "--model", "base", "--model", "support", "--model", "sales"]
        assert command("canary", server.url, *flags, "--quiet") == code
        out = capsys.readouterr().out
        assert ("base: answered as s" in out) is leaky and "support: answered" not in out
        assert command("canary", server.url, *flags, "--json", "--rounds", "1", "--quiet") == code
        found = json.loads(capsys.readouterr().out)
        assert found["asked"] == 12 and {w["model"] for w in found["wrong"]} == ({"base"} if leaky else set())


# ---- a prefix cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("caching", ["", "own", "shared"])
def test_no_adapter_is_served_another_s_prefix(
    caching: str, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that finds a prompt by its words alone answers every name but the first from the first one's prefix:
    then, and each time, so that no comparison with its other answers shows it."""
    with served(caching=caching) as server:
        flags = ["--prompts", questions, "--model", "base", "--model", "support", "--model", "sales", "--rounds", 1]
        code = command("canary", server.url, *flags, "--json", "--quiet")
        found = json.loads(capsys.readouterr().out)
        turn = found["in_turn"]
        assert code == (1 if caching == "shared" else 0) and found["apart"] and not found["alike"]
        assert turn["asked"] == 4 * (3 + 1) and not turn["failed"], "every name, and the first of each prompt again"
        borrowed = [(answer["prompt"], answer["model"]) for answer in turn["borrowed"]]
        assert len(borrowed) == len(set(borrowed)) == (4 * 2 if caching == "shared" else 0)
        assert turn["reused"] == {"": None, "own": 4 * 4, "shared": 4 * 4 * 3}[caching]
        assert command("canary", server.url, *flags, "--quiet") == code
        assert ("same prompt: support: answered as" in capsys.readouterr().out) is (caching == "shared")


def test_a_server_that_refuses_to_keep_fingerprints_apart_is_told_of(
    questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(picky=True) as server:
        flags = ["--prompts", questions, "--model", "base", "--model", "support", "--rounds", 1, "--quiet"]
        assert command("canary", server.url, *flags, "--json") == 0
        assert not json.loads(capsys.readouterr().out)["apart"]
        asked = [body for body in server.bodies if "cache_salt" in body]
        assert len(asked) == 1, "it is not asked again"
        assert command("canary", server.url, *flags) == 0
        assert "cache_salt" in capsys.readouterr().err


def test_an_answer_that_is_off_for_another_reason_is_not_borrowed(
    questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters that are replaced under their names while the canary looks: no cache has a part in that."""
    with served(caching="own", drifts=24) as server:
        flags = ["--prompts", questions, "--model", "base", "--model", "support", "--rounds", 1, "--quiet", "--json"]
        assert command("canary", server.url, *flags) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["wrong"] and not found["in_turn"]["borrowed"]


def test_what_it_cannot_do_is_said(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served() as server:
        assert command("canary", server.url, "--prompts", questions, "--model", "base") == 2
        assert "two or more" in " ".join(capsys.readouterr().err.split())
        assert command("canary", server.url, "--prompts", questions, "--model", "base", "--model", "broken") == 4
        assert "no fingerprint" in " ".join(capsys.readouterr().err.split())


# ---- reloads -----------------------------------------------------------------------------------


@pytest.fixture
def adapters(tmp_path: Path) -> list[object]:
    flags: list[object] = []
    for name in ("support", "sales"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(f"the weights of {name}")
        flags += ["--swap", tmp_path / name]
    return flags


@pytest.mark.parametrize(
    ("fault", "code"), [({}, 0), ({"stale": True}, 1), ({"sticky": True}, 1), ({"leaky": True}, 1)]
)
def test_two_adapters_in_turn_under_one_name(
    fault: dict[str, bool], code: int, questions: Path, adapters: list, capsys: pytest.CaptureFixture[str]
) -> None:
    first = 0.02 if "leaky" in fault else 0.002
    with served(**fault, models=("base", "support"), first=first) as server:
        flags = ["--prompts", questions, *adapters, "--rounds", "2", "--quiet"]
        assert command("canary", server.url, *flags, "--json") == code
        found = json.loads(capsys.readouterr().out)
        assert len(found["load_s"]) == len(found["first_s"]) == len(found["unload_s"]) == 4 and min(found["load_s"]) > 0
        assert found["residents"] == ["base", "support"], "all that is served"
        # of the reloaded name every prompt once, the first again, and all in the mixed batch; of the others all, alone
        # and mixed, after the load and after the unload
        assert found["asked"] == 4 * ((4 + 1 + 4) + 2 * (2 + 2) * 4) and not found["failed"]
        # A stale server answers the first weights for ever: those are right every other time.
        assert len(found["stale"]) == (2 * 9 if "stale" in fault else 0)
        assert {(w["model"], w["like"]) for w in found["stale"]} == (
            {("peftopt-canary", "support")} if "stale" in fault else set()
        )
        # A leaky one computes the base with whatever else is in the batch.
        assert {w["model"] for w in found["wrong"]} == ({"base"} if "leaky" in fault else set())
        assert len(found["wrong"]) <= 4 * 2 * 4, "never when the base is asked alone"
        assert found["kept"] == (4 if "sticky" in fault else 0)
        assert command("canary", server.url, *flags[:-1]) == code
        said, shown = capsys.readouterr()
        assert "16/16" in shown, "two adapters and two residents three times each, and four turns"
        assert ("stale: peftopt-canary: answered as support would" in said) is ("stale" in fault)
        assert ("wrong: base: answered as" in said) is ("leaky" in fault)


def test_only_the_named_are_watched_beside_a_reload(
    questions: Path, adapters: list, capsys: pytest.CaptureFixture[str]
) -> None:
    with served() as server:
        flags = ["--prompts", questions, *adapters, "--rounds", "1", "--quiet", "--json", "--model", "support"]
        assert command("canary", server.url, *flags) == 0
        assert json.loads(capsys.readouterr().out)["residents"] == ["support"] and "base" not in server.seen


def test_reloads_that_cannot_be_are_said(
    questions: Path, adapters: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(loads=False) as server:
        assert command("canary", server.url, "--prompts", questions, *adapters) == 4
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in " ".join(capsys.readouterr().err.split())
        assert command("canary", server.url, "--prompts", questions, *adapters[:2]) == 2
        assert "takes two" in capsys.readouterr().err
    with served(models=("base",)) as server:
        twins = ["--swap", adapters[1], "--swap", adapters[1]]
        assert command("canary", server.url, "--prompts", questions, *twins, "--quiet") == 3
        assert "tells support and support apart" in capsys.readouterr().err
        nowhere = ["--swap", tmp_path / "nowhere", "--swap", adapters[1]]
        assert command("canary", server.url, "--prompts", questions, *nowhere) == 4
        assert "No adapter found" in " ".join(capsys.readouterr().err.split())
