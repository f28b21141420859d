"""Where spans are read from: `log`, the log of `peftopt serve`, of the files that `following` opens; `lines` is what it
takes of a line, `sums` what it makes of a window's lines. And the metrics of a server, or those that a Prometheus has
kept: `scrape` compares two looks, `metrics` makes a span of it.
"""
