"""`python -m hvdkit.sweep`: many training runs over the ranks and hosts at hand (task parallelism)."""
