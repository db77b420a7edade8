"""`python -m hvdkit.compare`: train one task under each parallelism strategy and compare the results."""
