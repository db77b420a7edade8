"""The command `hvdkit`: its jobs by name, how their options are spelled, completion in shells, `--version`.

Jobs are on top of everything, and take `arguments.Parser` from here: this package loads them by name alone.
"""
