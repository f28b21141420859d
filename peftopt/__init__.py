"""Make a PEFT model fast in production, and know that it is still the same model."""

__version__ = "0.1.0"
