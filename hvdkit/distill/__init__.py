"""`hvdkit distill`: trains a small model that also learns from a trained one, and compares the two."""
