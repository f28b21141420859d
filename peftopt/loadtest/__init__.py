"""A server as its clients see it: requests sent on time, every answer followed to its end, and what came of them."""
