"""Validates examples before training and reports what is wrong and where."""

import logging
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data import pipeline
from hvdkit.data.pipeline import Share
from hvdkit.data.sources import CLASSIFICATION, images
from hvdkit.data.sources.structure import batched, named_leaves
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)
_LOOKED_AT = 1000  # number of inputs to check in a shard that is not in memory


def check_share(share: Share, split: str, num_classes: int) -> np.ndarray:
    """Checks a shard's inputs and labels, and counts the examples of each class.

    For a shard in memory, this checks all examples. For a streamed shard, it checks all labels and the first 1,000
    inputs.

    Args:
        share: the shard to check.
        split: the name of its split, for the message.
        num_classes: for classification, every label must be smaller. Pass 0 for token windows: any byte is a valid
            token, so there is nothing to check.

    Returns:
        The number of examples per class, int64 [num_classes]; without classes the number of examples, int64 [1].

    Raises:
        UsageError: a label is out of range, an input has a NaN or Inf, cannot be read or has a different shape. The
            message says where.
    """
    if share.source.kind in pipeline.STRUCTURES:
        _check_structure(share, split)
        return np.array([share.size])
    if not num_classes:
        return np.array([share.size])
    if share.inputs is not None and share.labels is not None:
        inputs, labels = share.inputs, share.labels
    else:
        labels = np.stack(list(share.stream.map(lambda _, y: y).as_numpy_iterator()))
        head = share.stream.take(_LOOKED_AT).map(lambda x, y: share.prepare(x))
        try:
            inputs = np.stack(list(head.as_numpy_iterator()))
        except tf.errors.OpError as error:
            raise pipeline.unreadable(share, error, min(_LOOKED_AT, share.size)) from error
    _check_inputs(inputs, split, share.start)
    if share.source.task != CLASSIFICATION:
        _refuse_infinite(labels, "labels", split, share.start)
        return np.array([share.size])
    _check_labels(labels, split, share.start, num_classes)
    return np.bincount(labels, minlength=num_classes)


def _check_structure(share: Share, split: str) -> None:
    """Checks examples of any structure: all in memory, the first 1,000 of a stream.

    A loss may leave targets out that are NaN, so these are only warned of.
    """
    inputs, labels = share.inputs, share.labels
    if inputs is None:
        looked_at = min(_LOOKED_AT, share.size)
        try:
            inputs, labels = next(iter(batched(share.stream, looked_at)))
        except tf.errors.OpError as error:
            raise UsageError(
                f"{share.source.name}: the first {looked_at} {split} examples cannot be read and put into a batch "
                f"({images.first_line(error)}). Examples need one shape: pad them, or return ragged arrays."
            ) from error
    for name, leaf in named_leaves(inputs, "inputs"):
        _refuse_infinite(_values_of(leaf), name, split, share.start)
    beside = dict(zip(("targets", "sample weights"), labels, strict=False))
    for name, leaf in (named for part, label in beside.items() for named in named_leaves(label, part)):
        values = _values_of(leaf)
        wrong = _infinite_rows(values)
        if len(wrong):
            message = "NaN or Inf in %d of %d %s of split %r, first at example %d: the loss must leave them out."
            _log.warning(message, len(wrong), len(values), name, split, share.start + wrong[0])


def _values_of(leaf: Any) -> np.ndarray:
    return (leaf.to_tensor() if isinstance(leaf, tf.RaggedTensor) else leaf).numpy()


def _check_labels(labels: np.ndarray, split: str, start: int, num_classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise UsageError(
            f"Labels out of range: {len(wrong)} of {len(labels)} in this shard of split {split!r}, the first is "
            f"{labels[wrong[0]]} at example {start + wrong[0]}; {num_classes} classes need labels 0 to "
            f"{num_classes - 1}. Correct the labels, or the number of classes in the data set's description."
        )


def _check_inputs(inputs: np.ndarray, split: str, start: int) -> None:
    if inputs.dtype.kind not in "uif":
        raise UsageError(f"Inputs of split {split!r} have dtype {inputs.dtype}, but must be numbers.")
    _refuse_infinite(inputs, "inputs", split, start)


def _refuse_infinite(values: np.ndarray, what: str, split: str, start: int) -> None:
    wrong = _infinite_rows(values)
    if len(wrong):
        raise UsageError(
            f"NaN or Inf in {len(wrong)} of {len(values)} {what} of split {split!r}, first at example "
            f"{start + wrong[0]}. Remove or repair these examples."
        )


def _infinite_rows(values: np.ndarray) -> np.ndarray:
    """Returns the indices of the rows with a NaN or Inf; none of values that are no floats."""
    if values.dtype.kind != "f":
        return np.zeros(0, np.int64)
    return np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))


def empty_classes(counts: np.ndarray, names: list[str]) -> list[str]:
    """Returns the names of the classes that have no example."""
    return [names[c] for c in np.flatnonzero(counts == 0)]


def specs(share: Share) -> tuple[tf.TensorSpec, tf.TensorSpec]:
    """Returns the shapes and dtypes of one prepared input and of its label."""
    return share.stream.map(lambda x, y: (share.prepare(x), y)).element_spec
