"""Where spans are read from: `log`, the log of `peftopt serve`, of the files that `following` opens; `lines` is what it
takes of a line, `sums` what it makes of a window's lines.
"""
