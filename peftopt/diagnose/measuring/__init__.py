"""How a diagnosis measures: cells that are asked in turns, on servers that it starts."""
