"""Where the time of a step goes, on every rank: what `hvdkit.callbacks.ProfileCallback` is made of.

`marks` notes times inside the graph, `shares` makes sense of them, `trace` writes them for Perfetto.
"""
