"""Cuts a functional model into models of some of its layers."""

from collections.abc import Sequence
from typing import Any

import keras

from hvdkit.compat import keras3
from hvdkit.errors import UsageError
from hvdkit.parallel import whole_model


def functional(model: keras.Model) -> keras.Model:
    """Returns the layer graph of a functional or sequential model.

    Raises:
        UsageError: the model is not functional or sequential, or not built.
    """
    graph = keras3.graph_of(model)
    if graph is None:
        raise UsageError(
            f"The model {model.name!r} is a {type(model).__name__}, whose layer graph is not known. Give a functional "
            f"or sequential model that is built."
        )
    return graph


def between(inputs: Sequence[Any], outputs: Sequence[Any], name: str) -> keras.Model:
    """Returns the model between two sets of symbolic tensors of a graph. It uses the graph's layers.

    Raises:
        UsageError: the outputs also depend on other tensors.
    """
    try:
        return keras.Model(_one(inputs), _one(outputs), name=name)
    except ValueError as error:
        raise UsageError(
            f"The part {name!r} of the model cannot be cut out: its output depends on more than its input "
            f"({str(error).splitlines()[0]})."
        ) from error


def refuse_shared(parts: Sequence[keras.Model]) -> None:
    """Refuses a weight in two parts: each rank would train its own copy of it.

    Raises:
        UsageError: two parts share a weight.
    """
    owner: dict[int, keras.Model] = {}
    for part in parts:
        for weight in part.weights:
            other = owner.setdefault(id(weight), part)
            if other is not part:
                raise UsageError(
                    f"The weight {weight.path!r} is used in the parts {other.name!r} and {part.name!r} of the model, "
                    f"which different ranks train. Cut the model so that all layers that share it are in one part."
                )


def refuse_idle(name: str, parts: Sequence[keras.Model]) -> None:
    """Refuses parts without trainable weights: their rank could not detect that the model is divided.

    Raises:
        UsageError: no part has a trainable weight.
    """
    if not any(part.trainable_weights for part in parts):
        raise UsageError(
            f"Dividing the model leaves {name!r} without a weight to train. Use fewer ranks for a model, or divide it "
            f"elsewhere."
        )


def refuse_unknown_sizes(model: keras.Model, tensors: Sequence[Any]) -> None:
    """Refuses tensors with unknown sizes (other than the batch) at the borders between ranks.

    Raises:
        UsageError: a size is not known.
    """
    for tensor in tensors:
        if None in tensor.shape[1:]:
            raise UsageError(
                f"The model {model.name!r} would be divided at {tensor.name!r} of shape {tuple(tensor.shape)}, but all "
                f"sizes except the batch must be known there: give its Input the complete shape."
            )


def refuse_masks(model: keras.Model, tensors: Sequence[Any]) -> None:
    """Refuses masks at the borders between ranks, which do not send them.

    Raises:
        UsageError: a tensor has a mask.
    """
    for tensor in tensors:
        if keras3.has_mask(tensor):
            raise UsageError(
                f"The model {model.name!r} would be divided at {tensor.name!r}, which has a mask (for example from "
                f"Embedding(mask_zero=True)), but ranks do not send masks. Divide it elsewhere."
            )


class Copies:
    """Copies parts of a model with their weights. The copies do not refer to the model, so it can be deleted.

    A layer that is in several parts is copied once.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Any, Any]] = {}  # keeps the original alive, so no other layer gets its id

    def of(self, part: keras.Model) -> keras.Model:
        """Returns the copy of a part that `between` cut out."""
        copy = keras.models.clone_model(part, clone_function=self._layer)
        for old, new in zip(part.variables, copy.variables, strict=True):  # including the states of random generators
            new.assign(old)
        for old, new in zip(part.weights, copy.weights, strict=True):
            whole_model.part_of(new, old.path)
        return copy

    def _layer(self, layer: Any) -> Any:
        if id(layer) not in self._copies:
            with keras.saving.custom_object_scope(whole_model.custom_classes(layer)):
                self._copies[id(layer)] = layer, type(layer).from_config(layer.get_config())
        return self._copies[id(layer)][1]


def _one(tensors: Sequence[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else list(tensors)
