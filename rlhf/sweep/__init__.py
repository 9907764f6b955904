"""Sweeps: which runs they consist of, how far each is, searches by Optuna, jobs on SLURM."""
