"""Examining hosts before a job does: `python -m hvdkit.doctor -H h1:2,h2:2` says what is wrong, and how to mend it."""
