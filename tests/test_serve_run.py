"""`peftopt serve RUN`: what a finished run chose answers, under its name, within the limits that the run measured."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command_line import command, errors
from helpers.finished_runs import FIRST_MS, USERS, finished_run
from helpers.gateways import HTTP, Gateway, held, serving
from helpers.paced import paced
from helpers.waiting import wait_until

from peftopt.errors import BadInput
from peftopt.gateway import decided
from peftopt.loadtest import runs
from peftopt.loadtest.runs import Loaded, Trial
from peftopt.loadtest.sender import Played
from peftopt.loadtest.summary import Request, slo
from peftopt.measurements import NO_ACCOUNT, Account

LIMIT = "ttft.p95@peak <= 770 ms"


@pytest.fixture(scope="module")
def run(tiny_base: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that chose the merged model, and whose load met its limit."""
    return finished_run(tmp_path_factory.mktemp("results"), tiny_base, tiny_lora, require=(LIMIT,))


@pytest.fixture(scope="module")
def gateway(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with serving(tmp_path_factory.mktemp("serve"), run) as gateway:
        yield gateway


def test_the_chosen_variant_answers_and_says_what_decided_so(gateway: Gateway, run: Path) -> None:
    answer = gateway.ask("hello", model="lora", max_tokens=3)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1
    decision = hashlib.sha256((run / "decision.json").read_bytes()).hexdigest()
    told = {"run": run.name, "variant": "merged", "decision": decision}
    (model,) = HTTP.get(f"{gateway.url}/v1/models").json()["data"]
    assert model["id"] == "lora" and model["peftopt"] == told
    wait_until(lambda: bool(gateway.lines()))
    assert told.items() <= gateway.lines()[-1].items()


def test_it_answers_within_the_limits_that_the_run_measured(gateway: Gateway) -> None:
    """As the gauges say; and the limit of the run is the bound of a bucket."""
    gateway.ask("hello", model="lora", max_tokens=3, stream=True)
    assert f'peftopt_limit{{what="running"}} {float(USERS)}' in HTTP.get(f"{gateway.url}/metrics").text
    bound = re.compile(r'peftopt_ttft_seconds_bucket\{.*le="0.77"')
    wait_until(
        lambda: bound.search(HTTP.get(f"{gateway.url}/metrics").text)
    )  # a request is counted after its last byte


def test_another_variant_is_served_where_it_is_named(run: Path, tmp_path: Path) -> None:
    """The adapter stays apart: the base answers too, and it is not what the run decided on."""
    with serving(tmp_path, run, "--variant", "adapter", "--limits", "off") as gateway:
        models = {each["id"]: each for each in HTTP.get(f"{gateway.url}/v1/models").json()["data"]}
        assert models.keys() == {"base", "lora"}
        assert models["lora"]["peftopt"]["variant"] == "adapter" and "peftopt" not in models["base"]
        assert gateway.ask("hello", model="lora", max_tokens=2).status_code == 200
        assert gateway.metric("peftopt_limit") == 0


def test_a_run_that_chose_nothing_says_so_and_names_what_there_is(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_run(tmp_path, tiny_base, tiny_lora, require=("accuracy >= 1.01x",), built=False)
    assert command("serve", folder, "--state", tmp_path / "state") == 2
    told = errors(capsys)
    assert "chose no variant" in told and "--variant" in told and "merged" in told


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--variant", "nobody"], ["nobody", "merged"]),
        (["--variant", "capped"], ["capped", "cap"]),
        (["--variant", "adapter", "--engine", "compiled"], ["compiled", "--engine eager"]),
        (["--limits", "decision"], ["find-rate"]),
        (["--limits", "nowhere.jsonl"], ["nowhere.jsonl", "find-rate"]),
    ],
)
def test_what_cannot_be_served_is_said_with_what_to_do(
    options: list[str],
    words: list[str],
    tiny_base: Path,
    tiny_lora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = finished_run(tmp_path, tiny_base, tiny_lora)
    assert command("serve", folder, "--state", tmp_path / "state", *options) == 2
    told = errors(capsys)
    assert all(word in told for word in words), told
    assert not (tmp_path / "state").exists(), "the next start is not spoiled"


def test_a_model_that_is_gone_is_named_with_how_to_build_it_again(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_run(tmp_path, tiny_base, tiny_lora)
    shutil.rmtree(tmp_path / "artifacts")
    assert command("serve", folder, "--state", tmp_path / "state") == 2
    told = errors(capsys)
    assert "merged" in told and "peftopt run" in told and "tiny.yaml" in told


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("serve", tmp_path) == 2
    assert "no finished run" in errors(capsys)


# ---- what a run and a search say of limits -----------------------------------------------------


def test_a_load_that_met_its_limit_gives_limits_by_littles_law(run: Path) -> None:
    limits = decided.of_run(run).limits
    assert limits and limits.running == USERS, "a closed loop of so many users"
    assert limits.wait_ms == pytest.approx(770 - FIRST_MS / 2, rel=0.02)
    assert limits.waiting == int(limits.rate * limits.wait_ms / 1e3)
    assert run.name in limits.source and LIMIT in limits.source


@pytest.mark.parametrize("require", [(), ("ttft.p95@peak <= 40 ms",), ("throughput@peak >= 1 tokens/s",)])
def test_a_load_that_met_none_gives_none(
    require: tuple[str, ...], tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    """No limit; one that it broke; one that a wait does not add to."""
    folder = finished_run(tmp_path, tiny_base, tiny_lora, require=require)
    assert decided.of_run(folder, "merged").limits is None


def requests(n: int, first_s: float = 0.1, whole_s: float = 0.9, gap_s: float = 0.5) -> list[Request]:
    """One each `gap_s` seconds: each meets one other, or none."""
    return [
        Request(str(i), "m", at, at, at + whole_s, at + first_s, at + whole_s, prompt_tokens=50, new_tokens=8)
        for i, at in enumerate(gap_s * k for k in range(n))
    ]


def search_file(
    path: Path,
    rate: float | None,
    level: str = "ttft <= 500 ms",
    variant: str = "merged",
    engine: Account = NO_ACCOUNT,
) -> Path:
    """What `load --find-rate --slo --out` leaves."""
    played = Played(requests=requests(60), engine=engine)
    levels = [slo(level)]
    found = runs.summarized(Loaded(played, [], [], [Trial(rate or 1.0, bool(rate), played)], rate), levels)
    runs.append(path, variant, found)
    return path


def test_a_search_gives_limits_from_its_own_file(tmp_path: Path) -> None:
    """Two a second for 0.9 s each are two at once. Of 500 ms the engine needs 100."""
    limits = decided.limits_of_file(search_file(tmp_path / "found.jsonl", 2.0))
    assert limits == replace(limits, running=2, waiting=0, rate=2.0)
    assert limits.wait_ms == pytest.approx(400) and "found.jsonl" in limits.source
    assert "ttft <= 500 ms" in limits.source


def test_what_lay_in_the_engines_queue_is_not_let_in(tmp_path: Path) -> None:
    """Ten a second for 0.9 s each are nine, and where half a second of that was the queue, four."""
    told = search_file(tmp_path / "told.jsonl", 10.0, engine=replace(NO_ACCOUNT, queue_ms=500.0))
    untold = search_file(tmp_path / "untold.jsonl", 10.0)
    assert [decided.limits_of_file(file).running for file in (told, untold)] == [4, 9]


def test_a_search_that_is_added_to_a_run_counts_more_than_its_own_load(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    folder = finished_run(tmp_path, tiny_base, tiny_lora, require=(LIMIT,))
    search_file(folder / "measurements.jsonl", 7.0, variant="adapter")
    assert decided.of_run(folder).limits != decided.of_run(folder, "adapter").limits
    search_file(folder / "measurements.jsonl", 50.0)
    limits = decided.of_run(folder).limits
    assert limits and limits.rate == 50.0


@pytest.mark.parametrize(("rate", "level"), [(None, "ttft <= 500 ms"), (2.0, "tpot <= 500 ms")])
def test_a_search_without_a_rate_or_a_limit_on_waiting_is_refused(
    rate: float | None, level: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput):
        decided.limits_of_file(search_file(tmp_path / "found.jsonl", rate, level))


def test_who_is_too_many_for_what_was_found_is_told_by_which_limit_of_which_file(tmp_path: Path) -> None:
    found = search_file(tmp_path / "found.jsonl", 2.0)
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, "--limits", found) as gateway:
        with held(gateway, 2):
            wait_until(lambda: engine.running == 2)
            refused = gateway.ask("one too many")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        said = refused.json()["error"]["message"]
        assert "found.jsonl" in said and "ttft <= 500 ms" in said
