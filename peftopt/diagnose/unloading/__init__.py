"""Adapters that come and go on a running server, and what is then kept."""
