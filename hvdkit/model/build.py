"""Builds a model before its first step."""

import logging
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit.compat.keras3 import layers_of

_log = logging.getLogger(__name__)


def build(model: keras.Model, x: Any) -> None:
    """Builds a model that would otherwise be built in its first step, so all ranks start with the same weights."""
    if all(layer.built for layer in layers_of(model, include_self=False)) and model.weights:
        return
    try:
        spec = keras.tree.map_structure(_symbol, _inputs_of(x))
        model(spec)
    except Exception as error:  # any error: the model's code may need a real batch, or x may be a generator
        _log.debug("The model is built in its first step: %s", error)


def _inputs_of(x: Any) -> Any:
    if isinstance(x, tf.data.Dataset):
        spec = x.element_spec
        return spec[0] if isinstance(spec, tuple) else spec
    return keras.tree.map_structure(lambda a: tf.TensorSpec([None, *np.shape(a)[1:]], a.dtype), x)


def _symbol(spec: Any) -> keras.KerasTensor:
    dtype = spec.dtype.name
    return keras.KerasTensor(spec.shape, keras.config.floatx() if dtype == "float64" else dtype)
