"""`grain.DataLoader`: its arguments, which it does not show. Keras reads them in the same way."""

from typing import Any

from hvdkit.compat.lookup import private_of


def shard_options(loader: Any) -> Any:
    """Returns the `ShardOptions` of a loader, or of its sampler."""
    return private_of(loader, "_shard_options", "grain")


def records_of(loader: Any) -> int:
    """Returns the number of records in all epochs; `sys.maxsize` if infinite."""
    return len(private_of(loader, "_sampler", "grain"))


def with_shard(loader: Any, rank: int, size: int) -> Any:
    """Returns a loader of every `size`-th record, with the same source, sampler, operations and workers."""
    import grain

    workers = private_of(loader, "_multiprocessing_options", "grain")
    return type(loader)(
        data_source=private_of(loader, "_data_source", "grain"),
        sampler=private_of(loader, "_sampler", "grain"),
        operations=private_of(loader, "_operations", "grain"),
        worker_count=workers.num_workers,
        worker_buffer_size=workers.per_worker_buffer_size,
        shard_options=grain.sharding.ShardOptions(rank, size, drop_remainder=True),
        read_options=private_of(loader, "_read_options", "grain"),
        enable_profiling=workers.enable_profiling,
    )
