"""Cutting a functional model into models of some of its layers."""

from collections.abc import Sequence
from typing import Any

import keras

from hvdkit.errors import UsageError
from hvdkit.parallel import whole_model


def functional(model: keras.Model) -> keras.Model:
    """The graph of layers behind a functional or sequential model.

    Raises:
        UsageError: the model is of another kind, or not built.
    """
    graph = getattr(model, "_functional", None) if isinstance(model, keras.Sequential) else model
    if not hasattr(graph, "_run_through_graph"):
        raise UsageError(
            f"The model {model.name!r} is a {type(model).__name__}, of whose layers it is not known how they are "
            f"connected. Give a functional or sequential model that is built."
        )
    return graph


def between(inputs: Sequence[Any], outputs: Sequence[Any], name: str) -> keras.Model:
    """The model from some symbolic tensors of a graph to others; its layers are those of the graph.

    Raises:
        UsageError: the outputs depend on something else, too.
    """
    try:
        return keras.Model(_one(inputs), _one(outputs), name=name)
    except ValueError as error:
        raise UsageError(
            f"The part {name!r} of the model cannot be cut out: it needs something else than what flows into it "
            f"({str(error).splitlines()[0]})."
        ) from error


def refuse_shared(parts: Sequence[keras.Model]) -> None:
    """Weights that two ranks' parts use would be trained apart.

    Raises:
        UsageError: two parts have a weight in common.
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
    """A rank must have something of its own to train: else it would not know that the model is divided.

    Raises:
        UsageError: no part has a weight that is trained.
    """
    if not any(part.trainable_weights for part in parts):
        raise UsageError(
            f"Dividing the model leaves {name!r} without a weight to train. Use fewer ranks for a model, or divide it "
            f"elsewhere."
        )


def refuse_unknown_sizes(model: keras.Model, tensors: Sequence[Any]) -> None:
    """What crosses between ranks must have known sizes, but for the batch.

    Raises:
        UsageError: a size is not known.
    """
    for tensor in tensors:
        if None in tensor.shape[1:]:
            raise UsageError(
                f"The model {model.name!r} is to be divided at {tensor.name!r} of shape {tuple(tensor.shape)}, where "
                f"sizes other than the batch must be known: give its Input the whole shape."
            )


def refuse_masks(model: keras.Model, tensors: Sequence[Any]) -> None:
    """A mask does not cross from rank to rank.

    Raises:
        UsageError: one goes with a tensor.
    """
    for tensor in tensors:
        if getattr(tensor, "_keras_mask", None) is not None:
            raise UsageError(
                f"The model {model.name!r} is to be divided at {tensor.name!r}, with which a mask goes (as of "
                f"Embedding(mask_zero=True)), and masks stay on their rank. Divide it elsewhere."
            )


class Copies:
    """Copies of parts of a model, with its weights. They need nothing of it: its other parts can be forgotten.

    Layers that are in several parts are copied once.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Any, Any]] = {}  # with the original, lest another one gets its id

    def of(self, part: keras.Model) -> keras.Model:
        """The copy of a part that `between` cut out."""
        copy = keras.models.clone_model(part, clone_function=self._layer)
        for old, new in zip(part.variables, copy.variables, strict=True):  # with the states of random generators
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
