"""Loads and unloads adapters on a running server, and measures the memory that is kept."""
