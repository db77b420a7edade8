"""Computes how many bytes a divided model would send, for the planner's cost model."""

import math
from typing import Any

import keras

from hvdkit.collectives.mesh import Mesh
from hvdkit.errors import UsageError
from hvdkit.parallel import graph, tensor
from hvdkit.parallel.pipeline import even_cuts

_BYTES = 4  # of a float32


def divisions(model: keras.Model) -> dict[str, dict[str, Any]]:
    """Returns how each strategy can divide the model over two ranks, as fields of `hvdkit.plan.cost.Division`."""
    try:
        functional = graph.functional(model)
    except UsageError:
        return {}
    return {**_tensor(functional), **_pipeline(functional)}


def _tensor(model: keras.Model) -> dict[str, dict[str, Any]]:
    """Each divided pair of layers sums its output when it runs forward, and its input's gradient backward."""
    layout = tensor.automatic_layout(model, Mesh(model=2))
    plan = tensor.plan_of(model, layout)
    layers = [layer for layer in model.layers if layer.name in plan]
    if not layers:
        return {}
    total = sum(math.prod(w.shape) for w in model.trainable_weights)
    divided = sum(math.prod(w.shape) for layer in layers for w in layer.trainable_weights)
    pairs = [x for layer in layers if plan[layer.name] != 1 or _is_attention(layer) for x in (layer.output,)]
    ins = [keras.tree.flatten(layer.input)[0] for layer in layers if plan[layer.name] == 1]
    if any(None in t.shape[1:] for t in [*pairs, *ins]):
        return {}  # the sizes are not known in advance
    sent = sum(_BYTES * math.prod(t.shape[1:]) for t in [*pairs, *ins])
    return {"tensor": {"stages": False, "share": divided / total, "bytes": sent, "exchanges": len(pairs) + len(ins)}}


def _is_attention(layer: Any) -> bool:
    return isinstance(layer, keras.layers.MultiHeadAttention)


def _pipeline(model: keras.Model) -> dict[str, dict[str, Any]]:
    try:
        (cut,) = even_cuts(model, 2)
    except UsageError:
        return {}
    shape = model.get_layer(cut).output.shape[1:]
    if None in shape:
        return {}
    sent = _BYTES * math.prod(shape)
    return {"pipeline": {"stages": True, "share": 1.0, "bytes": sent}}
