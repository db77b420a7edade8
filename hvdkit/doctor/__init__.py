"""Examining hosts before a job does: `python -m hvdkit.doctor -H h1:2,h2:2` connects from each to each, and says what to mend."""
