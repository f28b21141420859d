"""Measurements -> evidence -> verdicts -> Decision. Pure: the same files give the same decision on any machine."""
