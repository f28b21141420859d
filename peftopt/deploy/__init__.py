"""Files by which others start what a run decided: launch scripts, a unit, manifests. Pure, but for `reading`.

The gateway: `deployed` what is deployed, `times` how long its end may take, `files` for gunicorn, systemd, Compose and
Kubernetes, `gateway` a script and the options of `serve` that a run gives. Engines without it: `chosen` what a run says
for all of them, `vllm` `sglang` `llamacpp` a script each. `flags` words with their reasons, `scripts` bash of them,
`rendering` templates, `readme` the page beside all files, `reading` what is read of a run's folders.
"""
