"""Policies against each other, and judges against each other: the commands `rlhf-compare` and `rlhf-agreement`."""
