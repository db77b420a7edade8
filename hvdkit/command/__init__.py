"""The command `hvdkit`: its jobs, the spelling of options, shell completion and `--version`.

Jobs import `arguments.Parser` from this package. To avoid an import cycle, this package imports jobs only by name, when
it runs them.
"""
