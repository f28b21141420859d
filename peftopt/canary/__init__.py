"""Whether the right adapter answers: fingerprints, mixed batches, reloads."""
