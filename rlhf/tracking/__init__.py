"""What a run records about itself: metrics, a summary, the code that ran, and the same in Weights & Biases."""
