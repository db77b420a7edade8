"""GPTQ by Keras: 4-bit weights, each rounded so as to make up for the errors of those before it.

E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, https://arxiv.org/abs/2210.17323.
"""

import contextlib
import sys
from typing import Any

import keras
import numpy as np
from hvdkit_models import gpt

from hvdkit.compat.keras3 import keep_zero_points, layers_of
from hvdkit.errors import UsageError


def quantize(model: keras.Model, windows: np.ndarray) -> None:
    """Quantizes the `Dense` and `EinsumDense` layers in the blocks of a model, in place; others stay as they are.

    Args:
        model: a model of `models/gpt.py`, or another one that tells Keras its blocks.
        windows: tokens to calibrate on, int32 [samples, sequence_length].

    Raises:
        UsageError: the model does not tell its blocks.
    """
    structure = _structure(model)
    inside = {id(layer) for block in structure["sequential_blocks"] for layer in layers_of(block)}
    config = keras.quantizers.GPTQConfig(
        dataset=list(windows),
        tokenizer=list,  # Keras wants one, and leaves it alone where the data are tokens
        num_samples=len(windows),
        sequence_length=windows.shape[1],
        quantization_layer_structure=structure,
    )
    with contextlib.redirect_stdout(sys.stderr):  # a progress bar
        model.quantize("gptq", config=config, filters=lambda layer: id(layer) in inside)
    for layer in layers_of(model):
        if getattr(layer, "is_gptq_calibrated", False):
            keep_zero_points(layer)
    config.quantization_layer_structure = None  # each layer saves the configuration, and would save itself in it


def _structure(model: keras.Model) -> dict[str, list[Any]]:
    """Returns the layers before the first block, and the blocks, as Keras expects them."""
    known = model.get_quantization_layer_structure("gptq")  # of KerasHub's models
    if known:
        return known
    try:
        first, *blocks = gpt.blocks(model)
    except ValueError:
        raise UsageError(
            "gptq: Keras quantizes by GPTQ block by block, and this model does not tell its blocks, as those of "
            "models/gpt.py and of KerasHub do. Use int8 or int4."
        ) from None
    return {"pre_block_layers": [first], "sequential_blocks": blocks}
