"""Are the examples what they should be? Looked at before training, reported with what was found and where."""

import numpy as np
import tensorflow as tf

from hvdkit.data import pipeline
from hvdkit.data.pipeline import Share
from hvdkit.errors import UsageError

_LOOKED_AT = 1000  # examples of a share that does not lie in memory


def check_share(share: Share, split: str, num_classes: int) -> np.ndarray:
    """Checks a share's inputs and labels, and counts its classes.

    All examples of a share in memory are looked at. Of one that is read again each epoch, the labels of all and the
    inputs of the first 1,000.

    Args:
        share: what to check.
        split: its split's name, for the message.
        num_classes: labels must lie below; 0 for windows of tokens, which are bytes and so can be nothing wrong.

    Returns:
        The examples of each class, int64 [num_classes]; without classes their number, int64 [1].

    Raises:
        UsageError: a label out of range, a NaN or Inf, an input that cannot be read or has another shape; and where.
    """
    if not num_classes:
        return np.array([share.size])
    if share.inputs is not None and share.labels is not None:
        inputs, labels = share.inputs, share.labels
    else:
        labels = np.fromiter(share.stream.map(lambda _, y: y).as_numpy_iterator(), np.int64)
        head = share.stream.take(_LOOKED_AT).map(lambda x, y: share.prepare(x))
        try:
            inputs = np.stack(list(head.as_numpy_iterator()))
        except tf.errors.InvalidArgumentError as error:
            raise pipeline.unreadable(split, share.start, share.start + _LOOKED_AT, error) from error
    _check_labels(labels, split, share.start, num_classes)
    _check_inputs(inputs, split, share.start)
    return np.bincount(labels, minlength=num_classes)


def _check_labels(labels: np.ndarray, split: str, start: int, num_classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise UsageError(
            f"Labels out of range: {len(wrong)} of {len(labels)} in this share of split {split!r}, the first is "
            f"{labels[wrong[0]]} at example {start + wrong[0]}; {num_classes} classes need labels 0 to "
            f"{num_classes - 1}. Correct the labels, or the number of classes in the data set's description."
        )


def _check_inputs(inputs: np.ndarray, split: str, start: int) -> None:
    if inputs.dtype.kind not in "uif":
        raise UsageError(f"Inputs of split {split!r} have dtype {inputs.dtype}; numbers are needed.")
    if inputs.dtype.kind == "f":
        wrong = np.flatnonzero(~np.isfinite(inputs.reshape(len(inputs), -1)).all(axis=1))
        if len(wrong):
            raise UsageError(
                f"NaN or Inf in {len(wrong)} of {len(inputs)} inputs of split {split!r}, first at example "
                f"{start + wrong[0]}. Remove or repair these examples."
            )


def empty_classes(counts: np.ndarray, names: list[str]) -> list[str]:
    """Names of the classes without a single example."""
    return [names[c] for c in np.flatnonzero(counts == 0)]


def input_spec(share: Share) -> tf.TensorSpec:
    """Shape and dtype of one prepared example."""
    return share.stream.map(lambda x, y: share.prepare(x)).element_spec
