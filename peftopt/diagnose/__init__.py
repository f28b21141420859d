"""Where a PEFT deployment loses time and memory, measured on the user's own model, engine and machine; merge or keep
apart, calculated from it."""
