"""What layers have learnt in `adapt`, outside of their variables: a run that resumes must have learnt the same.

A checkpoint has the statistics of `Normalization`, which are variables. Vocabularies and bins it only recognizes: the
program makes them again before it trains, and a saved model has them.
"""

import hashlib
from typing import Any

import keras
import numpy as np

from hvdkit.compat.keras3 import layers_of
from hvdkit.compat.preprocessing import LEARNING, learnt


def digests(model: keras.Model) -> list[dict[str, str]]:
    """Returns digests of the vocabularies and bins of a model's layers, by name, in the order of the layers."""
    return [{name: digest(value) for name, value in learnt(layer).items()} for layer in _layers(model)]


def difference(model: keras.Model, saved: list[dict[str, str]]) -> str | None:
    """Says which layer has learnt something else than in a checkpoint; None if none has."""
    for layer, here, there in zip(_layers(model), digests(model), saved, strict=False):
        for name in here:
            if name in there and here[name] != there[name]:
                return f"layer {layer.name} has learnt another {name.replace('_', ' ')} there than here"
    return None


def settle(model: keras.Model) -> None:
    """Makes `Normalization` compute with its variables, after these were restored."""
    for layer in layers_of(model):
        if isinstance(layer, keras.layers.Normalization) and layer.built:
            layer.finalize_state()


def _layers(model: keras.Model) -> list[Any]:
    learning = [layer for layer in layers_of(model) if isinstance(layer, LEARNING)]
    return [layer for layer in learning if not isinstance(layer, keras.layers.Normalization)]


def digest(value: Any) -> str:
    """Returns the SHA-256 of an array, also of strings, a list, a text or None."""
    array = np.ascontiguousarray(value)
    content = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + content).hexdigest()
