"""Keras' layers with an `adapt` method, and what they learn in it: most of it is in no variable.

`Normalization` computes with tensors that it has made of its weights; vocabularies are in lookup tables, and the bins
of `Discretization` in a list. Neither broadcasts nor checkpoints of variables reach them.
"""

import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import wrapt

from hvdkit.compat.lookup import private

LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup, keras.layers.TextVectorization)
LEARNING = (keras.layers.Normalization, keras.layers.Discretization, *LOOKUPS)

# Layers that were adapted while `watch` was on, in this order.
_adapted: list[weakref.ref] = []
_originals: dict[type, Callable] = {}


def lookup_of(layer: Any) -> Any:
    """Returns the lookup layer that counts tokens: the layer itself, or the one inside `TextVectorization`."""
    return private(layer, "_lookup_layer") if isinstance(layer, keras.layers.TextVectorization) else layer


def can_learn(layer: Any) -> bool:
    """Returns whether a layer learns in `adapt`, and was not given what it would learn when it was made."""
    if not isinstance(layer, LEARNING):
        return False
    if isinstance(layer, keras.layers.Normalization):
        return layer.input_mean is None
    if isinstance(layer, keras.layers.Discretization):
        return layer.num_bins is not None
    return not private(lookup_of(layer), "_has_input_vocabulary")


def learnt(layer: Any) -> dict[str, Any]:
    """Returns what one of the `LEARNING` layers has learnt, by name: arrays, lists, or None before it has.

    Vocabularies are arrays of tokens in the order of their indices, without those for padding and unknown tokens.
    """
    if isinstance(layer, keras.layers.Normalization):
        return {name: _array(getattr(layer, name, None)) for name in ("mean", "variance")}
    if isinstance(layer, keras.layers.Discretization):
        bins = layer.bin_boundaries  # in a list of Keras' own, which cannot be pickled
        return {"bin_boundaries": None if bins is None else list(bins)}
    lookup = lookup_of(layer)
    found: dict[str, Any] = {"vocabulary": _vocabulary(lookup)}
    if lookup.output_mode == "tf_idf":
        found["idf_weights"] = _array(getattr(lookup, "idf_weights", None))
    return found


def give_learnt(layer: Any, values: dict[str, Any]) -> None:
    """Replaces the numbers of an adapted `Normalization` or `Discretization` by others from `learnt`."""
    if isinstance(layer, keras.layers.Discretization):
        layer.bin_boundaries = values["bin_boundaries"]
        return
    for variable, name in ((layer.adapt_mean, "mean"), (layer.adapt_variance, "variance")):
        variable.assign(np.reshape(values[name], variable.shape))
    layer.finalize_state()


def watch() -> None:
    """Remembers from now on which layers are adapted; a second call does nothing."""
    for kind in LEARNING:
        if kind not in _originals:
            _originals[kind] = vars(kind)["adapt"]
            kind.adapt = wrapt.FunctionWrapper(vars(kind)["adapt"], _remember)


def stop_watching() -> None:
    """Restores Keras' own functions, and forgets the layers."""
    for kind, original in _originals.items():
        kind.adapt = original  # type: ignore[attr-defined]
    _originals.clear()
    _adapted.clear()


def adapted() -> list[Any]:
    """Returns the layers that were adapted since `watch` and are still in use, in the order in which they were."""
    _adapted[:] = [r for r in _adapted if r() is not None]
    return [layer for layer in (r() for r in _adapted) if layer is not None]


def _remember(adapt: Callable, layer: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    result = adapt(*args, **kwargs)
    remember(layer)
    return result


def remember(layer: Any) -> None:
    """Remembers a layer as adapted, once."""
    if _originals and all(r() is not layer for r in _adapted):
        _adapted.append(weakref.ref(layer))


def _vocabulary(lookup: Any) -> np.ndarray:
    """Faster than `get_vocabulary`, which makes a Python list and dictionary of all tokens."""
    table = lookup.lookup_table
    if int(table.size()) == 0:
        return np.zeros([0])
    keys, values = (t.numpy() for t in table.export())
    tokens, indices = (values, keys) if lookup.invert else (keys, values)
    return tokens[np.argsort(indices)]


def _array(value: Any) -> np.ndarray | None:
    return None if value is None else np.asarray(keras.ops.convert_to_numpy(value))
