"""One module for each bottleneck: its measurements and its rows."""
