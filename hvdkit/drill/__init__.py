"""`python -m hvdkit.drill`: the training job, run through a fault on purpose."""
