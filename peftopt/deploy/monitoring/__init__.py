"""What operators monitor a decision by: Prometheus rules with their tests, a Grafana dashboard, an OpenSLO file, an
analysis of Argo Rollouts. Pure.

`sources` what the gateway's and vLLM's own metrics are called, `burn` when a share of misses pages, `alerts` one alert
and how it is told, `limits` those on the run's limits, `gateway` and `vllm` all others, `cases` tests of the rules,
`panels` and `dashboard` for Grafana, `release` for OpenSLO and Argo, `texts` data to YAML, `bundle` all files.
"""

from peftopt.deploy.monitoring.bundle import exported

__all__ = ["exported"]
