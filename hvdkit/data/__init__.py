"""Data: where examples come from (`sources`), how they become batches (`pipeline`), and whether they are sound.

For a `tf.data.Dataset` of your own, `shard` is all you need.
"""

from hvdkit.data.shard import even_share, shard

__all__ = ["even_share", "shard"]
