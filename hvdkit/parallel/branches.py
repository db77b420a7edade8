"""`split_branches`: the parallel branches of a model, each on a rank of its own.

What comes before the branches and what comes behind them is computed by all ranks of a row; a branch, by one of them,
which alone has its weights. Where the branches meet, all ranks get what each has computed.
"""

import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit import collectives
from hvdkit.collectives.mesh import Mesh, Shard, mark
from hvdkit.errors import UsageError
from hvdkit.parallel import graph, mappings, whole_model


def split_branches(model: keras.Model, mesh: Mesh, branches: Sequence[str] | None = None) -> keras.Model:
    """Returns this rank's part of a model with parallel branches.

    Branch b is computed by column b modulo the mesh's columns. The returned model's layers are copies of `model`'s, so
    that the other ranks' branches leave the memory with `model`.

    Args:
        model: a functional model, built, the same on all ranks.
        mesh: the ranks.
        branches: for each branch a pattern of its layers' names (`re.match`), as in `["left_", "right_"]`. A branch
            reaches from the first of them to the last, with all that is between; one tensor flows in and one out. By
            default the most chains of layers that meet in one layer.

    Returns:
        A model of the same inputs and outputs. It is not compiled.

    Raises:
        UsageError: there are fewer branches than columns, a pattern matches no layer, a branch has other ways in or
            out, or shares a weight with something else.
    """
    functional = graph.functional(model)
    ends = _chains(functional) if branches is None else [_ends(functional, pattern) for pattern in branches]
    if len(ends) < mesh.model:
        raise UsageError(
            f"The model {model.name!r} has {len(ends)} branches, which leaves some of {mesh.model} ranks without one. "
            f"Use a smaller mesh, or name the branches."
        )
    starts = list({id(begin): begin for begin, _ in ends}.values())
    outputs = [end for _, end in ends]
    trunk = graph.between(functional.inputs, starts, "trunk") if set(map(id, starts)) - set(
        map(id, functional.inputs)
    ) else None  # fmt: skip
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
        for variable in part.variables:  # random seeds, too, of which branches have different numbers
            mark(variable, Shard(mesh, None))

    inputs = [keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name) for t in functional.inputs]
    at_starts = keras.tree.flatten(trunk(inputs if len(inputs) > 1 else inputs[0])) if trunk else inputs
    flowing = dict(zip(map(id, starts if trunk else functional.inputs), at_starts, strict=True))
    spread = {i: SpreadToBranches(mesh, name=f"spread{n}")(x) for n, (i, x) in enumerate(flowing.items())}
    computed = [models[number](spread[id(ends[number][0])]) for number in own]
    met = MeetingOfBranches(mesh, [(tuple(t.shape[1:]), t.dtype) for t in outputs], name="meeting")(computed)
    result = head(met if len(met) > 1 else met[0])
    divided = keras.Model(inputs if len(inputs) > 1 else inputs[0], result, name=model.name)
    return whole_model.remember(divided, model)


class SpreadToBranches(keras.layers.Layer):
    """What flows into the branches: backwards the sum of what comes out of all of them."""

    def __init__(self, mesh: Mesh, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mesh = mesh
        self.supports_masking = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Returns its input."""
        return mappings.spread(x, self._mesh, self.name) if x.dtype.is_floating else x


class MeetingOfBranches(keras.layers.Layer):
    """Takes the outputs of this rank's branches, and returns those of all.

    Args:
        mesh: the ranks.
        outputs: of all branches in their order, the shape without the batch, and the dtype.
    """

    def __init__(self, mesh: Mesh, outputs: Sequence[tuple[tuple[int, ...], str]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mesh, self._outputs = mesh, list(outputs)

    def call(self, computed: list[tf.Tensor]) -> list[tf.Tensor]:
        """[batch, ...] of each of this rank's branches to [batch, ...] of each branch."""
        mesh, numbers = self._mesh, range(len(self._outputs))
        own = [n for n in numbers if n % mesh.model == mesh.model_index]
        in_order = [n for column in range(mesh.model) for n in numbers if n % mesh.model == column]

        @tf.custom_gradient
        def meet(*mine: tf.Tensor) -> tuple[list[tf.Tensor], Any]:
            flat = tf.concat([tf.reshape(t, [-1]) for t in mine], axis=0)
            everything = flat if mesh.model == 1 else collectives.gather_rows(flat, self.name, mesh.model_set)
            batch = tf.shape(mine[0])[0]
            sizes = [batch * tf.reduce_prod(self._outputs[n][0] or [1]) for n in in_order]
            pieces = dict(zip(in_order, tf.split(everything, sizes, num=len(in_order)), strict=True))
            result = [tf.reshape(pieces[n], tf.concat([[batch], self._outputs[n][0]], axis=0)) for n in numbers]
            shapes = [[mine[0].shape[0], *self._outputs[n][0]] for n in numbers]
            result = [tf.ensure_shape(t, shape) for t, shape in zip(result, shapes, strict=True)]
            return result, lambda *gradients: [gradients[n] for n in own]

        return list(meet(*computed))


def _chains(model: keras.Model) -> list[tuple[Any, Any]]:
    """The ends of the most chains of layers, each with one way in and one out, that meet in one layer."""
    found: list[tuple[Any, Any]] = []
    for layer in model.layers:
        inputs = keras.tree.flatten(layer.input)
        if len(inputs) > max(1, len(found)):
            ends = [(_begin(tensor), tensor) for tensor in inputs]
            if all(begin is not end for begin, end in ends):
                found = ends
    return found


def _begin(tensor: Any) -> Any:
    """Where the chain of layers begins that ends in a tensor."""
    while True:
        layer = tensor._keras_history.operation
        alone = len(layer._outbound_nodes) == 1 and not isinstance(layer, keras.layers.InputLayer)
        if not alone or len(keras.tree.flatten(layer.input)) != 1:
            return tensor
        tensor = keras.tree.flatten(layer.input)[0]


def _ends(model: keras.Model, pattern: str) -> tuple[Any, Any]:
    """The tensors that flow into a branch and out of it."""
    layers = [layer for layer in model.layers if re.match(pattern, layer.name)]
    if not layers:
        names = ", ".join(layer.name for layer in model.layers[:8])
        raise UsageError(f"The pattern {pattern!r} of a branch matches no layer of {model.name!r}: it has {names}, ...")
    first, last = layers[0].input, layers[-1].output
    if isinstance(first, (list, dict)) or isinstance(last, (list, dict)):
        raise UsageError(f"The branch {pattern!r} has several inputs or outputs; one tensor must flow in and one out.")
    return first, last
