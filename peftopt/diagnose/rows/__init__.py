"""Turns measurements into rows: costs, explanations, and advice."""
