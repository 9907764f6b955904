"""Runs with several processes: how they start, what they exchange, and how sharded forward passes stay in lockstep."""
