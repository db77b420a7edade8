"""`torch.utils.data.DataLoader`."""

import copy
import itertools
import logging
from collections.abc import Iterator
from typing import Any

from hvdkit.compat import pytorch
from hvdkit.data.rounds import rounds_in, steps_of, whole_rounds
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)

_SEED = 0  # as in torch's DistributedSampler


def divide(loader: Any, rank: int, size: int, uneven: str) -> Any:
    """Returns a `DataLoader` of the batches `rank`, `rank + size`, ... of a `DataLoader`, which loads no others.

    A loader of an `IterableDataset` loads all batches on each rank, since they have no index.

    Raises:
        UsageError: the loader has a `DistributedSampler`, which divides already.
    """
    sampler = loader.sampler
    if hasattr(sampler, "num_replicas"):
        raise UsageError(
            f"The DataLoader has a {type(sampler).__name__}, which divides its examples over ranks already. Give fit "
            f"the loader itself, or hvd.data.shard a loader without that sampler."
        )
    if pytorch.is_iterable(loader):
        return _divide_stream(loader, rank, size, uneven)
    steps_of(len(loader), size, uneven, "batches")
    sampler = _in_common_order(sampler)
    if loader.batch_sampler is None:  # the data set has whole batches
        return pytorch.with_samplers(loader, sampler=EveryNth(sampler, rank, size, uneven))
    batches = loader.batch_sampler
    if getattr(batches, "sampler", None) is loader.sampler:
        batches = copy.copy(batches)
        batches.sampler = sampler
    return pytorch.with_samplers(loader, sampler=sampler, batch_sampler=EveryNth(batches, rank, size, uneven))


class EveryNth:
    """A sampler of the indices that another one gives this rank.

    Args:
        whole: the sampler to divide, of examples or batches; in the same order on all ranks.
        rank: index of the shard.
        size: number of shards.
        uneven: see `hvdkit.data.shard`.
    """

    def __init__(self, whole: Any, rank: int, size: int, uneven: str) -> None:
        self.whole = whole
        self._rank, self._size, self._uneven = rank, size, uneven

    def __iter__(self) -> Iterator[Any]:
        # Not to the end, where whole_rounds would warn in each epoch.
        return itertools.islice(whole_rounds(self.whole, self._rank, self._size, self._uneven), len(self))

    def __len__(self) -> int:
        return rounds_in(len(self.whole), self._size, self._uneven)


def _in_common_order(sampler: Any) -> Any:
    """Returns a sampler that draws the same order on all ranks, if it draws from a generator that differs."""
    if getattr(sampler, "generator", sampler) is not None:  # it has a generator of its own, or needs none
        return sampler
    _log.info(
        "%s has no generator: it gets one with seed %d on all ranks, whose orders would differ. DataLoader(..., "
        "generator=torch.Generator().manual_seed(1)) sets another seed.",
        type(sampler).__name__,
        _SEED,
    )
    sampler = copy.copy(sampler)
    sampler.generator = pytorch.generator(_SEED)
    return sampler


def _divide_stream(loader: Any, rank: int, size: int, uneven: str) -> Any:
    length = len(loader) if hasattr(loader.dataset, "__len__") else None
    steps = None if length is None else steps_of(length, size, uneven, "batches")
    return pytorch.loader_of(lambda: whole_rounds(loader, rank, size, uneven), steps)
