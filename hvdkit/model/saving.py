"""`load_model`: a saved model, compiled with a `DistributedOptimizer` that goes on where the saved one stopped."""

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

    Every rank reads the file. It makes no difference whether the model was saved with a wrapped optimizer or a plain
    one: a file holds the inner optimizer.

    Args:
        filepath: a `.keras` or `.h5` file.
        custom_optimizers: classes of optimizers that Keras does not know by itself.
        custom_objects: other names in the file, and the classes or functions that they stand for.
        compression: what gradients look like on the wire; see `DistributedOptimizer`.
        legacy_opts: must be False: Keras 3 has no legacy optimizers.

    Returns:
        The model, compiled if it was saved compiled; otherwise as it was saved.

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
        # The attribute alone is exchanged, not compile called again, which would forget the metrics' state.
        model.optimizer = DistributedOptimizer(model.optimizer, compression=compression)
    return model


def _restore_slots(model: keras.Model, path: str) -> None:
    """Reads the optimizer's state out of an HDF5 file: Keras 3 writes it, and leaves it out when it reads."""
    with h5py.File(path) as file:
        group = file.get("optimizer_weights")
        if group is None:
            return
        # Long lists are cut into weight_names0, weight_names1, ...
        parts = sorted((k for k in group.attrs if k.startswith("weight_names")), key=lambda k: (len(k), k))
        values = [group[n.decode() if isinstance(n, bytes) else n][()] for part in parts for n in group.attrs[part]]
    # Keras has built it for no variables at all by now, and an optimizer is built once.
    model.optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    model.optimizer.build(model.trainable_variables)
    if [tuple(v.shape) for v in model.optimizer.variables] != [np.shape(value) for value in values]:
        _log.warning("The optimizer's state in %s is of another Keras: the optimizer starts anew.", path)
        return
    for variable, value in zip(model.optimizer.variables, values, strict=True):
        variable.assign(value)
