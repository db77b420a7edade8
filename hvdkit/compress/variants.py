"""Smaller variants of a trained model: quantized by Keras, and pruned by magnitude."""

import functools
from collections.abc import Callable

import keras
import numpy as np

from hvdkit.compat.keras3 import keep_policies_of_parts
from hvdkit.compress import gptq
from hvdkit.compress.trained import MATRIX
from hvdkit.errors import UsageError

Change = Callable[[keras.Model], keras.Model]


def quantized(model: keras.Model, mode: str, windows: Callable[[], np.ndarray] | None = None) -> keras.Model:
    """Quantizes the layers of a model that Keras can quantize, in place, and returns it.

    Args:
        model: a built model.
        mode: one of `hvdkit.compress.QUANTIZATIONS`; see `keras.Model.quantize`.
        windows: for `gptq`, returns tokens to calibrate on, int32 [samples, sequence_length].

    Raises:
        UsageError: none of its layers can be quantized so.
    """
    before = {variable.path: variable.dtype for variable in model.variables}
    try:
        if mode == "gptq":
            gptq.quantize(model, windows() if windows else np.zeros([0, 0], np.int32))
        else:
            model.quantize(mode)
    except UsageError:
        raise
    except Exception as error:  # whatever a layer's own code raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{mode}: Keras cannot quantize this model ({reason}).") from error
    if {variable.path: variable.dtype for variable in model.variables} == before:
        raise UsageError(
            f"{mode}: no layer of this model can be quantized by Keras, which knows Dense, EinsumDense, "
            f"Embedding and ReversibleEmbedding."
        )
    keep_policies_of_parts(model)
    return model


def pruned(model: keras.Model, share: float) -> keras.Model:
    """Sets the weights of smallest magnitude to 0, over all matrices and kernels of a model together; returns it.

    S. Han et al., "Learning both weights and connections for efficient neural networks", 2015,
    https://arxiv.org/abs/1506.02626; `hvdkit.compress.trained.Trained.finetune` is the training after it.

    Args:
        model: a built model; it is changed.
        share: share of the weights that become 0, between 0 and 1.
    """
    kernels = [weight for weight in model.trainable_weights if len(weight.shape) >= MATRIX]
    magnitudes = np.concatenate([np.abs(keras.ops.convert_to_numpy(kernel)).ravel() for kernel in kernels])
    if not len(magnitudes):
        return model
    kept = len(magnitudes) - round(share * len(magnitudes))
    least = np.partition(magnitudes, -kept)[-kept] if kept else np.inf
    for kernel in kernels:
        values = keras.ops.convert_to_numpy(kernel)
        kernel.assign(np.where(np.abs(values) >= least, values, 0))
    return model


def makers(
    quantizations: list[str],
    shares: list[float],
    train: Change | None = None,
    windows: Callable[[], np.ndarray] | None = None,
) -> dict[str, Change]:
    """Returns the variants by name: how each is made of a newly loaded model, which is changed.

    Args:
        quantizations: some of `hvdkit.compress.QUANTIZATIONS`.
        shares: shares of weights that become 0.
        train: trains a pruned model, whose zeros stay; None to leave pruned models as they are.
        windows: see `quantized`.
    """
    quantize = {mode: functools.partial(quantized, mode=mode, windows=windows) for mode in quantizations}
    made: dict[str, Change] = {"as trained": lambda model: model, **quantize}
    for share in shares:
        name = f"pruned {share:g}"
        prune: Change = functools.partial(pruned, share=share)
        made[name] = prune
        if train:
            name, prune = f"{name}, finetuned", _once(prune, train)
            made[name] = prune
        made |= {f"{name}, {mode}": _in_turn(prune, change) for mode, change in quantize.items()}
    return made


def _in_turn(first: Change, then: Change) -> Change:
    return lambda model: then(first(model))


def _once(prune: Change, train: Change) -> Change:
    """Returns what prunes and trains a model the first time, and then gives others the weights that this one got."""
    weights: list[np.ndarray] = []

    def make(model: keras.Model) -> keras.Model:
        if weights:
            model.set_weights(weights)
        else:
            weights.extend(train(prune(model)).get_weights())
        return model

    return make
