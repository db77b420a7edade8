"""Smaller variants of a trained model: quantized by Keras, and pruned by magnitude."""

import functools
from collections.abc import Callable

import keras
import numpy as np

from hvdkit.errors import UsageError

_MATRIX = 2  # axes of a weight that is pruned, at least: not biases and scales


def quantized(model: keras.Model, mode: str) -> keras.Model:
    """Quantizes the layers of a model that Keras can quantize, in place, and returns it.

    Args:
        model: a built model.
        mode: one of `hvdkit.compress.QUANTIZATIONS`; see `keras.Model.quantize`.

    Raises:
        UsageError: none of its layers can be quantized so.
    """
    before = {variable.path: variable.dtype for variable in model.variables}
    try:
        model.quantize(mode)
    except Exception as error:  # whatever a layer's own code raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{mode}: Keras cannot quantize this model ({reason}).") from error
    if {variable.path: variable.dtype for variable in model.variables} == before:
        raise UsageError(
            f"{mode}: no layer of this model can be quantized by Keras, which knows Dense, EinsumDense, "
            f"Embedding and ReversibleEmbedding."
        )
    return model


def pruned(model: keras.Model, share: float) -> keras.Model:
    """Sets the weights of smallest magnitude to 0, over all matrices and kernels of a model together; returns it.

    S. Han et al., "Learning both weights and connections for efficient neural networks", 2015,
    https://arxiv.org/abs/1506.02626, without the training after it.

    Args:
        model: a built model; it is changed.
        share: share of the weights that become 0, between 0 and 1.
    """
    kernels = [weight for weight in model.trainable_weights if len(weight.shape) >= _MATRIX]
    magnitudes = np.concatenate([np.abs(keras.ops.convert_to_numpy(kernel)).ravel() for kernel in kernels])
    if not len(magnitudes):
        return model
    kept = len(magnitudes) - round(share * len(magnitudes))
    least = np.partition(magnitudes, -kept)[-kept] if kept else np.inf
    for kernel in kernels:
        values = keras.ops.convert_to_numpy(kernel)
        kernel.assign(np.where(np.abs(values) >= least, values, 0))
    return model


def makers(quantizations: list[str], shares: list[float]) -> dict[str, Callable[[keras.Model], keras.Model]]:
    """Returns the variants by name: how each is made of a newly loaded model, which is changed."""
    made: dict[str, Callable[[keras.Model], keras.Model]] = {"as trained": lambda model: model}
    made |= {mode: functools.partial(quantized, mode=mode) for mode in quantizations}
    for share in shares:
        made[f"pruned {share:g}"] = functools.partial(pruned, share=share)
        for mode in quantizations:
            made[f"pruned {share:g}, {mode}"] = functools.partial(_pruned_and_quantized, share=share, mode=mode)
    return made


def _pruned_and_quantized(model: keras.Model, share: float, mode: str) -> keras.Model:
    return quantized(pruned(model, share), mode)
