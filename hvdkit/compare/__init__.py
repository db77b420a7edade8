"""`python -m hvdkit.compare`: one task, trained in every way to use several processors, side by side."""
