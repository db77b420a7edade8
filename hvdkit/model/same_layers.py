"""Compares what the ranks' models hold outside of their variables, before training starts.

A broadcast makes variables common. What layers learnt in `adapt`, how they are configured, and arrays in their
attributes stay each rank's own: with a difference there, the ranks train several models that have the same weights.
"""

import gc
import inspect
import logging
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives
from hvdkit.checkpoint.learnt import digest
from hvdkit.collectives.mesh import copies_of
from hvdkit.compat import preprocessing
from hvdkit.compat.keras3 import layers_of
from hvdkit.compat.preprocessing import LEARNING
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)

_ROUNDING = 1e-5  # ranks that adapt to the same data in another order, or on another processor, differ by less
_OF_EACH_RANK = {"name", "seed", "batch_shape", "built"}  # attributes that may differ


def check(model: keras.Model) -> None:
    """Compares the layers of a model, and all others that this program has adapted, over all ranks. A collective call.

    Differences by rounding are made equal: all ranks take rank 0's numbers. Different configurations, and different
    arrays in layers of the user's own, which may be intended, are warned of.

    Raises:
        UsageError: on all ranks, if a layer has learnt something else on another rank.
    """
    layers = layers_of(model)
    _check_learnt(model, [layer for layer in layers if isinstance(layer, LEARNING)])
    if not _are_alike(model, _adapted_elsewhere(model)):
        gc.collect()  # layers of earlier models may not be in use any more
        _check_learnt(model, _adapted_elsewhere(model))
    _check_held(model, [layer for layer in layers if not isinstance(layer, (*LEARNING, keras.Model))])


def _adapted_elsewhere(model: keras.Model) -> list[Any]:
    """Returns adapted layers outside of the model, such as a `TextVectorization` in the input pipeline."""
    inside = {id(layer) for layer in layers_of(model)}
    return [layer for layer in preprocessing.adapted() if id(layer) not in inside]


# ---- What layers learnt ---------------------------------------------------------------------------------------------


def _are_alike(model: keras.Model, layers: list[Any]) -> bool:
    everyone = _gather_digests(model, layers)
    return all(other == everyone[0] for other in everyone)


def _gather_digests(model: keras.Model, layers: list[Any]) -> list[list[tuple[str, dict[str, str]]]]:
    mine = [(type(layer).__name__, _digests(preprocessing.learnt(layer))) for layer in layers]
    return collectives.allgather_object(mine, name="learnt", process_set=copies_of(model))


def _check_learnt(model: keras.Model, layers: list[Any]) -> None:
    everyone = _gather_digests(model, layers)
    if len({tuple(kind for kind, _ in other) for other in everyone}) > 1:
        return  # the ranks' models differ, as the broadcast of variables says; or some ranks use more layers elsewhere
    places = [place for place in range(len(layers)) if any(other[place] != everyone[0][place] for other in everyone)]
    if not places:
        return
    values = [preprocessing.learnt(layers[place]) if _has_numbers(layers[place]) else {} for place in places]
    of_all = collectives.allgather_object(values, name="learnt.values", process_set=copies_of(model))
    for number, place in enumerate(places):
        if not _has_numbers(layers[place]) or not all(_are_close(other[number], of_all[0][number]) for other in of_all):
            _refuse(layers[place], [other[place][1] for other in everyone])
        preprocessing.give_learnt(layers[place], of_all[0][number])
        model.train_function = model.test_function = model.predict_function = None  # traced with the old ones


def _digests(values: dict[str, Any]) -> dict[str, str]:
    return {name: digest(value) for name, value in values.items()}


def _has_numbers(layer: Any) -> bool:
    given = getattr(layer, "input_mean", None) is not None
    return isinstance(layer, (keras.layers.Normalization, keras.layers.Discretization)) and not given


def _are_close(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Returns whether two numbers of each are equal but for rounding; means are compared in standard deviations."""
    if any((ours[name] is None) != (theirs[name] is None) for name in ours):
        return False
    if "mean" in ours and ours["mean"] is not None:
        deviation = np.sqrt(np.maximum(ours["variance"], 0))
        bound = _ROUNDING * np.maximum(deviation, np.abs(ours["mean"]))
        if np.shape(ours["mean"]) != np.shape(theirs["mean"]) or (np.abs(ours["mean"] - theirs["mean"]) > bound).any():
            return False
        return np.allclose(ours["variance"], theirs["variance"], rtol=10 * _ROUNDING, atol=0)
    here, there = (np.asarray(values.get("bin_boundaries") or []) for values in (ours, theirs))
    return here.shape == there.shape and np.allclose(here, there, rtol=_ROUNDING)


def _refuse(layer: Any, digests: list[dict[str, str]]) -> None:
    what = next(name for name in digests[0] if len({other[name] for other in digests}) > 1)
    others = [str(rank) for rank, other in enumerate(digests) if other[what] != digests[0][what]]
    raise UsageError(
        f"Layer {layer.name!r} ({type(layer).__name__}) has another {what.replace('_', ' ')} on rank(s) "
        f"{', '.join(others)} than on rank 0, as after layer.adapt(data) with each rank's own part of the data, so the "
        f"ranks would train several models. Write hvd.adapt(layer, data) on all ranks instead: the layer then learns "
        f"from the data of all of them. Or load it from one file on all ranks."
    )


# ---- What else layers hold ------------------------------------------------------------------------------------------


def _check_held(model: keras.Model, layers: list[Any]) -> None:
    """Warns of the first layer that has other arguments, or other arrays, on another rank."""
    mine = [(type(layer).__name__, _digests(_held(layer))) for layer in layers]
    everyone = collectives.allgather_object(mine, name="layers", process_set=copies_of(model))
    for place, layer in enumerate(layers):
        here = [other[place] for other in everyone if place < len(other)]
        kinds, digests = {kind for kind, _ in here}, [values for _, values in here]
        if len(here) < len(everyone) or len(kinds) > 1:
            return  # the ranks' models differ, as the broadcast of variables says
        differing = [name for name in digests[0] if any(other.get(name) != digests[0][name] for other in digests)]
        if differing:
            others = ", ".join(str(rank) for rank, other in enumerate(digests) if other != digests[0])
            _log.warning(
                "Layer %r (%s) has another %s on rank(s) %s than on rank 0, which no broadcast of weights changes: if "
                "that is not intended, the ranks train several models. Give it the same arguments on all ranks, and "
                "make arrays in it weights (add_weight).",
                layer.name,
                type(layer).__name__,
                " and ".join(differing),
                others,
            )
            return


def _held(layer: Any) -> dict[str, Any]:
    """Returns plain values and functions in a layer's public attributes, and arrays if its class is not Keras' own.

    It does not ask for the layer's configuration, which may have the values of large arrays, such as embeddings.
    """
    found: dict[str, Any] = {"dtype": f"{layer.compute_dtype} {layer.variable_dtype}"}
    is_own = not type(layer).__module__.startswith("keras.")
    for name, value in vars(layer).items():
        if name.startswith("_") or name in _OF_EACH_RANK:
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if all(v is None or isinstance(v, (bool, int, float, str)) for v in values):
            found[name] = repr(values)
        elif inspect.isfunction(value):
            found[name] = value.__name__
        elif is_own and (isinstance(value, np.ndarray) or (isinstance(value, tf.Tensor) and hasattr(value, "numpy"))):
            found[name] = np.asarray(value)
    return found
