"""What the verbs do, for Python: merge, quantize, run, decide, load; and a run's data as pandas DataFrames."""
