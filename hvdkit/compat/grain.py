"""Grain: the arguments of a `grain.DataLoader`, and what a data set was made of, which neither shows."""

from collections.abc import Iterator
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


def is_batched(data: Any) -> bool:
    """Returns whether a data set or loader puts its examples into batches, as far as the names of its steps tell."""
    steps = _steps(data) if hasattr(data, "parents") else private_of(data, "_operations", "grain")
    return any("Batch" in type(step).__name__ for step in steps)


def is_repeated(dataset: Any) -> bool:
    """Returns whether a data set is repeated, so that it may never end."""
    return any("Repeat" in type(step).__name__ for step in _steps(dataset))


def _steps(dataset: Any) -> Iterator[Any]:
    yield dataset
    for parent in dataset.parents:
        yield from _steps(parent)
