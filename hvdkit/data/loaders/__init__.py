"""Loaders: objects that give `fit` its batches, and how `hvdkit.data.shard` divides each kind.

A kind has a module with a function `divide(data, rank, size, uneven)`. Other libraries are not imported: their classes
are recognized by name, as Keras does it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras

from hvdkit.data.loaders import grain, hugging_face, py_dataset, pytorch, streams

_BY_NAME: dict[tuple[str, str], Callable] = {
    ("torch", "DataLoader"): pytorch.divide,
    ("grain", "MapDataset"): grain.divide_map_dataset,
    ("grain", "IterDataset"): grain.divide_iter_dataset,
    ("grain", "DataLoader"): grain.divide_data_loader,
    ("datasets", "Dataset"): hugging_face.divide,
    ("datasets", "IterableDataset"): hugging_face.refuse,
    ("datasets", "DatasetDict"): hugging_face.refuse,
    ("datasets", "IterableDatasetDict"): hugging_face.refuse,
}


def divider_of(data: Any) -> Callable[[Any, int, int, str], Any] | None:
    """Returns the function that divides data of this kind over ranks; None if they are not a loader."""
    if isinstance(data, keras.utils.PyDataset):
        return py_dataset.divide
    for parent in type(data).__mro__:
        divide = _BY_NAME.get((parent.__module__.partition(".")[0], parent.__name__))
        if divide:
            return divide
    return streams.divide if isinstance(data, Iterator) else None
