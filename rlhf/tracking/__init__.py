"""What a run tells of itself: lines of metrics, a summary, the code it ran, W&B."""
