"""`python -m hvdkit.sweep`: hyperparameter sweeps that run many trainings in parallel (task parallelism)."""
