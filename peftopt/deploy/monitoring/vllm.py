"""Alerts on vLLM's own metrics, beyond the limits of the run. Pure.

vLLM counts by the name of the base, whatever adapter is asked, and tells no time-outs, no memory and no adapter's
identity: what needs these is the gateway's.
"""

from __future__ import annotations

from peftopt.deploy.monitoring.alerts import ALL, Alert, Series

NOT_TOLD = (
    "vLLM's metrics do not tell adapters apart: the limits are on all of a model's requests together",
    "vLLM tells no time-outs, no memory, and not whether an adapter answers as itself: only the gateway's metrics do",
)
OF = 'model_name="support",engine="0"'
DONE = f'vllm:request_success_total{{{OF},finished_reason="stop"}}'
RUNNING = f"vllm:num_requests_running{{{OF}}}"
PROMPTS = f"vllm:prompt_tokens_total{{{OF}}}"
TURNED_AWAY = 'vllm:admission_rejections_total{model_name="support",reason="max_num_queued_reqs"}'


def healthy(samples: int) -> Series:
    """Series of an engine at which nothing is wrong."""
    return {
        RUNNING: f"4+0x{samples}",
        PROMPTS: f"0+6000x{samples}",
        TURNED_AWAY: f"0+0x{samples}",
        DONE: f"0+{ALL}x{samples}",
    }


def alerts() -> list[Alert]:
    """All of them."""
    return [
        Alert(
            name="PeftoptNoMetrics",
            severity="page",
            expr="absent(vllm:num_requests_running)",
            hold="5m",
            summary="no engine tells its metrics",
            description="Prometheus has no vLLM to read. Is it running, is it in scrape_configs?",
            fires={RUNNING: None},
            silent={RUNNING: "0+0x300"},
        ),
        Alert(
            name="PeftoptEngineRestarted",
            severity="ticket",
            expr="sum by (model_name, instance) (resets(vllm:prompt_tokens_total[1h])) > 0",
            summary="the engine of {{ $labels.instance }} was started again",
            description="Its counters began anew. Its standard error says why it ended.",
            fires={PROMPTS: "0+6000x150 0+6000x100"},
            silent={PROMPTS: "0+6000x300"},
        ),
        Alert(
            name="PeftoptRefused",
            severity="ticket",
            expr="sum by (model_name) (increase(vllm:admission_rejections_total[30m])) > 0",
            summary="{{ $labels.model_name }} turns requests away",
            description="The engine's queue is as long as it may be: there is more demand than room. Add a replica.",
            fires={TURNED_AWAY: "0+0x100 0+1x100"},
            silent={TURNED_AWAY: "7+0x300"},
        ),
    ]
