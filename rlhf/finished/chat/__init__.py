"""Talking to finished runs, side by side."""
