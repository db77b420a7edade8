"""Benchmarks: `python -m hvdkit.bench throughput|collectives|scaling|peers|accuracy`."""
