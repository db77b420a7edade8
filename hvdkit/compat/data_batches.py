"""Whether the batches of a `tf.data.Dataset` are of one size, as far as it can be seen without reading them.

A batch dimension that is not static says little: each `batch(n)` has one, for the sake of a short last batch. So this
looks at the transformations that lead to the batches, which a data set holds in attributes with private names.
"""

import enum
from typing import Any

import tensorflow as tf

from hvdkit.compat.data_contents import PYTHON, inputs_of, operations_of
from hvdkit.compat.lookup import private

_BATCHING = {"_BatchDataset", "_ParallelBatchDataset", "_PaddedBatchDataset"}
_MAPPING = {"_MapDataset", "_ParallelMapDataset"}
_UNCHANGED = {
    "_AssertCardinalityDataset",
    "CacheDataset",
    "_CopyToDeviceDataset",
    "_OptionsDataset",
    "_PrefetchDataset",
    "_RestructuredDataset",
    "_ShardDataset",
    "_SkipDataset",
    "_TakeDataset",
    "_ZipDataset",
}
_REPEATED = {"_RepeatDataset", "_ShuffleDataset", "_ShuffleAndRepeatDataset"}
# Operations whose results have as many rows as the data decide, such as those of `tf.boolean_mask`.
_SELECTING = {"Where", "Unique", "UniqueV2", "DynamicPartition", "ListDiff", "NonMaxSuppressionV3", *PYTHON}


class Sizes(enum.IntEnum):
    """How the sizes of batches may differ; a larger number is worse."""

    ONE = 0
    LAST_IS_SHORT = 1
    ANY = 2


def sizes_of(dataset: tf.data.Dataset) -> Sizes:
    """Returns how the sizes of a data set's batches may differ.

    `ANY` where it cannot be seen. A function in `map` that keeps some of a batch's rows, but does not select them by
    one of the usual operations, is not found.
    """
    if _is_static(dataset):
        return Sizes.ONE
    kind = type(dataset).__name__
    inputs = list(inputs_of(dataset))
    if kind in _BATCHING:
        return _of_batch(dataset, inputs[0])
    if kind in _MAPPING and (_is_static(inputs[0]) or operations_of(dataset) & _SELECTING):
        return Sizes.ANY
    if not inputs or kind not in _MAPPING | _UNCHANGED | _REPEATED:
        return Sizes.ANY
    sizes = max(sizes_of(part) for part in inputs)
    if kind in _REPEATED and sizes is Sizes.LAST_IS_SHORT:  # and then it is not the last one
        return Sizes.ANY
    return sizes


def unit_of(dataset: tf.data.Dataset) -> str:
    """Returns what the elements of a data set are, as far as it can be seen: batches, strings or examples."""
    spec = dataset.element_spec
    if isinstance(spec, tf.TensorSpec) and spec.dtype == tf.string and spec.shape.rank == 0:
        return "strings"
    return "batches" if _batches(dataset) else "examples"


def _batches(dataset: Any) -> bool:
    kind = type(dataset).__name__
    return kind in _BATCHING or (kind != "_UnbatchDataset" and any(map(_batches, inputs_of(dataset))))


def _is_static(dataset: tf.data.Dataset) -> bool:
    shapes = [getattr(spec, "shape", None) for spec in tf.nest.flatten(dataset.element_spec)]
    return all(shape is not None and shape.rank and shape[0] is not None for shape in shapes)


def _of_batch(dataset: Any, examples: tf.data.Dataset) -> Sizes:
    size = tf.get_static_value(private(dataset, "_batch_size"))
    if tf.get_static_value(private(dataset, "_drop_remainder")):
        return Sizes.ONE
    number = int(examples.cardinality())
    known = size is not None and number != tf.data.UNKNOWN_CARDINALITY
    divides = known and (number == tf.data.INFINITE_CARDINALITY or number % int(size) == 0)
    return Sizes.ONE if divides else Sizes.LAST_IS_SHORT
