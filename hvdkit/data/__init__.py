"""Data: read examples (`sources`), turn them into batches (`pipeline`), and validate them (`checks`).

For data of your own, of any kind that `fit` takes, `shard` is all you need.
"""

from hvdkit.data.shard import even_share, shard

__all__ = ["even_share", "shard"]
