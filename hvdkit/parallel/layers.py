"""Keras layers of which each rank computes a part. `hvdkit.parallel.tensor` puts them in place of Keras' own.

Each takes the configuration of the whole layer, and holds this rank's even part of its weights: columns of a matrix
give a part of the output, rows of it need a part of the input and give a term of the output. What a weight is a part of
is marked along `split_axes`.
"""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from hvdkit.collectives.mesh import Mesh
from hvdkit.errors import UsageError
from hvdkit.parallel import mappings


class _Part:
    """What the layers below have in common.

    Attributes:
        split_axes: by a weight's name, along which axis this rank has a part of it; others it has whole.
    """

    mesh: Mesh
    split_axes: dict[str, int]
    name: str

    def get_config(self) -> dict[str, Any]:
        """There is none: a part of a model is nothing that could be loaded elsewhere."""
        raise UsageError(
            f"The layer {self.name!r} is a part of one, on one of {self.mesh.model} ranks, and cannot be saved or "
            f"copied. Take the whole model with hvdkit.parallel.gather(model)."
        )


class JoinParts(keras.layers.Layer):
    """Puts parts of a tensor together along an axis."""

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
    """Columns of a `Dense` layer's kernel: whole input, a part of the output's features."""

    def __init__(self, mesh: Mesh, units: int, **config: Any) -> None:
        keras.layers.Dense.__init__(self, part(units, mesh, "units", config.get("name")), **config)
        self.mesh = mesh
        self.split_axes = {"kernel": 1, "bias": 0}

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """[..., features] to [..., units / ranks]."""
        return super().call(mappings.spread(x, self.mesh, _kind(self)), training)


class RowDense(_Part, keras.layers.Dense):
    """Rows of a `Dense` layer's kernel: a part of the input's features, a term of the output."""

    def __init__(self, mesh: Mesh, **config: Any) -> None:
        keras.layers.Dense.__init__(self, **config)
        self.mesh = mesh
        self.split_axes = {"kernel": 0}

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """[..., features / ranks] to [..., units]."""
        return _after_the_sum(self, ops.matmul(x, self.kernel))


class ColumnEinsumDense(_Part, keras.layers.EinsumDense):
    """An `EinsumDense` divided along an axis of its kernel that the output has: whole input, a part of the output."""

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
        """The layer's equation, for a part of one of the output's axes."""
        return super().call(mappings.spread(inputs, self.mesh, _kind(self)), training)


class RowEinsumDense(_Part, keras.layers.EinsumDense):
    """An `EinsumDense` divided along an axis of its kernel that is summed over: a part of the input, a term."""

    def __init__(self, mesh: Mesh, axis: int, **config: Any) -> None:
        keras.layers.EinsumDense.__init__(self, **config)
        self.mesh = mesh
        self.split_axes = {"kernel": axis}

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """The layer's equation, of which each rank sums over a part."""
        return _after_the_sum(self, ops.einsum(self.equation, inputs, self.kernel))


class HeadsAttention(_Part, keras.layers.MultiHeadAttention):
    """Some of a `MultiHeadAttention`'s heads; the output projection adds up those of all ranks."""

    def __init__(self, mesh: Mesh, num_heads: int, **config: Any) -> None:
        keras.layers.MultiHeadAttention.__init__(self, part(num_heads, mesh, "num_heads", config.get("name")), **config)
        self.mesh = mesh
        projections = ("query", "key", "value", "gate")
        self.split_axes = {f"{p}/kernel": 1 for p in projections} | {f"{p}/bias": 0 for p in projections}
        self.split_axes["attention_output/kernel"] = 0

    def _make_output_dense(self, query_shape: Any, common_kwargs: Any, name: str | None = None) -> Any:
        whole = super()._make_output_dense(query_shape, common_kwargs, name)
        return RowEinsumDense(self.mesh, 0, **whole.get_config())

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
        """As `keras.layers.MultiHeadAttention`; attention scores are those of this rank's heads."""
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
    """Some of an `Embedding`'s rows: each rank looks up the tokens that it has, and the ranks add up what they find."""

    def __init__(self, mesh: Mesh, input_dim: int, **config: Any) -> None:
        keras.layers.Embedding.__init__(self, part(input_dim, mesh, "input_dim", config.get("name")), **config)
        self.mesh = mesh
        self.split_axes = {"embeddings": 0}

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Token numbers int [...] to vectors [..., output_dim]."""
        numbers = tf.reshape(tf.cast(inputs, tf.int32) - self.mesh.model_index * self.input_dim, [-1])
        # Others' tokens are left out, not looked up and multiplied by zero: optimizers would count their rows.
        mine = tf.where((numbers >= 0) & (numbers < self.input_dim))
        found = super().call(tf.gather_nd(numbers, mine))
        vectors = tf.scatter_nd(mine, found, [tf.size(numbers, tf.int64), self.output_dim])
        vectors = tf.reshape(vectors, tf.concat([tf.shape(inputs), [self.output_dim]], axis=0))
        vectors = tf.ensure_shape(vectors, [*inputs.shape, self.output_dim])
        return mappings.total(vectors, self.mesh, _kind(self))


class ColumnEmbedding(_Part, keras.layers.Embedding):
    """Columns of an `Embedding`: a part of each token's vector."""

    def __init__(self, mesh: Mesh, output_dim: int, **config: Any) -> None:
        name = config.get("name")
        keras.layers.Embedding.__init__(self, output_dim=part(output_dim, mesh, "output_dim", name), **config)
        self.mesh = mesh
        self.split_axes = {"embeddings": 1}


def _kind(layer: Any) -> str:
    """The name of a layer's exchanges, which are numbered in the order of the graph (see `hvdkit.collectives.wire`).

    Not the layer's own: Keras numbers those that have none, differently on a rank that has made one more model.
    """
    return type(layer).__name__


def letters(equation: str) -> tuple[str, str, str]:
    """The axes of an `EinsumDense`'s input, kernel and output."""
    inputs, output = equation.replace(" ", "").replace("...", "").split("->")
    x, kernel = inputs.split(",")
    return x, kernel, output


def part(number: int, mesh: Mesh, what: str, layer: str | None) -> int:
    """An even part of a number.

    Raises:
        UsageError: it cannot be divided evenly.
    """
    if number % mesh.model:
        raise UsageError(
            f"The layer {layer!r} has {what}={number}, which {mesh.model} ranks cannot divide evenly. Choose a "
            f"multiple of {mesh.model}, another mesh, or leave the layer out of the layout."
        )
    return number // mesh.model


def _after_the_sum(layer: Any, term: tf.Tensor) -> tf.Tensor:
    """Adds the ranks' terms up, then the bias, which all have, and applies the activation."""
    x = mappings.total(term, layer.mesh, _kind(layer))
    if layer.bias is not None:
        x = ops.add(x, ops.cast(layer.bias, x.dtype))
    return x if layer.activation is None else layer.activation(x)
