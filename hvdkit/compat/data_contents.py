"""What training data contain, as far as it can be seen without reading them: arrays, files' names, and first batches.

Keras shows neither. A `tf.data.Dataset` holds what its constructors were given, in attributes with private names, and
Keras reads the first batches of Python's data to know their shapes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.compat.lookup import missing_in_keras, private

_ROWS, _BYTES = 64, 1 << 20  # of an array that are looked at, at most
_SOURCES = {"_TensorSliceDataset", "_TensorDataset", "_RangeDataset"}
_NEUTRAL = {
    "_OptionsDataset",
    "_PrefetchDataset",
    "_ParallelMapDataset",
}  # hvdkit and Keras choose these by the machine
UNSEEDED = (0, 0)  # the seeds of a shuffle that has none
PYTHON = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}


class Fingerprint:
    """The digest of what is added to it.

    Attributes:
        varies: whether an array was added whose rows are not all the same. Two shards of constant data are equal, too.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.varies = False

    def add(self, *values: Any) -> None:
        """Adds plain values."""
        self._hash.update(repr(values).encode())

    def add_array(self, array: Any) -> None:
        """Adds the shape and some rows of an array or eager tensor."""
        shape = tuple(array.shape)
        self.add(shape)
        rows = np.asarray(array)[None] if not shape else _some_rows(array, shape)
        if rows.dtype == object:  # texts, such as files' names
            rows = np.array([_with_size(text) for text in rows.ravel()], dtype=bytes)
        self._hash.update(np.ascontiguousarray(rows).tobytes())
        self.varies |= len(rows) > 1 and bool((rows[1:] != rows[:1]).any())

    def hex(self) -> str | None:
        """Returns the digest; None if nothing varies."""
        return self._hash.hexdigest() if self.varies else None


def of_batches(batches: Iterable[Any]) -> str | None:
    """Returns the fingerprint of batches; None if their examples are all the same."""
    found = Fingerprint()
    for batch in batches:
        for leaf in tf.nest.flatten(batch):
            if hasattr(leaf, "shape"):
                found.add_array(leaf)
    return found.hex()


def of_dataset(dataset: Any) -> str | None:
    """Returns the fingerprint of what determines a data set's elements, but not of their order when it is shuffled.

    None if that cannot be seen, as with elements from Python; if the data set draws its elements at random, or is
    shuffled without a seed and repeated for ever, so that ranks draw different ones; or if it is constant. A seed is
    that of the shuffle or of TensorFlow (`keras.utils.set_random_seed`).
    """
    if not isinstance(dataset, tf.data.Dataset):
        return None
    parts = list(_parts(dataset))
    leaves = [part for part in parts if not list(inputs_of(part))]
    if any(type(part).__name__ not in _SOURCES for part in leaves):
        return None
    is_endless = int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY
    shuffles = seeds_of(dataset)
    if is_endless and UNSEEDED in shuffles:
        return None
    operations = set().union(*map(operations_of, parts))
    draws = any(name.startswith("Random") for name in operations)
    if operations & PYTHON or (draws and all(type(part).__name__ == "_RangeDataset" for part in leaves)):
        return None
    found = Fingerprint()
    if is_endless:  # ranks with other seeds see other elements
        found.add(shuffles)
    for part in parts:
        _add_part(found, part)
    found.varies |= any(type(part).__name__ == "_RangeDataset" and int(part.cardinality()) > 1 for part in leaves)
    return found.hex()


def seeds_of(dataset: Any) -> list[tuple[int, int]]:
    """Returns the seeds with which a data set is shuffled; `UNSEEDED` where each process draws another order."""
    return [_seeds(part) for part in _parts(dataset) if type(part).__name__ == "_ShuffleDataset"]


def divided_seeds_of(dataset: Any) -> list[tuple[int, int]]:
    """Returns the seeds of `seeds_of` that apply before `tf.data.Dataset.shard` divides the data."""
    shards = (part for part in _parts(dataset) if type(part).__name__ == "_ShardDataset")
    return [seeds for part in shards for seeds in seeds_of(part)]


def calls_python(dataset: Any) -> bool:
    """Returns whether Python makes elements of a data set: `from_generator`, `py_function` or `numpy_function`."""
    return isinstance(dataset, tf.data.Dataset) and any(operations_of(part) & PYTHON for part in _parts(dataset))


def note_first_batch(dataset: tf.data.Dataset, note: Callable[[list[np.ndarray]], None]) -> tf.data.Dataset:
    """Returns the data set, which calls `note` with the arrays of its first batch when that is read; one time only."""
    with tf.device("CPU:0"):  # where data sets run
        noted = tf.Variable(False, trainable=False, name="noted_first_batch")

    def call(*arrays: np.ndarray) -> bool:
        note(list(arrays))
        return True

    def look(*batch: Any) -> Any:
        given = batch if isinstance(dataset.element_spec, tuple) else batch[0]
        leaves = tf.nest.flatten(given, expand_composites=True)
        tf.cond(noted, lambda: True, lambda: noted.assign(tf.numpy_function(call, leaves, tf.bool)).read_value())
        return tf.nest.pack_sequence_as(dataset.element_spec, leaves, expand_composites=True)

    return dataset.map(tf.autograph.experimental.do_not_convert(look))


def watch_first_batches(note: Callable[[list[Any]], None]) -> Callable[[], None]:
    """Calls `note` with each list of batches that Keras reads to know the shapes of data from Python.

    Returns:
        The function that ends this.
    """
    try:
        from keras.src.trainers.data_adapters import data_adapter_utils
    except ImportError as error:
        raise missing_in_keras("data_adapter_utils") from error
    newer = "get_keras_tensor_spec"  # which the older function calls
    name = newer if hasattr(data_adapter_utils, newer) else "get_tensor_spec"
    original = private(data_adapter_utils, name)

    def spec_of(batches: list[Any]) -> Any:
        note(batches)
        return original(batches)

    setattr(data_adapter_utils, name, spec_of)
    return lambda: setattr(data_adapter_utils, name, original)


def _some_rows(array: Any, shape: tuple[int, ...]) -> np.ndarray:
    row = max(1, int(np.prod(shape[1:]))) * np.dtype(getattr(array.dtype, "as_numpy_dtype", np.float64)).itemsize
    number = min(shape[0], max(2, min(_ROWS, _BYTES // row)))
    places = np.linspace(0, max(0, shape[0] - 1), number).astype(np.int64)
    return tf.gather(array, places).numpy() if isinstance(array, tf.Tensor) else np.asarray(array)[places]


def _with_size(text: Any) -> bytes:
    """Returns a text, and the size of the file that it names: hosts may have files of their own in the same place."""
    name = text if isinstance(text, bytes) else str(text).encode()
    try:
        return b"%s %d" % (name, Path(name.decode()).stat().st_size)
    except (OSError, ValueError):
        return name


def inputs_of(dataset: Any) -> Iterator[Any]:
    """Yields the data sets from which a data set is made."""
    yield from private(dataset, "_inputs")()
    for name, value in vars(dataset).items():
        if name in ("_filenames", "_impl") and isinstance(value, tf.data.Dataset):
            yield value


def operations_of(part: Any) -> set[str]:
    """Returns the names of the operations in the functions that a data set itself calls, as in `map`."""
    return {node.op for function in _functions(part) for node in _nodes(function)}


def _parts(dataset: Any) -> Iterator[Any]:
    """Yields the data set, and those that it is made from."""
    yield dataset
    for part in inputs_of(dataset):
        yield from _parts(part)


def _seeds(part: Any) -> tuple[int, int]:
    return int(private(part, "_seed")), int(private(part, "_seed2"))


def _functions(part: Any) -> Iterator[Any]:
    for value in vars(part).values():
        if type(value).__name__ == "StructuredFunctionWrapper":
            yield value.function


def _nodes(function: Any) -> Iterator[Any]:
    graph = function.graph.as_graph_def()
    yield from graph.node
    for inner in graph.library.function:
        yield from inner.node_def


def _add_part(found: Fingerprint, part: Any) -> None:
    """Adds a part's own arguments, and the constants in its functions."""
    kind = type(part).__name__
    found.add("" if kind in _NEUTRAL else kind)
    for name, value in sorted(vars(part).items()):
        if name not in ("_seed", "_seed2") and not name.startswith("_num_parallel"):
            _add_tensors(found, value if isinstance(value, (list, tuple)) else [value])
    for function in _functions(part):
        for node in _nodes(function):
            if node.op == "Const":
                found.add(node.attr["value"].SerializeToString(deterministic=True))
        _add_tensors(found, function.captured_inputs)


def _add_tensors(found: Fingerprint, values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, tf.Tensor) and hasattr(value, "numpy") and value.dtype not in (tf.variant, tf.resource):
            found.add_array(value)
