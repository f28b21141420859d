"""Measures where a PEFT deployment loses time and memory, on the user's own model, engine and machine. Calculates from
that whether to merge or keep apart."""
