"""`python -m hvdkit.drill`: runs the training job and injects a fault."""
