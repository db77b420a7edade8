"""Examples of any structure as the user's code gives them: arrays, a `tf.data.Dataset`, batches or elements by index.

An example is a pair: inputs in any structure, and a tuple of what `fit` takes beside them, which is empty, targets, or
targets and sample weights. tf.data knows tuples and dicts but no lists, so lists become tuples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from hvdkit.compat.data_batches import unit_of
from hvdkit.data.shard import length_of
from hvdkit.errors import UsageError

_LARGEST_TUPLE = 3  # inputs, targets, sample weights
_FORM = "x, (x, y) or (x, y, sample_weight), each an array or a tuple or dict of arrays"


class Examples(Protocol):
    """The examples of one split.

    Attributes:
        size: number of examples.
        in_memory: whether they are arrays; otherwise they are read again in each epoch.
    """

    size: int
    in_memory: bool

    def read(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns the examples `start` to `stop`, in a fixed order, as pairs (inputs, (targets, weights))."""


def examples_of(data: Any, where: str) -> Examples:
    """Returns the examples of what a user's function returned for a split.

    Args:
        data: arrays, a `tf.data.Dataset`, a `PyDataset` or a `grain.MapDataset`.
        where: what a message calls it.

    Raises:
        UsageError: it is of another kind, is empty or infinite, or its arrays differ in length.
    """
    if isinstance(data, tf.data.Dataset):
        return Stream(data, where)
    if isinstance(data, keras.utils.PyDataset):
        if data.num_batches is None:
            raise UsageError(f"{where} is an infinite {type(data).__name__}. Give it a length: __len__.")
        return Indexed(data, data.num_batches, where, batched=True)
    grain_kinds = {parent.__name__ for parent in type(data).__mro__ if parent.__module__.startswith("grain")}
    if "MapDataset" in grain_kinds:
        return Indexed(data, len(data), where, batched=any("Batch" in kind for kind in grain_kinds))
    if grain_kinds or isinstance(data, Iterator) or type(data).__name__ in ("DataLoader", "function"):
        raise UsageError(
            f"{where} is a {type(data).__module__}.{type(data).__name__}, whose examples have no index, so that ranks "
            f"could not divide them or resume. Return arrays, a PyDataset, a grain.MapDataset, or a tf.data.Dataset, "
            f"such as tf.data.Dataset.from_generator(...)."
        )
    return Arrays(data, where)


class Arrays:
    """Arrays [examples, ...] in memory; see `Examples`.

    Floats become Keras' float type, as in `fit`. Memory-mapped arrays stay on disk, except for a rank's own part.

    Args:
        data: see `_FORM`.
        where: what a message calls it.

    Raises:
        UsageError: something is no array, or the arrays differ in length.
    """

    in_memory = True

    def __init__(self, data: Any, where: str) -> None:
        parts = tuple(data) if isinstance(data, (tuple, list)) else (data,)
        _check_parts(len(parts), where)
        self._arrays = as_pair(_as_tuples(parts, lambda leaf: _as_array(leaf, where)))
        lengths = sorted({_length(leaf) for leaf in tf.nest.flatten(self._arrays)})
        if len(lengths) != 1:
            raise UsageError(
                f"The arrays of {where} have {' and '.join(map(str, lengths)) or 'no'} examples; one example needs a "
                f"row in each. Return arrays of the same length, as {_FORM}."
            )
        self.size = lengths[0]

    def read(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns a range of rows."""
        return tf.data.Dataset.from_tensor_slices(tf.nest.map_structure(lambda a: _rows(a, start, stop), self._arrays))


class Stream:
    """A finite `tf.data.Dataset` of examples, or of batches, which are taken apart; see `Examples`.

    Args:
        dataset: its elements are x, (x, y) or (x, y, sample_weight), in the same order whenever it is read.
        where: what a message calls it.

    Raises:
        UsageError: it is infinite, or its elements have another form.
    """

    in_memory = False

    def __init__(self, dataset: tf.data.Dataset, where: str) -> None:
        if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise UsageError(f"{where} is an infinite tf.data.Dataset. Leave repeat() out, or end it with take(n).")
        if unit_of(dataset) == "batches":
            dataset = dataset.unbatch()
        if isinstance(dataset.element_spec, tuple):
            _check_parts(len(dataset.element_spec), where)
        self._pairs = dataset.map(lambda *parts: _in_keras_float(as_pair(parts)))
        self.size = int(length_of(dataset) or 0)

    def read(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns a range of examples; those before it are read and dropped."""
        return self._pairs.skip(start).take(stop - start)


class Indexed:
    """Elements by index, each an example or a batch of examples; see `Examples`.

    All batches but the last must be of one size: only then it is known, without reading all, where an example is.

    Args:
        data: what has `data[index]`.
        length: number of elements.
        where: what a message calls it.
        batched: whether elements are batches.

    Raises:
        UsageError: it is empty, or an element is no example or batch.
    """

    in_memory = False

    def __init__(self, data: Any, length: int, where: str, *, batched: bool) -> None:
        if not length:
            raise UsageError(f"{where} is a {type(data).__name__} without elements. Give it some.")
        self._data, self._where = data, where
        self._element: Callable[[int], Any] = self._batch if batched else self._row
        self._per_element = 1
        first = self._element(0)
        self._per_element = _length(tf.nest.flatten(first)[0])
        self.size = self._per_element * (length - 1) + _length(tf.nest.flatten(self._element(length - 1))[0])
        self._length = length
        self._spec = tf.nest.map_structure(
            lambda leaf: tf.TensorSpec([None, *leaf.shape[1:]], tf.as_dtype(leaf.dtype)), first
        )

    def read(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns a range of examples; of batches, those that have them are made."""
        first, last = start // self._per_element, -(-stop // self._per_element)
        elements = tf.data.Dataset.from_generator(
            lambda: (self._checked(index) for index in range(first, last)), output_signature=self._spec
        )
        elements = elements.map(lambda *pair: _in_keras_float(pair))
        return elements.unbatch().skip(start - first * self._per_element).take(stop - start)

    def _checked(self, index: int) -> Any:
        element = self._element(index)
        number = _length(tf.nest.flatten(element)[0])
        if number != self._per_element and index < self._length - 1:
            raise ValueError(f"batch {index} of {self._where} has {number} examples, and batch 0 {self._per_element}")
        return element

    def _batch(self, index: int) -> Any:
        parts = self._data[index]
        parts = tuple(parts) if isinstance(parts, (tuple, list)) else (parts,)
        _check_parts(len(parts), self._where)
        return as_pair(_as_tuples(parts, lambda leaf: _as_array(leaf, self._where)))

    def _row(self, index: int) -> Any:
        parts = self._data[index]
        parts = tuple(parts) if isinstance(parts, (tuple, list)) else (parts,)
        _check_parts(len(parts), self._where)
        return as_pair(_as_tuples(parts, lambda leaf: _as_array(np.asarray(leaf)[None], self._where)))


def as_pair(parts: Sequence[Any]) -> tuple[Any, tuple]:
    """Returns (inputs, (targets, weights)) of x, (x, y) or (x, y, sample_weight); None at the end counts as absent."""
    kept = list(parts)
    while len(kept) > 1 and kept[-1] is None:
        kept.pop()
    return kept[0], tuple(kept[1:])


def named_leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a structure, with what a message calls them: `inputs['age']` of inputs."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from named_leaves(part, f"{name}[{key!r}]")
    elif isinstance(value, tuple):
        for place, part in enumerate(value):
            yield from named_leaves(part, f"{name}[{place}]")
    elif value is not None:
        yield name, value


def _check_parts(number: int, where: str) -> None:
    if not 1 <= number <= _LARGEST_TUPLE:
        raise UsageError(f"{where} has {number} parts, and fit takes {_FORM}. Put several inputs into a dict or tuple.")


def _as_tuples(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Converts the leaves of a structure, with tuples in place of its lists; None stays None."""
    if isinstance(value, Mapping):
        return {name: _as_tuples(part, convert) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_as_tuples(part, convert) for part in value)
    return None if value is None else convert(value)


def _as_array(leaf: Any, where: str) -> Any:
    if isinstance(leaf, tf.RaggedTensor):
        return leaf
    array = np.asarray(leaf) if hasattr(leaf, "__array__") else leaf
    if isinstance(array, np.ndarray) and array.dtype == object and all(isinstance(one, str) for one in array.flat):
        return array.astype(np.str_)
    if not isinstance(array, np.ndarray) or not array.ndim or array.dtype.kind not in "biufUS":
        what = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(leaf).__name__}"
        raise UsageError(
            f"{where} has {what} where an array of numbers or texts [examples, ...] is expected. Convert it with "
            f"numpy.asarray(...), or rows of differing length with tf.ragged.constant(...)."
        )
    return array


def _in_keras_float(pair: Any) -> Any:
    return tf.nest.map_structure(
        lambda leaf: tf.cast(leaf, keras.config.floatx()) if leaf.dtype == tf.float64 else leaf, pair
    )


def _length(leaf: Any) -> int:
    return int(leaf.shape[0])


def _rows(leaf: Any, start: int, stop: int) -> Any:
    rows = leaf[start:stop]
    is_float = isinstance(rows, np.ndarray) and rows.dtype.kind == "f"
    return rows.astype(keras.config.floatx(), copy=False) if is_float else rows
