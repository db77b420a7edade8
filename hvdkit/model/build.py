"""`BuildFirst`: the callback that builds a model before its first step, so that all ranks start with the same weights.

It takes the shapes from the data set that Keras' `fit` reads, and reads nothing itself: a `PyDataset` or a generator of
the user's may be slow, may have side effects, and may give each batch only once.
"""

import logging
from typing import Any

import keras

from hvdkit.compat import fit_loop
from hvdkit.compat.keras3 import layers_of

_log = logging.getLogger(__name__)


class BuildFirst(keras.callbacks.Callback):
    """Builds a model that Keras would otherwise build in the first step. Put it before callbacks that need weights."""

    checkpointed = False
    sees_executions = True

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Calls the model on symbolic inputs of the data's shapes, unless it is built."""
        model = self.model
        if model.weights and all(layer.built for layer in layers_of(model, include_self=False)):
            return
        try:
            spec = fit_loop.element_spec(fit_loop.of(model)[0])
            inputs = spec[0] if isinstance(spec, tuple) else spec
            model(keras.tree.map_structure(_symbol, inputs))
        except Exception as error:  # any error: the model's code may need a real batch
            _log.debug("The model is built in its first step: %s", error)


def _symbol(spec: Any) -> keras.KerasTensor:
    dtype = spec.dtype.name
    return keras.KerasTensor(spec.shape, keras.config.floatx() if dtype == "float64" else dtype)
