"""`keras.utils.PyDataset`: batches by index."""

from typing import Any

import keras

from hvdkit.data.rounds import rounds_in, steps_of


def divide(dataset: Any, rank: int, size: int, uneven: str) -> "PyDatasetShard":
    """Returns the batches `rank`, `rank + size`, ... of a `PyDataset`, as a `PyDataset`."""
    if dataset.num_batches is not None:
        steps_of(dataset.num_batches, size, uneven, "batches")
    return PyDatasetShard(dataset, rank, size, uneven)


class PyDatasetShard(keras.utils.PyDataset):
    """A rank's batches of a `PyDataset`, which Keras reads, shuffles and tells of epochs as it does the whole one.

    Other attributes are those of the whole `PyDataset`.

    Attributes:
        whole: the `PyDataset` that is divided.
    """

    def __init__(self, whole: Any, rank: int, size: int, uneven: str) -> None:
        super().__init__(
            workers=whole.workers,
            use_multiprocessing=whole.use_multiprocessing,
            max_queue_size=whole.max_queue_size,
        )
        self.whole = whole
        self._rank, self._size, self._uneven = rank, size, uneven

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "whole":  # not there yet while an object is unpickled
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __getitem__(self, index: int) -> Any:
        place = self._rank + index * self._size
        return self.whole[place % self.whole.num_batches if self._uneven == "pad" else place]

    @property
    def num_batches(self) -> int | None:
        """The number of this rank's batches, the same on all ranks; None if infinite."""
        batches = self.whole.num_batches
        return batches if batches is None else rounds_in(batches, self._size, self._uneven)

    def __len__(self) -> int:
        batches = self.num_batches
        if batches is None:
            raise TypeError(f"{type(self.whole).__name__} is infinite, so its shard has no length.")
        return batches

    def on_epoch_begin(self) -> None:
        """Tells the whole `PyDataset`."""
        self.whole.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Tells the whole `PyDataset`, which may shuffle: with the same seed on all ranks."""
        self.whole.on_epoch_end()
