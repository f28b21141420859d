"""Is a pull request worse than what was accepted? Two small records of runs are compared. Pure."""
