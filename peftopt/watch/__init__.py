"""Is production still what was decided? Detectors with one false-alarm budget over windows of real traffic.

`promise` what a run decided, `spans` what users saw in a span of time, `sources/` read spans of logs and of metrics,
`detectors` bet against the promise, `watching` joins them: which detectors there are, what they hear, what they say.
"""
