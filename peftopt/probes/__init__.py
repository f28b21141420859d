"""Probes, one file each: a loaded engine and a workload in, raw samples out. They run inside a worker."""
