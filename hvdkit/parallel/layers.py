"""Keras layers that are divided over ranks. `hvdkit.parallel.tensor` replaces Keras' own layers by these.

Each takes the configuration of the whole layer, and holds this rank's even part of its weights. A rank with columns of
a matrix computes a part of the output. A rank with rows of it needs a part of the input, and computes a term of the
output. `split_axes` gives the axis of each divided weight.
"""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from hvdkit.collectives.mesh import Mesh
from hvdkit.compat.keras3 import MultiHeadAttention
from hvdkit.errors import UsageError
from hvdkit.parallel import mappings


class _Part:
    """The common base of the layers below.

    Attributes:
        split_axes: from a weight's name to the axis along which it is divided; a rank holds all other weights whole.
    """

    mesh: Mesh
    split_axes: dict[str, int]
    name: str

    def get_config(self) -> dict[str, Any]:
        """Raises an error: a part of a model cannot be loaded elsewhere."""
        raise UsageError(
            f"The layer {self.name!r} is divided over {self.mesh.model} ranks, and its part cannot be saved or copied. "
            f"Get the whole model with hvdkit.parallel.gather(model)."
        )


class JoinParts(keras.layers.Layer):
    """Concatenates the ranks' parts of a tensor along an axis."""

    def __init__(self, mesh: Mesh, axis: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mesh, self.axis = mesh, axis

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the whole tensor."""
        return mappings.joined(x, self.axis, self.mesh, _kind(self))


class OwnPart(keras.layers.Layer):
    """Takes this rank's part of a tensor along an axis."""

    def __init__(self, mesh: Mesh, axis: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mesh, self.axis = mesh, axis

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the part."""
        return mappings.own_part(x, self.axis, self.mesh, _kind(self))


class ColumnDense(_Part, keras.layers.Dense):
    """Some columns of a `Dense` layer's kernel: takes the whole input, computes some of the output's features."""

    def __init__(self, mesh: Mesh, units: int, **config: Any) -> None:
        keras.layers.Dense.__init__(self, part(units, mesh, "units", config.get("name")), **config)
        self.mesh = mesh
        self.split_axes = {"kernel": 1, "bias": 0}

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Computes [..., units / ranks] from [..., features]."""
        return super().call(mappings.spread(x, self.mesh, _kind(self)), training)


class RowDense(_Part, keras.layers.Dense):
    """Some rows of a `Dense` layer's kernel: takes some of the input's features, computes a term of the output."""

    def __init__(self, mesh: Mesh, **config: Any) -> None:
        keras.layers.Dense.__init__(self, **config)
        self.mesh = mesh
        self.split_axes = {"kernel": 0}

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Computes [..., units] from [..., features / ranks]."""
        return _sum_and_activate(self, ops.matmul(x, self.kernel))


class ColumnEinsumDense(_Part, keras.layers.EinsumDense):
    """An `EinsumDense`, divided along an output axis of its kernel: takes the whole input, computes a part."""

    def __init__(self, mesh: Mesh, axis: int, equation: str, output_shape: Any, **config: Any) -> None:
        _, kernel, output = letters(equation)
        place = output.index(kernel[axis]) - len(output)
        shape = [output_shape] if isinstance(output_shape, int) else list(output_shape)
        shape[place] = part(shape[place], mesh, "output_shape", config.get("name"))
        keras.layers.EinsumDense.__init__(self, equation, tuple(shape), **config)
        self.mesh = mesh
        bias = config.get("bias_axes") or ""
        self.split_axes = {"kernel": axis} | ({"bias": bias.index(kernel[axis])} if kernel[axis] in bias else {})
        self.output_axis = place

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Applies the layer's equation for a part of one output axis."""
        return super().call(mappings.spread(inputs, self.mesh, _kind(self)), training)


class RowEinsumDense(_Part, keras.layers.EinsumDense):
    """An `EinsumDense`, divided along an axis that it sums over: takes a part of the input, computes a term."""

    def __init__(self, mesh: Mesh, axis: int, **config: Any) -> None:
        keras.layers.EinsumDense.__init__(self, **config)
        self.mesh = mesh
        self.split_axes = {"kernel": axis}

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Applies the layer's equation; each rank sums over its part, then the ranks add up their sums."""
        return _sum_and_activate(self, ops.einsum(self.equation, inputs, self.kernel))


class HeadsAttention(_Part, MultiHeadAttention):
    """Some of a `MultiHeadAttention`'s heads; the output projection sums over the heads of all ranks."""

    def __init__(self, mesh: Mesh, num_heads: int, **config: Any) -> None:
        MultiHeadAttention.__init__(self, part(num_heads, mesh, "num_heads", config.get("name")), **config)
        self.mesh = mesh
        projections = ("query", "key", "value", "gate")
        self.split_axes = {f"{p}/kernel": 1 for p in projections} | {f"{p}/bias": 0 for p in projections}
        self.split_axes["attention_output/kernel"] = 0

    def output_projection(self, keras_own: keras.layers.EinsumDense) -> RowEinsumDense:
        """Adds up what the ranks' heads give."""
        return RowEinsumDense(self.mesh, 0, **keras_own.get_config())

    def call(
        self,
        query: tf.Tensor,
        value: tf.Tensor,
        key: tf.Tensor | None = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """Like `keras.layers.MultiHeadAttention`, but attention scores are those of this rank's heads only."""
        spread = {id(x): x for x in (query, value, key) if x is not None}
        spread = {i: mappings.spread(x, self.mesh, f"{_kind(self)}.{n}") for n, (i, x) in enumerate(spread.items())}
        return super().call(
            spread[id(query)],
            spread[id(value)],
            None if key is None else spread[id(key)],
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
        )


class VocabularyEmbedding(_Part, keras.layers.Embedding):
    """Some rows of an `Embedding`: each rank looks up the tokens in its rows, and the ranks add up the vectors."""

    def __init__(self, mesh: Mesh, input_dim: int, **config: Any) -> None:
        keras.layers.Embedding.__init__(self, part(input_dim, mesh, "input_dim", config.get("name")), **config)
        self.mesh = mesh
        self.split_axes = {"embeddings": 0}

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Computes vectors [..., output_dim] from token numbers, int [...]."""
        numbers = tf.reshape(tf.cast(inputs, tf.int32) - self.mesh.model_index * self.input_dim, [-1])
        # Skip tokens of other ranks, do not multiply their vectors by zero: optimizers would update those rows.
        mine = tf.where((numbers >= 0) & (numbers < self.input_dim))
        found = super().call(tf.gather_nd(numbers, mine))
        vectors = tf.scatter_nd(mine, found, [tf.size(numbers, tf.int64), self.output_dim])
        vectors = tf.reshape(vectors, tf.concat([tf.shape(inputs), [self.output_dim]], axis=0))
        vectors = tf.ensure_shape(vectors, [*inputs.shape, self.output_dim])
        return mappings.total(vectors, self.mesh, _kind(self))


class ColumnEmbedding(_Part, keras.layers.Embedding):
    """Some columns of an `Embedding`: computes a part of each token's vector."""

    def __init__(self, mesh: Mesh, output_dim: int, **config: Any) -> None:
        name = config.get("name")
        keras.layers.Embedding.__init__(self, output_dim=part(output_dim, mesh, "output_dim", name), **config)
        self.mesh = mesh
        self.split_axes = {"embeddings": 1}


def _kind(layer: Any) -> str:
    """Returns a name for a layer's collectives; `hvdkit.collectives.wire` adds numbers in the order of the graph.

    Do not use the layer's name: Keras numbers unnamed layers per process, so ranks may have different numbers.
    """
    return type(layer).__name__


def letters(equation: str) -> tuple[str, str, str]:
    """Returns the axis letters of an `EinsumDense`'s input, kernel and output."""
    inputs, output = equation.replace(" ", "").replace("...", "").split("->")
    x, kernel = inputs.split(",")
    return x, kernel, output


def part(number: int, mesh: Mesh, what: str, layer: str | None) -> int:
    """Divides a number by the number of ranks that hold a layer.

    Raises:
        UsageError: it cannot be divided evenly.
    """
    if number % mesh.model:
        raise UsageError(
            f"The layer {layer!r} has {what}={number}, which {mesh.model} ranks cannot divide evenly. Choose a "
            f"multiple of {mesh.model}, another mesh, or remove the layer from the layout."
        )
    return number // mesh.model


def _sum_and_activate(layer: Any, term: tf.Tensor) -> tf.Tensor:
    """Sums the terms of all ranks, adds the bias, which all ranks hold, and applies the activation."""
    x = mappings.total(term, layer.mesh, _kind(layer))
    if layer.bias is not None:
        x = ops.add(x, ops.cast(layer.bias, x.dtype))
    return x if layer.activation is None else layer.activation(x)
