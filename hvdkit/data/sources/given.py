"""Examples of any structure as the user's code gives them: arrays, data sets, and loaders of batches.

What has elements by index is read from there on; what only yields one batch after another is read from its beginning.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from hvdkit.compat.data_batches import unit_of
from hvdkit.data.shard import length_of
from hvdkit.data.sources.structure import (
    FORM,
    as_array,
    as_pair,
    as_tuples,
    check_parts,
    describe,
    examples_in,
    in_keras_float,
    in_rows,
    one_row,
    pair_of,
    spec_of,
)
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)
_PATIENCE = 30  # seconds of counting, after which a stream may look as if it never ended


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


class Arrays:
    """Arrays [examples, ...] in memory; see `Examples`.

    Floats become Keras' float type, as in `fit`. Memory-mapped arrays stay on disk, except for a rank's own part.

    Args:
        data: see `structure.FORM`.
        where: what a message calls it.

    Raises:
        UsageError: something is no array, or the arrays differ in length.
    """

    in_memory = True

    def __init__(self, data: Any, where: str) -> None:
        parts = tuple(data) if isinstance(data, (tuple, list)) else (data,)
        check_parts(len(parts), where)
        self._arrays = as_pair(as_tuples(parts, lambda leaf: as_array(leaf, where)))
        lengths = sorted({int(leaf.shape[0]) for leaf in tf.nest.flatten(self._arrays)})
        if len(lengths) != 1:
            raise UsageError(
                f"The arrays of {where} have {' and '.join(map(str, lengths)) or 'no'} examples; one example needs a "
                f"row in each. Return arrays of the same length, as {FORM}."
            )
        self.size = lengths[0]

    def read(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns a range of rows."""
        rows = tf.nest.map_structure(lambda leaf: _rows(leaf, start, stop), self._arrays)
        return in_rows(tf.data.Dataset.from_tensor_slices(rows))


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
            check_parts(len(dataset.element_spec), where)
        self._pairs = in_rows(dataset).map(lambda *parts: in_keras_float(as_pair(parts)))
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
        self._per_element = examples_in(first)
        self.size = self._per_element * (length - 1) + examples_in(self._element(length - 1))
        self._length = length
        self._spec = spec_of(first)

    def read(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns a range of examples; of batches, those that have them are made."""
        first, last = start // self._per_element, -(-stop // self._per_element)
        elements = tf.data.Dataset.from_generator(
            lambda: (self._checked(index) for index in range(first, last)), output_signature=self._spec
        )
        elements = elements.map(lambda *pair: in_keras_float(pair))
        return in_rows(elements.unbatch()).skip(start - first * self._per_element).take(stop - start)

    def _checked(self, index: int) -> Any:
        element = self._element(index)
        number = examples_in(element)
        if number != self._per_element and index < self._length - 1:
            raise ValueError(f"batch {index} of {self._where} has {number} examples, and batch 0 {self._per_element}")
        return element

    def _batch(self, index: int) -> Any:
        return pair_of(self._data[index], self._where)

    def _row(self, index: int) -> Any:
        return pair_of(one_row(self._data[index]), self._where)


class Passes:
    """Batches, or examples, that can only be read one after another, from the beginning; see `Examples`.

    They are read once to count the examples, and in each pass a rank reads what comes before its shard.

    Args:
        elements: yields them anew each time it is iterated over; if it has a length, only so many count.
        where: what a message calls it.
        batched: whether elements are batches.

    Raises:
        UsageError: it is empty, or an element is no example or batch, or has another structure than the first one.
    """

    in_memory = False

    def __init__(self, elements: Iterable[Any], where: str, *, batched: bool = True) -> None:
        self._elements, self._where, self._batched = elements, where, batched
        self._spec: Any = None
        self.size = 0
        hint = time.monotonic() + _PATIENCE
        for batch in self._batches():
            self.size += examples_in(batch)
            if time.monotonic() > hint:
                hint = float("inf")
                _log.info("%s: counting, %d examples so far; what never ends must be cut off", where, self.size)

    def read(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns a range of examples; those before it are read and dropped."""
        batches = tf.data.Dataset.from_generator(self._batches, output_signature=self._spec)
        examples = in_rows(batches.map(lambda *pair: in_keras_float(pair)).unbatch())
        return examples.skip(start).take(stop - start)

    def _batches(self) -> Iterator[Any]:
        for number, element in enumerate(itertools.islice(self._elements, _length_of(self._elements))):
            batch = pair_of(element if self._batched else one_row(element), self._where)
            spec = spec_of(batch)
            self._spec = spec if self._spec is None else self._spec
            if spec != self._spec:
                kind = "batch" if self._batched else "example"
                raise UsageError(
                    f"{kind} {number} of {self._where} is {describe(spec)}, and the first one {describe(self._spec)}. "
                    f"Let all have the same structure, shapes and types; pad what differs in length, or make it ragged."
                )
            yield batch


def _length_of(elements: Any) -> int | None:
    """Returns a stated number of elements; loaders of PyTorch have a `__len__` that may raise."""
    try:
        return len(elements)
    except TypeError:
        return None


def _rows(leaf: Any, start: int, stop: int) -> Any:
    rows = leaf[start:stop]
    is_float = isinstance(rows, np.ndarray) and rows.dtype.kind == "f"
    return rows.astype(keras.config.floatx(), copy=False) if is_float else rows
