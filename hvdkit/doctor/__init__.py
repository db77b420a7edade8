"""Checks the hosts of a job before it starts: `python -m hvdkit.doctor -H h1:2,h2:2` says what to fix, and how."""
