"""A bottleneck each: what it measures, and its rows."""
