"""The old place of `helpers.servers`, for benchmarks/load.py."""

from helpers.servers import served  # noqa: F401
