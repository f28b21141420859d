"""From what was measured to rows: what costs what, what explains it, and what to do."""
