"""The structure of examples that the user's code gives.

An example is a pair: inputs in any structure, and a tuple of what `fit` takes beside them, which is empty, targets, or
targets and sample weights. tf.data knows tuples and dicts but no lists, so lists become tuples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit.errors import UsageError

_LARGEST_TUPLE = 3  # inputs, targets, sample weights
FORM = "x, (x, y) or (x, y, sample_weight), each an array or a tuple or dict of arrays"


def as_pair(parts: Sequence[Any]) -> tuple[Any, tuple]:
    """Returns (inputs, (targets, weights)) of x, (x, y) or (x, y, sample_weight); None at the end counts as absent."""
    kept = list(parts)
    while len(kept) > 1 and kept[-1] is None:
        kept.pop()
    return kept[0], tuple(kept[1:])


def pair_of(element: Any, where: str) -> Any:
    """Returns a batch of arrays, in one of the forms that `fit` takes, as a pair; see `as_pair`.

    Raises:
        UsageError: it has another form, or something in it is no array.
    """
    parts = tuple(element) if isinstance(element, (tuple, list)) else (element,)
    check_parts(len(parts), where)
    return as_pair(as_tuples(parts, lambda leaf: as_array(leaf, where)))


def one_row(example: Any) -> Any:
    """Returns an example as a batch of one."""
    parts = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    return as_tuples(parts, lambda leaf: np.asarray(leaf)[None])


def spec_of(batch: Any) -> Any:
    """Returns the specs of batches like this one, of any number of examples."""

    def spec(leaf: Any) -> Any:
        shape, dtype = [None, *leaf.shape[1:]], tf.as_dtype(leaf.dtype)
        is_ragged = isinstance(leaf, tf.RaggedTensor)
        return tf.RaggedTensorSpec(shape, dtype, leaf.ragged_rank) if is_ragged else tf.TensorSpec(shape, dtype)

    return tf.nest.map_structure(spec, batch)


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


def check_parts(number: int, where: str) -> None:
    """Raises a `UsageError` if `fit` takes no tuple of so many parts."""
    if not 1 <= number <= _LARGEST_TUPLE:
        raise UsageError(f"{where} has {number} parts, and fit takes {FORM}. Put several inputs into a dict or tuple.")


def as_tuples(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Converts the leaves of a structure, with tuples in place of its lists; None stays None."""
    if isinstance(value, Mapping):
        return {name: as_tuples(part, convert) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(as_tuples(part, convert) for part in value)
    return None if value is None else convert(value)


def as_array(leaf: Any, where: str) -> Any:
    """Returns a leaf as an array of numbers or texts, or as the ragged tensor that it is.

    Raises:
        UsageError: it is something else.
    """
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


def in_keras_float(pair: Any) -> Any:
    """Returns tensors with float64 in Keras' float type, as in `fit`."""
    return tf.nest.map_structure(
        lambda leaf: tf.cast(leaf, keras.config.floatx()) if leaf.dtype == tf.float64 else leaf, pair
    )


def examples_in(pair: Any) -> int:
    """Returns the number of rows of the first leaf."""
    return int(tf.nest.flatten(pair)[0].shape[0])


def in_rows(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns examples whose ragged parts are batches of one row, which `batched` joins.

    An example of a ragged batch may be a plain tensor of its own length. After a `map` tf.data no longer knows that
    others have other lengths, and does not batch them.
    """
    is_ragged = [isinstance(spec, tf.RaggedTensorSpec) for spec in tf.nest.flatten(dataset.element_spec)]
    if not any(is_ragged):
        return dataset

    def in_row(leaf: Any) -> tf.RaggedTensor:
        row = tf.expand_dims(leaf, 0)
        return row if isinstance(row, tf.RaggedTensor) else tf.RaggedTensor.from_tensor(row, ragged_rank=1)

    def with_rows(*parts: Any) -> Any:
        pair = parts if len(parts) > 1 else parts[0]
        leaves = [in_row(leaf) if known else leaf for leaf, known in zip(tf.nest.flatten(pair), is_ragged, strict=True)]
        return tf.nest.pack_sequence_as(pair, leaves)

    return dataset.map(with_rows)


def batched(examples: tf.data.Dataset, size: int, drop_remainder: bool = False) -> tf.data.Dataset:
    """Returns batches of examples; their ragged parts must be in rows, as `in_rows` leaves them."""
    batches = examples.batch(size, drop_remainder=drop_remainder)
    if not any(isinstance(spec, tf.RaggedTensorSpec) for spec in tf.nest.flatten(batches.element_spec)):
        return batches

    def without_rows(*parts: Any) -> Any:
        pair = parts if len(parts) > 1 else parts[0]
        return tf.nest.map_structure(
            lambda leaf: leaf.merge_dims(0, 1) if isinstance(leaf, tf.RaggedTensor) else leaf, pair
        )

    return batches.map(without_rows)


def example_shape(spec: Any) -> tf.TensorShape:
    """Returns the shape of an example; of a ragged one without the row that it is in."""
    return spec.shape[1:] if isinstance(spec, tf.RaggedTensorSpec) else spec.shape


def describe(spec: Any) -> Any:
    """Returns a structure of specs in a short form: shapes with dtypes."""
    if isinstance(spec, Mapping):
        return {name: describe(part) for name, part in spec.items()}
    if isinstance(spec, (tuple, list)):
        return tuple(describe(part) for part in spec)
    shape = example_shape(spec)
    return f"{spec.dtype.name}{list(shape) if shape.rank is not None else ''}"
