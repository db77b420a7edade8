"""`torch.utils.data`: what its loaders do not let change. PyTorch is imported only where a loader of it is given."""

import copy
from collections.abc import Callable, Iterator
from typing import Any


def is_iterable(loader: Any) -> bool:
    """Returns whether a `DataLoader` reads an `IterableDataset`, which has no indices."""
    import torch.utils.data

    return isinstance(loader.dataset, torch.utils.data.IterableDataset)


def generator(seed: int) -> Any:
    """Returns a `torch.Generator`."""
    import torch

    return torch.Generator().manual_seed(seed)


def with_samplers(loader: Any, **samplers: Any) -> Any:
    """Returns a copy of a `DataLoader`, with its workers, collation and class, that takes indices from other samplers.

    `DataLoader` refuses to set these attributes, and subclasses may have constructors of their own.

    Args:
        loader: the `DataLoader`.
        **samplers: `sampler`, `batch_sampler`.
    """
    copied = copy.copy(loader)
    vars(copied).update(samplers)
    copied._iterator = None  # persistent workers, which have the indices of the given loader
    return copied


def loader_of(batches: Callable[[], Iterator[Any]], steps: int | None) -> Any:
    """Returns a `DataLoader` of batches.

    Args:
        batches: starts an epoch.
        steps: the number of batches; None if it is not known.
    """
    import torch.utils.data

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return batches()

    class CountedBatches(Batches):
        def __len__(self) -> int:
            return steps or 0

    return torch.utils.data.DataLoader(Batches() if steps is None else CountedBatches(), batch_size=None)
