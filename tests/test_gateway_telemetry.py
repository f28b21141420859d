"""What a gateway tells of itself and of its engine: samples, series that come and go, spans, files of the log."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.collector import attributes, collecting
from helpers.gateways import BIG_S, HTTP, changed, serving
from helpers.paced import Paced, paced
from helpers.waiting import wait_until
from hypothesis import given
from hypothesis import strategies as st

from peftopt.errors import BadInput
from peftopt.gateway import tracing
from peftopt.gateway.admission import Admission
from peftopt.gateway.keys import Keys
from peftopt.gateway.limits import Limits
from peftopt.gateway.lines import Line, Log
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.sampling import ALLOCATED, RESERVED, Engine, Known, Nvml, Reading, Sample, Sampler, combined
from peftopt.gateway.shared import Settings, Shared
from peftopt.gateway.upstream import Fault, Timeouts, Upstream

GIB = 2**30
KV = "vllm:kv_cache_usage_perc"


# ---- samples -----------------------------------------------------------------------------------


def test_what_the_engine_tells_of_its_memory_is_exact() -> None:
    sample = combined(0.0, {ALLOCATED: 6 * GIB, RESERVED: 8 * GIB}, Reading(0.5, 9 * GIB), Known(GIB, GIB))
    assert (sample.allocated, sample.reserved) == (6 * GIB, 8 * GIB)
    assert sample.sources == {"allocated": "engine", "reserved": "engine"}
    assert sample.fragmentation == pytest.approx(0.25) and sample.utilization == 0.5


def test_what_is_derived_says_so_and_gives_no_fragmentation() -> None:
    sample = combined(0.0, {KV: 0.5}, Reading(0.9, 4 * GIB), Known(weights_bytes=2 * GIB, kv_bytes=GIB))
    assert sample.allocated == 2.5 * GIB and sample.reserved == 4 * GIB
    assert sample.sources == {"allocated": "derived", "reserved": "nvml"} and sample.fragmentation is None


@pytest.mark.parametrize("known", [Known(), Known(weights_bytes=GIB), Known(kv_bytes=GIB)])
def test_what_nobody_knows_is_not_told(known: Known) -> None:
    sample = combined(0.0, {KV: 0.5}, None, known)
    assert sample.allocated is None and sample.reserved is None and sample.utilization is None
    assert sample.kv_usage == 0.5 and not sample.sources


def test_the_batch_is_as_full_as_the_limit_or_the_engine_lets_it_be() -> None:
    def filled(running: int, most_running: int = 0, limit: int = 0) -> float | None:
        upstream, metrics = Upstream("http://127.0.0.1:9", Timeouts()), Metrics()
        admission = Admission(Limits(limit), running=running)
        own = Settings(most_running=most_running)
        return Shared(upstream, SimpleNamespace(), admission, Keys(), metrics, Log(""), own).fill  # type: ignore

    assert filled(4, most_running=16) == 0.25
    assert filled(4, most_running=16, limit=8) == 0.5, "more than the limit never runs"
    assert filled(40, most_running=16) == 1.0, "the others wait at the engine"
    assert filled(4) is None


@given(
    st.dictionaries(st.sampled_from([ALLOCATED, RESERVED, KV]), st.floats()),
    st.integers(0, 2**50),
    st.integers(0, 2**50),
)
def test_no_engine_can_spoil_a_sample(totals: dict[str, float], weights: int, kv: int) -> None:
    """Whatever it tells: the sample is one that a line can hold."""
    sample = combined(0.0, totals, None, Known(weights, kv))
    assert all(value is None or value >= 0 for value in (sample.allocated, sample.reserved))
    assert sample.fragmentation is None or 0 <= sample.fragmentation <= 1
    assert sample.kv_usage is None or math.isfinite(sample.kv_usage)


class Driver:
    """nvidia-ml-py's functions, for two GPUs: one that process 7 uses, and one that others use."""

    def __init__(self, hidden: bool = False) -> None:
        self.hidden = hidden

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUtilizationRates(self, device: int) -> Any:
        return SimpleNamespace(gpu=(40, 90)[device])

    def nvmlDeviceGetMemoryInfo(self, device: int) -> Any:
        return SimpleNamespace(used=(3 * GIB, 5 * GIB)[device])

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[Any]:
        processes = (((7, 2 * GIB), (1, GIB)), ((1, 5 * GIB),))[device]
        return [SimpleNamespace(pid=pid, usedGpuMemory=None if self.hidden else used) for pid, used in processes]


def test_the_engines_processes_tell_which_gpu_is_its() -> None:
    assert Nvml(Driver()).read([7, 8]) == Reading(0.4, 2 * GIB)
    assert Nvml(Driver()).read([1]) == Reading(0.9, 6 * GIB)


@pytest.mark.parametrize(("hidden", "pids"), [(False, [4711]), (True, [7])])
def test_where_the_driver_does_not_name_them_all_of_the_machine_counts(hidden: bool, pids: list[int]) -> None:
    assert Nvml(Driver(hidden)).read(pids) == Reading(0.9, 8 * GIB)


class Fails:
    """A driver that is unloaded meanwhile."""

    asked = 0

    def read(self, pids: Collection[int]) -> Reading:
        self.asked += 1
        raise RuntimeError("NVML_ERROR_UNINITIALIZED")


def test_a_driver_that_fails_is_told_of_once_and_not_asked_again() -> None:
    said: list[str] = []
    driver = Fails()

    async def get(path: str) -> tuple[int, bytes]:
        return 200, f"{KV} 0.5\n".encode()

    async def main() -> list[Sample]:
        sampler = Sampler(Metrics(), driver, said.append)
        engine = Engine("", get, processes=lambda: [7])
        return [(await sampler.sample([engine]))[""] for _ in range(3)]

    samples = asyncio.run(main())
    assert driver.asked == 1 == len(said) and all(sample.kv_usage == 0.5 for sample in samples)


def test_the_metrics_say_who_told_and_forget_what_is_not_known_any_more() -> None:
    answers = [(200, f"{ALLOCATED} 6\n{RESERVED} 8\n".encode()), (0, b"gone")]
    metrics = Metrics()

    async def get(path: str) -> tuple[int, bytes]:
        return answers.pop(0)

    async def main() -> None:
        await Sampler(metrics).sample([Engine("", get)])
        text = metrics.text().decode()
        assert 'peftopt_gpu_memory_allocated_bytes{engine="",source="engine"} 6.0' in text
        assert 'peftopt_gpu_memory_reserved_bytes{engine="",source="engine"} 8.0' in text
        assert 'peftopt_gpu_memory_fragmentation_ratio{engine="",source="engine"} 0.25' in text
        assert "peftopt_gpu_utilization_ratio{" not in text
        await Sampler(metrics).sample([Engine("", get)])
        assert "peftopt_gpu_memory_allocated_bytes{" not in metrics.text().decode()

    asyncio.run(main())


def test_each_engines_gpu_is_read_by_its_own_processes_and_without_any_not_at_all() -> None:
    class Driver:
        def read(self, pids: Collection[int]) -> Reading:
            return Reading(0.5, 100 * sum(pids))

    async def get(path: str) -> tuple[int, bytes]:
        return 0, b"gone"

    async def main() -> None:
        metrics = Metrics()
        engines = [
            Engine("", get),
            Engine("a@1", get, processes=lambda: [1]),
            Engine("a@2", get, processes=lambda: [2]),
        ]
        samples = await Sampler(metrics, Driver()).sample(engines)
        assert {name: sample.reserved for name, sample in samples.items()} == {"": None, "a@1": 100, "a@2": 200}
        assert 'peftopt_gpu_memory_reserved_bytes{engine="a@2",source="nvml"} 200.0' in metrics.text().decode()

    asyncio.run(main())


def test_a_line_has_the_memory_and_who_told_it() -> None:
    sample = combined(1.0, {KV: 0.5}, Reading(0.9, 4 * GIB), Known(2 * GIB, GIB))
    line = Line("r", arrived=2.0, at=1e9, sampled=sample).as_json()
    assert line["gpu_memory_allocated"] == 2.5 * GIB and line["gpu_memory_reserved"] == 4 * GIB
    assert line["sources"]["gpu_memory_allocated"] == "derived" and line["sources"]["gpu_memory_reserved"] == "nvml"
    assert line["kv_usage"] == 0.5 and line["gpu_utilization"] == 0.9 and line["sample_age_ms"] == 1000.0
    without = Line("r", arrived=2.0, at=1e9).as_json()
    assert without["gpu_memory_allocated"] is None and without["sample_age_ms"] is None


def test_a_served_engines_sample_is_in_the_lines(tmp_path: Path) -> None:
    with paced() as engine, serving(tmp_path, "--upstream", engine.url) as gateway:
        wait_until(lambda: gateway.metric("peftopt_kv_cache_usage_ratio") == 0.25)
        gateway.ask("x")
        wait_until(lambda: bool(gateway.lines()))
        assert gateway.lines()[-1]["kv_usage"] == 0.25


# ---- series ------------------------------------------------------------------------------------


def series(metrics: Metrics) -> list[str]:
    return [line for line in metrics.text().decode().splitlines() if not line.startswith("#")]


def counted(metrics: Metrics, adapter: str, version: str) -> None:
    """A request that was answered, one that failed, one that was refused, one that was given up."""
    shared = {"request_id": "r", "arrived": 0.0, "at": 0.0, "adapter": adapter, "version": version, "arm": "live"}
    metrics.count(Line(**shared, sent=0.1, first=0.2, last=0.5, done=0.6, new_tokens=3, prompt_tokens=2, status=200))
    metrics.count(Line(**shared, done=1.0, status=504, kind="timeout_gap"))
    metrics.refused.labels(adapter, "wait").inc()
    metrics.cancelled.labels(adapter, "client").inc()
    metrics.switch.labels(adapter).observe(0.1)
    metrics.canary.labels(adapter, version, "own").inc()


def test_series_of_versions_that_are_gone_go_with_them() -> None:
    metrics = Metrics()
    counted(metrics, "support", "v0")
    counted(metrics, "base", "")
    once = len(series(metrics))
    for n in range(1, 100):
        counted(metrics, "support", f"v{n}")
        metrics.keep({("support", f"v{n}"), ("support", ""), ("base", "")})
        assert len(series(metrics)) == once
    left = series(metrics)
    assert not any('version="v0"' in line or 'version="v98"' in line for line in left)
    assert 'peftopt_requests_total{adapter="support",arm="live",code="200",version="v99"} 1.0' in left
    assert 'peftopt_refused_total{adapter="support",reason="wait"} 100.0' in left, "an adapter keeps its own"
    metrics.keep({("base", "")})
    assert not any('adapter="support"' in line for line in series(metrics))
    assert any('adapter="base"' in line for line in series(metrics))


def test_what_is_unloaded_leaves_the_metrics(tiny_lora: Path, tmp_path: Path) -> None:
    """Put over the operators' API; the version before is kept for no time."""
    folders = [changed(tiny_lora, tmp_path / f"v{n}", 1.0 + n) for n in range(3)]
    options = ("--adapters-from", tmp_path, "--keep", 0)
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, *options) as gateway:
        for folder in folders:
            assert gateway.operate("put", f"support={folder}")[0] == 0
            assert gateway.ask("x", "support").status_code == 200
        wait_until(lambda: len(gateway.lines()) == 3)
        first = gateway.lines()[0]["version"]

        def told() -> bool:
            return f'version="{first}"' in HTTP.get(f"{gateway.url}/metrics").text

        wait_until(lambda: not told())
        assert gateway.metric("peftopt_requests_total") >= 1


# ---- errors by their kind ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["oom", "timeout_connect", "timeout_first", "timeout_gap", "timeout", "engine_dead", "upstream"]
)
def test_each_kind_of_an_error_has_a_counter(kind: str) -> None:
    metrics = Metrics()
    metrics.count(Line("r", arrived=0.0, at=0.0, adapter="a", done=1.0, status=500, kind=kind))
    told = [line for line in series(metrics) if line.startswith("peftopt_errors_total")]
    assert told == [f'peftopt_errors_total{{adapter="a",arm="",kind="{kind}",version=""}} 1.0']


def test_what_cannot_be_connected_to_in_time_is_a_timeout_of_its_own() -> None:
    async def main() -> None:
        """Two connections fill the queue of a listener that accepts none; a third gets no answer."""
        import socket

        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            waiting = []
            for _ in range(3):
                one = socket.socket()
                one.setblocking(False)
                one.connect_ex(deaf.getsockname())
                waiting.append(one)
            url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            try:
                async with Upstream(url, Timeouts(connect=0.3)) as upstream, upstream.ask("/v1", b"{}", {}):
                    pass
            finally:
                for one in waiting:
                    one.close()

    with pytest.raises(Fault) as fault:
        asyncio.run(main())
    assert fault.value.kind == "timeout_connect"


# ---- spans -------------------------------------------------------------------------------------

TRACE, ABOVE = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def posted(engine: Paced) -> str:
    """The head of the last request that was passed on: the gateway asks for the engine's metrics too."""
    return [head for head in engine.headers if head.startswith("POST")][-1]


def test_a_request_is_a_span_below_the_clients_and_above_the_engines(tmp_path: Path) -> None:
    with collecting() as collector, paced() as engine:
        with serving(tmp_path, "--upstream", engine.url, "--trace", collector.url) as gateway:
            headers = {"traceparent": f"00-{TRACE}-{ABOVE}-01", "tracestate": "vendor=1"}
            told = {"stream": True, "max_tokens": 4, "stream_options": {"include_usage": True}, "user": "maria"}
            gateway.ask("secret text", headers=headers, **told)
            passed = posted(engine)
            gateway.ask("oom")
            wait_until(lambda: len(gateway.lines()) == 2)
        first, second = collector.spans  # the end sends what is left
        assert first.trace_id.hex() == TRACE and first.parent_span_id.hex() == ABOVE
        assert f"traceparent: 00-{TRACE}-{first.span_id.hex()}-01" in passed.lower()
        assert "vendor=1" in passed
        said = attributes(first)
        assert first.name == "chat base" and collector.services == {"peftopt-gateway"}
        assert said["gen_ai.operation.name"] == "chat" and said["gen_ai.request.model"] == "base"
        assert said["gen_ai.usage.input_tokens"] == 7 and said["gen_ai.usage.output_tokens"] == 4
        assert said["gen_ai.response.finish_reasons"] == ["length"] and said["gen_ai.request.stream"]
        assert said["server.address"] == "127.0.0.1" and said["http.response.status_code"] == 200
        assert (
            0
            < said["gen_ai.response.time_to_first_chunk"] * 1e9
            <= first.end_time_unix_nano - first.start_time_unix_nano
        )
        assert "secret" not in str(first) and "maria" not in str(first)
        assert attributes(second)["error.type"] == "oom" and second.status.code == second.status.STATUS_CODE_ERROR
        lines = gateway.lines()
        assert lines[0]["trace_id"] == TRACE and lines[1]["trace_id"] == second.trace_id.hex() != TRACE


def test_a_client_that_is_not_sampled_makes_no_span_and_its_trace_goes_on(tmp_path: Path) -> None:
    with collecting() as collector, paced() as engine:
        with serving(tmp_path, "--upstream", engine.url, "--trace", collector.url) as gateway:
            gateway.ask("x", headers={"traceparent": f"00-{TRACE}-{ABOVE}-00"})
            assert TRACE in posted(engine) and "-00\r\n" in posted(engine)
        assert not collector.spans


def test_every_worker_sends_its_spans_and_has_the_sample(tmp_path: Path) -> None:
    with collecting() as collector, paced() as engine:
        options = ("--trace", collector.url, "--workers", 2, "--log-text")
        with serving(tmp_path, "--upstream", engine.url, *options) as gateway:
            wait_until(lambda: gateway.metric("peftopt_kv_cache_usage_ratio") == 0.25)

            def sampled() -> bool:
                gateway.ask("x")
                return any(line["kv_usage"] == 0.25 for line in gateway.lines())

            wait_until(sampled)
        lines = gateway.lines()
        assert sorted(line["trace_id"] for line in lines) == sorted(span.trace_id.hex() for span in collector.spans)
        assert {line["prompt"] for line in lines} == {"user: x"}


def test_a_collector_that_is_not_there_stops_nothing(tmp_path: Path) -> None:
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, "--trace", "http://127.0.0.1:9") as gateway:
        assert gateway.ask("x").status_code == 200
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(BIG_S) == 0


@pytest.mark.parametrize("url", ["collector:4318", "nonsense", "ftp://x"])
def test_what_is_no_collectors_address_is_told(url: str) -> None:
    with pytest.raises(BadInput) as error:
        tracing.endpoint(url)
    assert "http://" in error.value.hint


def test_where_spans_are_sent() -> None:
    assert tracing.endpoint("http://c:4318") == tracing.endpoint("http://c:4318/") == "http://c:4318/v1/traces"
    assert tracing.endpoint("https://c/own/path") == "https://c/own/path"


def test_without_the_flag_the_libraries_are_not_imported() -> None:
    code = "import sys, peftopt.gateway.run; print({'opentelemetry', 'pynvml'} & sys.modules.keys() or 'none')"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "none"


# ---- files of the log --------------------------------------------------------------------------


def a_line(number: int = 0) -> Line:
    return Line(f"request-{number}", arrived=0.0, at=1e9, done=1.0)


def test_the_newest_files_are_kept(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "log"), rotate_bytes=1500, keep=2)
    for number in range(20):
        log.write(a_line(number))
    log.close()
    aside = sorted(tmp_path.glob("log.*"), key=lambda path: int(path.suffix[1:]))
    assert len(aside) == 2 and not log.lost and log.written == 20
    numbers = [
        int(json.loads(line)["request_id"].removeprefix("request-"))
        for path in (*aside, tmp_path / "log")
        for line in path.read_text().splitlines()
    ]
    assert numbers == list(range(numbers[0], 20)), "the newest lines, in their order"


def test_files_of_others_beside_the_log_are_left_alone(tmp_path: Path) -> None:
    others = ("log.gz", "log.1.gz", "log.old", "other.1")
    for name in others:
        (tmp_path / name).write_text("precious")
    log = Log(str(tmp_path / "log"), rotate_bytes=1500, keep=1)
    for number in range(20):
        log.write(a_line(number))
    log.close()
    assert all((tmp_path / name).read_text() == "precious" for name in others)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_log_that_was_moved_goes_on_in_a_new_file_after_sighup(tmp_path: Path, workers: int) -> None:
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, "--workers", workers) as gateway:
        gateway.ask("x")
        wait_until(lambda: len(gateway.lines()) == 1)
        gateway.log.rename(tmp_path / "moved")
        gateway.process.send_signal(signal.SIGHUP)

        def goes_on() -> bool:
            gateway.ask("y")
            return bool(gateway.lines())

        wait_until(goes_on)
        assert (tmp_path / "moved").read_text().splitlines()


def test_a_line_that_is_no_unicode_is_written_too(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "log"))
    line = a_line()
    line.error = "half a letter: \ud800"
    log.write(line)
    log.close()
    assert json.loads((tmp_path / "log").read_text())["error"] == line.error and not log.lost


def test_a_line_after_one_that_a_power_cut_has_torn_is_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"kind": "whole"}\n{"kind": "to')
    log = Log(str(tmp_path / "log"))
    log.write(a_line())
    log.write(a_line())
    log.close()
    whole, torn, *new = (tmp_path / "log").read_text().splitlines()
    assert json.loads(whole)["kind"] == "whole" and torn == '{"kind": "to'
    assert len([json.loads(line) for line in new]) == 2
