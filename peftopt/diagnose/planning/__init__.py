"""Merge or keep apart, calculated from measurements and a plan of traffic."""
