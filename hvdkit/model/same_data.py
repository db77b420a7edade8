"""Finds training data that no rank has divided, before training starts.

Each rank would train on all of them: an epoch does its work once for each rank, and shows the model N times as much.
The data are not read for it. What can be seen are arrays, names of files and the steps of a `tf.data.Dataset`, and the
batches that Keras has read of other data to know their shapes (see `hvdkit.compat.data_contents`). Where Python makes
the elements of a `tf.data.Dataset`, the first batch is looked at when the first step reads it. Data that are shuffled
in another order on each rank are found, too, where the arrays can be seen.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from hvdkit.collectives.mesh import copy_index
from hvdkit.compat import data_contents, fit_loop
from hvdkit.data import common_order
from hvdkit.data.loaders.py_dataset import PyDatasetShard

_log = logging.getLogger(__name__)

_read: list[list[Any]] = []  # for each running `fit`, the first batches that Keras has read, until they are looked at


class Contents(NamedTuple):
    """What a rank knows of its training data.

    Attributes:
        copy: the index of the model replica that trains on them; ranks of one replica rightly have the same.
        fingerprint: equal on ranks with equal data; None if it is not known.
        order: the fingerprint of the order that a divided `PyDataset` holds; None if it holds none.
        seeds: those with which a `tf.data.Dataset` was shuffled before it was divided.
        later: whether the fingerprint will be known after the first step; see `FirstBatch`.
    """

    copy: int
    fingerprint: str | None
    order: str | None = None
    seeds: tuple[tuple[int, int], ...] = ()
    later: bool = False


class FirstBatch:
    """The first batch that `fit` reads of a `tf.data.Dataset` whose elements Python makes.

    Args:
        iterator: that of the running `fit`, whose data set is replaced by one that notes the batch.
    """

    def __init__(self, iterator: Any) -> None:
        self.fingerprint: str | None = None  # not known yet, or of constant data
        dataset = fit_loop.dataset_of(iterator)
        fit_loop.replace_dataset(iterator, data_contents.note_first_batch(dataset, self._note))

    def _note(self, arrays: list[np.ndarray]) -> None:
        self.fingerprint = data_contents.of_batches([arrays])


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Returns a context for a `fit`, in which the first batches that Keras reads are noted."""
    batches: list[Any] = []
    _read.append(batches)

    def note(found: list[Any]) -> None:
        if not batches:
            batches.extend(found)

    stop = data_contents.watch_first_batches(note)
    try:
        yield
    finally:
        stop()
        _read.remove(batches)


def contents_of(model: keras.Model) -> Contents:
    """Returns what this rank knows of the training data of the running `fit`. Call it when training begins."""
    iterator, _ = fit_loop.of(model)
    fingerprint, order, later = None, None, False
    seeds: tuple[tuple[int, int], ...] = ()
    try:
        fingerprint, order = _fingerprint(iterator), _order(fit_loop.adapter_of(iterator))
        seeds = tuple(data_contents.divided_seeds_of(fit_loop.dataset_of(iterator)))
        later = fingerprint is None and _calls_python(iterator)
    except Exception as error:  # any error: the data are not ours, and nothing depends on this
        _log.debug("What the data contain cannot be seen: %s", error)
    return Contents(copy_index(model), fingerprint, order, seeds, later)


def warn_if_undivided(mine: Contents, everyone: Sequence[Contents]) -> None:
    """Warns, on the first of the ranks that train together, of data that are the same on all, or whose order is not."""
    copies = {contents.copy for contents in everyone}
    if len(copies) < 2 or mine.copy != min(copies):
        return
    fingerprints = {contents.fingerprint for contents in everyone}
    if len(fingerprints) == 1 and None not in fingerprints:
        _log.warning(
            "All %d ranks train on the same data, so each epoch does the same work %d times. Give each rank its part: "
            "model.fit(hvd.data.shard(data), ...), or x, y = hvd.data.shard((x, y)) for arrays.",
            len(everyone),
            len(copies),
        )
    if len({contents.seeds for contents in everyone}) > 1 or data_contents.UNSEEDED in mine.seeds:
        common_order.warn()
    if len({contents.order for contents in everyone}) > 1:
        _log.warning(
            "hvd.data.shard was given a PyDataset that has another order on each rank, so some examples go to several "
            "ranks, and others to none. Let it shuffle with one seed on all ranks: numpy.random.default_rng(0)."
        )


def _calls_python(iterator: Any) -> bool:
    """Returns whether Python makes the elements of a data set, and not its batches, which Keras has read."""
    dataset = fit_loop.dataset_of(iterator)
    if fit_loop.has_python_adapter(iterator) or not data_contents.calls_python(dataset):
        return False
    return not any(isinstance(spec, tf.OptionalSpec) for spec in tf.nest.flatten(dataset.element_spec))


def _fingerprint(iterator: Any) -> str | None:
    noted = _read[-1]
    batches, noted[:] = list(noted), [None]  # they may be large, and those of validation data do not matter
    if batches:
        return data_contents.of_batches(batches)
    known = fit_loop.adapter_of(iterator).num_batches
    if known and iterator.steps_per_epoch and iterator.steps_per_epoch < known:
        return None  # ranks that shuffle differently may share an epoch in this way
    return data_contents.of_dataset(fit_loop.dataset_of(iterator))


def _order(adapter: Any) -> str | None:
    """Returns the fingerprint of the indices among the attributes of a `PyDataset` that is divided."""
    dataset = getattr(adapter, "py_dataset", None)
    if not isinstance(dataset, PyDatasetShard):
        return None
    found = data_contents.Fingerprint()
    for value in vars(dataset.whole).values():
        indices = np.asarray(value) if isinstance(value, (list, np.ndarray)) else np.zeros(0)
        if indices.ndim == 1 and indices.size and np.issubdtype(indices.dtype, np.integer):
            found.add_array(indices)
    return found.hex()
