"""Profiling of training steps on every rank; `hvdkit.callbacks.ProfileCallback` uses these modules.

`marks` records times inside the graph, `shares` computes the parts of a step, `trace` writes them for Perfetto.
"""
