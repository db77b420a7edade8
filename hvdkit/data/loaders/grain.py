"""Grain's data sets and loader."""

import logging
import operator
import sys
from typing import Any

from hvdkit.compat import grain
from hvdkit.data.rounds import steps_of
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)


def divide_map_dataset(dataset: Any, rank: int, size: int, uneven: str) -> Any:
    """Returns the elements `rank`, `rank + size`, ... of a `grain.MapDataset`: batches, if it is batched."""
    length = len(dataset)
    if length == sys.maxsize:  # it is repeated for ever
        return dataset[rank::size]
    elements = size * steps_of(length, size, uneven)
    if elements > length:
        dataset = dataset.repeat(-(-elements // length), reseed_each_epoch=False)
    return dataset[rank:elements:size]


def divide_iter_dataset(dataset: Any, rank: int, size: int, uneven: str) -> Any:
    """Returns the elements `rank`, `rank + size`, ... of a `grain.IterDataset`, of which each rank reads all.

    Raises:
        UsageError: `uneven` is `"pad"`.
    """
    _refuse_pad(dataset, uneven, "call hvd.data.shard before to_iter_dataset(), on the MapDataset")
    _log.info("Each rank reads all elements of the IterDataset. Of the last %d, some may be left out.", size - 1)
    return dataset.batch(size, drop_remainder=True, batch_fn=operator.itemgetter(rank))


def divide_data_loader(loader: Any, rank: int, size: int, uneven: str) -> Any:
    """Returns a `grain.DataLoader` of the records `rank`, `rank + size`, ... of its sampler's order.

    Its operations put this rank's records into batches, whose size is so the local batch.

    Raises:
        UsageError: the loader is divided already, or `uneven` is `"pad"`.
    """
    _refuse_pad(loader, uneven, "use grain.MapDataset")
    given = grain.shard_options(loader)
    if given.shard_count > 1:
        raise UsageError(
            f"The grain.DataLoader is already divided into {given.shard_count} shards by its shard_options. Give fit "
            f"the loader itself, or hvd.data.shard one with grain.sharding.NoSharding()."
        )
    if (records := grain.records_of(loader)) != sys.maxsize:
        steps_of(records, size, uneven, "records")
    return grain.with_shard(loader, rank, size)


def _refuse_pad(data: Any, uneven: str, instead: str) -> None:
    if uneven == "pad":
        raise UsageError(
            f"A grain.{type(data).__name__} has no elements by index to repeat for uneven='pad': use 'drop', or "
            f"{instead}."
        )
