"""`load_model`: loads a saved model, with a `DistributedOptimizer` that resumes from the saved optimizer state."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import h5py
import keras
import numpy as np

from hvdkit.compression import Compression
from hvdkit.optimizers.distributed import DistributedOptimizer

_log = logging.getLogger(__name__)


def load_model(
    filepath: str | os.PathLike[str],
    custom_optimizers: Sequence[type] | None = None,
    custom_objects: dict[str, Any] | None = None,
    compression: Any = Compression.none,
    legacy_opts: bool = False,
) -> keras.Model:
    """Loads a model and wraps its optimizer, with its state, in a `DistributedOptimizer`.

    Every rank reads the file. The model may have been saved with a wrapped or a plain optimizer: a file contains the
    inner optimizer in both cases.

    Args:
        filepath: a `.keras` or `.h5` file.
        custom_optimizers: optimizer classes that Keras does not know.
        custom_objects: other names in the file, and the classes or functions that they refer to.
        compression: compression of gradients; see `DistributedOptimizer`.
        legacy_opts: must be False: Keras 3 has no legacy optimizers.

    Returns:
        The model, compiled if it was saved compiled.

    Raises:
        ValueError: `legacy_opts` is True, or there is no such file.
    """
    if legacy_opts:
        raise ValueError(
            "load_model(legacy_opts=True) asks for the optimizers of tf.keras.optimizers.legacy, which Keras 3 does "
            "not have. Leave the argument out; if the file was written by Keras 2, load it there, save the weights "
            "(model.save_weights('x.weights.h5')), and load these into the same model compiled here."
        )
    known = {cls.__name__: cls for cls in custom_optimizers or ()}
    model = keras.saving.load_model(os.fspath(filepath), custom_objects={**known, **(custom_objects or {})})
    if model.compiled and model.optimizer is not None:
        if os.fspath(filepath).endswith((".h5", ".hdf5")):
            _restore_slots(model, os.fspath(filepath))
        # Replace only the attribute: another call of compile would reset the metrics' state.
        model.optimizer = DistributedOptimizer(model.optimizer, compression=compression)
    return model


def _restore_slots(model: keras.Model, path: str) -> None:
    """Reads the optimizer's state from an HDF5 file: Keras 3 writes it, but does not read it."""
    with h5py.File(path) as file:
        group = file.get("optimizer_weights")
        if group is None:
            return
        # Long lists are split into weight_names0, weight_names1, ...
        parts = sorted((k for k in group.attrs if k.startswith("weight_names")), key=lambda k: (len(k), k))
        values = [group[n.decode() if isinstance(n, bytes) else n][()] for part in parts for n in group.attrs[part]]
    # Keras has already built the optimizer for no variables, and an optimizer is built only once.
    model.optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    model.optimizer.build(model.trainable_variables)
    if [tuple(v.shape) for v in model.optimizer.variables] != [np.shape(value) for value in values]:
        _log.warning("The optimizer's state in %s is of another Keras: the optimizer starts anew.", path)
        return
    for variable, value in zip(model.optimizer.variables, values, strict=True):
        variable.assign(value)
