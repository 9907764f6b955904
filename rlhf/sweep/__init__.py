"""Studies of many runs: their plan, how far they are, searches, clusters."""
