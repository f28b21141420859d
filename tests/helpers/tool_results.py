"""Results as vLLM's benchmark, GuideLLM, AIPerf and lm-evaluation-harness write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
VLLM = {
    "date": "20261124-101500",
    "backend": "openai-chat",
    "model_id": "support",
    "num_prompts": 3,
    "request_rate": 2.0,
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 2.5,
    "completed": 2,
    "failed": 1,
    "request_throughput": 0.8,
    "output_throughput": 2.4,
    "total_token_throughput": 9.0,
    "mean_ttft_ms": 150.0,
    "input_lens": [11, 12, 13],
    "output_lens": [3, 3, 0],
    "ttfts": [0.1, 0.2, 0.0],
    "itls": [[0.02, 0.03], [0.04, 0.04], []],
    "latencies": [0.15, 0.28, 0.0],
    "start_times": [100.0, 100.5, 101.0],
    "queue_times": [0.0, 0.0, 0.0],
    "errors": ["", "", "Traceback (most recent call last):\n  x\nConnectionError: reset\n"],
}


def guidellm(version: int = 1) -> dict[str, Any]:
    def row(number: int, targeted: float | None, error: str | None = None) -> dict[str, Any]:
        timings = {
            "targeted_start": targeted,
            "request_start": 1000.5 + number,
            "first_token_iteration": 1000.7 + number,
            "last_token_iteration": 1001.1 + number,
            "request_end": 1001.2 + number,
            "resolve_end": 1001.3 + number,
        }
        info = {"request_id": str(number), "status": "errored" if error else "completed", "timings": timings}
        return {"request_id": str(number), "info": {**info, "error": error}, "prompt_tokens": 7, "output_tokens": 5}

    requests = {
        "successful": [row(0, 1000.0)],
        "errored": [row(1, 1001.0, "HTTP 500")],
        "incomplete": [],
        "total": None,
    }
    totals = {"successful": 4, "errored": 1, "incomplete": 0, "total": 5}
    strategy = {"type_": "poisson", "rate": 2.0}
    run = {"config": {"strategy": strategy}, "metrics": {"request_totals": totals}, "requests": requests}
    return {"metadata": {"version": version, "guidellm_version": "0.8.0"}, "args": {}, "benchmarks": [run]}


def aiperf(**about: Any) -> str:
    metadata = {
        "session_num": 0,
        "x_request_id": "7609a2e7",
        "request_start_ns": 1759813207532900363,
        "request_end_ns": 1759813207838764604,
        "benchmark_phase": "profiling",
        "was_cancelled": False,
        **about,
    }
    metrics = {
        "input_sequence_length": {"value": 550, "unit": "tokens"},
        "time_to_first_token": {"value": 255.0, "unit": "ms"},
        "inter_chunk_latency": {"value": [5.0, 6.0, 4.0], "unit": "ms"},
        "inter_token_latency": {"value": 5.0, "unit": "ms"},
        "output_sequence_length": {"value": 4, "unit": "tokens"},
    }
    cancelled = {"code": 499, "type": "RequestCancellationError", "message": "cancelled after 0.0 s"}
    rows = [
        {"metadata": metadata, "metrics": metrics, "error": None},
        {"metadata": metadata, "metrics": {"error_isl": {"value": 550, "unit": "tokens"}}, "error": cancelled},
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


LM_EVAL = {
    "results": {"gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.05}},
    "n-samples": {"gsm8k": {"original": 1319, "effective": 100}},
    "lm_eval_version": "0.4.13",
    "config": {},
}
SAMPLES = [
    {"doc_id": n, "doc": {}, "resps": [["x"]], "filter": "none", "metrics": ["acc"], "doc_hash": f"h{n}", "acc": n % 2}
    for n in range(4)
]


def write(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path
