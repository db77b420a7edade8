"""`split_branches`: computes the parallel branches of a model on different ranks.

All ranks of a row compute the layers before and after the branches. A single rank computes each branch and holds its
weights. Where the branches join, all ranks get the outputs of all branches.
"""

import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit import collectives
from hvdkit.collectives.mesh import Mesh, Shard, mark
from hvdkit.compat.keras3 import consumers_of, operation_of
from hvdkit.errors import UsageError
from hvdkit.parallel import graph, mappings, whole_model


def split_branches(model: keras.Model, mesh: Mesh, branches: Sequence[str] | None = None) -> keras.Model:
    """Returns this rank's part of a model with parallel branches.

    The column with index b modulo the number of columns computes branch b. The returned model's layers are copies: when
    you delete `model`, the memory of the other ranks' branches is freed.

    Args:
        model: a built functional model, the same on all ranks.
        mesh: the ranks.
        branches: one pattern of layer names per branch (`re.match`), for example `["left_", "right_"]`. A branch
            contains all layers from the first match to the last one. It must have one input and one output tensor. By
            default, the branches are the largest set of layer chains that join in one layer.

    Returns:
        A model with the same inputs and outputs. It is not compiled.

    Raises:
        UsageError: there are fewer branches than columns, a pattern matches no layer, a branch has several inputs or
            outputs, or shares a weight with another part.
    """
    functional = graph.functional(model)
    ends = _chains(functional) if branches is None else [_ends(functional, pattern) for pattern in branches]
    if len(ends) < mesh.model:
        raise UsageError(
            f"The model {model.name!r} has {len(ends)} branches, too few for {mesh.model} ranks. Use a smaller mesh, "
            f"or name the branches."
        )
    starts = list({id(begin): begin for begin, _ in ends}.values())
    outputs = [end for _, end in ends]
    start_at_inputs = {id(t) for t in starts} <= {id(t) for t in functional.inputs}
    trunk = None if start_at_inputs else graph.between(functional.inputs, starts, "trunk")
    head = graph.between(outputs, functional.outputs, "head")
    parts = [graph.between([begin], [end], f"branch{n}") for n, (begin, end) in enumerate(ends)]
    for common in (trunk, head):
        graph.refuse_shared([*parts, *([common] if common else [])])
    own = [number for number in range(len(ends)) if number % mesh.model == mesh.model_index]
    for column in range(mesh.model):
        graph.refuse_idle(f"rank {column} of a row", parts[column :: mesh.model])
    graph.refuse_unknown_sizes(model, [*starts, *outputs])
    copies = graph.Copies()
    trunk, head = trunk and copies.of(trunk), copies.of(head)
    models = {number: copies.of(parts[number]) for number in own}
    for part in models.values():
        for variable in part.variables:  # including random seeds: their number differs between branches
            mark(variable, Shard(mesh, None))

    inputs = [keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name) for t in functional.inputs]
    at_starts = keras.tree.flatten(trunk(inputs if len(inputs) > 1 else inputs[0])) if trunk else inputs
    flowing = dict(zip(map(id, starts if trunk else functional.inputs), at_starts, strict=True))
    spread = {i: BranchInputs(mesh, name=f"spread{n}")(x) for n, (i, x) in enumerate(flowing.items())}
    computed = [models[number](spread[id(ends[number][0])]) for number in own]
    output_specs = [(tuple(t.shape[1:]), t.dtype) for t in outputs]
    gathered = GatherBranchOutputs(mesh, output_specs, name="branch_outputs")(computed)
    result = head(gathered if len(gathered) > 1 else gathered[0])
    divided = keras.Model(inputs if len(inputs) > 1 else inputs[0], result, name=model.name)
    return whole_model.remember(divided, model)


class BranchInputs(keras.layers.Layer):
    """Passes a tensor into the branches. In the backward pass, sums the gradients of all branches."""

    def __init__(self, mesh: Mesh, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mesh = mesh
        self.supports_masking = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Returns its input."""
        return mappings.spread(x, self._mesh, self.name) if x.dtype.is_floating else x


class GatherBranchOutputs(keras.layers.Layer):
    """Gathers the outputs of all branches from the ranks that computed them.

    Args:
        mesh: the ranks.
        outputs: shape without the batch dimension, and dtype, of each branch's output.
    """

    def __init__(self, mesh: Mesh, outputs: Sequence[tuple[tuple[int, ...], str]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mesh, self._outputs = mesh, list(outputs)

    def call(self, computed: list[tf.Tensor]) -> list[tf.Tensor]:
        """Takes [batch, ...] of each of this rank's branches; returns [batch, ...] of every branch."""
        mesh, numbers = self._mesh, range(len(self._outputs))
        own = [n for n in numbers if n % mesh.model == mesh.model_index]
        in_order = [n for column in range(mesh.model) for n in numbers if n % mesh.model == column]

        @tf.custom_gradient
        def gather(*mine: tf.Tensor) -> tuple[list[tf.Tensor], Any]:
            flat = tf.concat([tf.reshape(t, [-1]) for t in mine], axis=0)
            everything = flat if mesh.model == 1 else collectives.gather_rows(flat, self.name, mesh.model_set)
            batch = tf.shape(mine[0])[0]
            sizes = [batch * tf.reduce_prod(self._outputs[n][0] or [1]) for n in in_order]
            pieces = dict(zip(in_order, tf.split(everything, sizes, num=len(in_order)), strict=True))
            result = [tf.reshape(pieces[n], tf.concat([[batch], self._outputs[n][0]], axis=0)) for n in numbers]
            shapes = [[mine[0].shape[0], *self._outputs[n][0]] for n in numbers]
            result = [tf.ensure_shape(t, shape) for t, shape in zip(result, shapes, strict=True)]
            return result, lambda *gradients: [gradients[n] for n in own]

        return list(gather(*computed))


def _chains(model: keras.Model) -> list[tuple[Any, Any]]:
    """Returns the ends of the largest set of layer chains that join in one layer, each with one input and output."""
    found: list[tuple[Any, Any]] = []
    for layer in model.layers:
        inputs = keras.tree.flatten(layer.input)
        if len(inputs) > max(1, len(found)):
            ends = [(_begin(tensor), tensor) for tensor in inputs]
            if all(begin is not end for begin, end in ends):
                found = ends
    return found


def _begin(tensor: Any) -> Any:
    """Returns the tensor at the start of the chain of layers that ends in `tensor`."""
    while True:
        layer = operation_of(tensor)
        alone = len(consumers_of(layer)) == 1 and not isinstance(layer, keras.layers.InputLayer)
        if not alone or len(keras.tree.flatten(layer.input)) != 1:
            return tensor
        tensor = keras.tree.flatten(layer.input)[0]


def _ends(model: keras.Model, pattern: str) -> tuple[Any, Any]:
    """Returns a branch's input and output tensor."""
    layers = [layer for layer in model.layers if re.match(pattern, layer.name)]
    if not layers:
        names = ", ".join(layer.name for layer in model.layers[:8])
        raise UsageError(f"The pattern {pattern!r} of a branch matches no layer of {model.name!r}: it has {names}, ...")
    first, last = layers[0].input, layers[-1].output
    if isinstance(first, (list, dict)) or isinstance(last, (list, dict)):
        raise UsageError(f"The branch {pattern!r} has several inputs or outputs, but must have one of each.")
    return first, last
