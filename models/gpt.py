"""A decoder-only Transformer that predicts the next byte of a text.

    launch/local.sh -np 2 --model=gpt                                   2.00 to 2.03 bits per byte in about a minute
    launch/local.sh -np 2 --model=gpt --dataset=text:PATH --sequence-length=256 --model-args=width=256,depth=6

A. Vaswani et al., "Attention is all you need", 2017, https://arxiv.org/abs/1706.03762, in the form of A. Radford et
al., "Language models are unsupervised multitask learners", 2019 (GPT-2): learned positions, normalization before each
part, GELU. Tokens are bytes: any text works, without a learned vocabulary.
"""

import itertools

import keras
import numpy as np
from keras import layers, ops

from .recipe import Recipe

KIND = "tokens"
RECIPES = (
    Recipe(
        "pydoc",
        global_batch=16,
        optimizer="adamw:weight_decay=0.1,global_clipnorm=1.0",
        learning_rate=3e-3,
        lr_schedule="cosine",
        warmup_epochs=0.5,
        epochs=6,
        sequence_length=128,
        bits_per_byte=2.1,
    ),
)


def build(
    sequence_length: int,
    vocabulary_size: int = 256,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    expansion: int = 4,
    dropout: float = 0.0,
) -> keras.Model:
    """Returns the model from tokens (int [batch, sequence_length]) to logits [batch, sequence_length, vocabulary_size].

    The logits at a position predict the next token and do not depend on later tokens. A single tensor, [batch,
    sequence_length, width], connects a block to the next: the output of `block0_mlp_add`, `block1_mlp_add` and so on.

    Args:
        sequence_length: tokens per window; the model does not see earlier tokens.
        vocabulary_size: number of different tokens; 256 for bytes.
        width: size of a token's vector between blocks.
        depth: number of blocks, each with attention and a perceptron.
        heads: number of attention heads.
        expansion: the perceptron's width, in multiples of `width`.
        dropout: dropout rate at the end of each attention and each perceptron.

    Raises:
        ValueError: the width is not a multiple of the number of heads.
    """
    if width % heads:
        raise ValueError(f"a width of {width} cannot be divided over {heads} heads; use a multiple of {heads}")
    tokens = layers.Input([sequence_length], dtype="int32", name="tokens")
    x = layers.Embedding(vocabulary_size, width, name="embed_tokens")(tokens)
    place = layers.Dense(width, use_bias=False, kernel_initializer="uniform", name="embed_positions")
    positions = place(_positions(tokens, sequence_length))
    x = x + positions  # not layers.Add, which would take the one row of positions for the batch
    for block in range(depth):
        x = _attention(x, heads, dropout, f"block{block}_attention")
        x = _perceptron(x, expansion, dropout, f"block{block}_mlp")
    x = layers.LayerNormalization(epsilon=1e-5, name="final_norm")(x)
    return keras.Model(tokens, layers.Dense(vocabulary_size, dtype="float32", name="head")(x), name="gpt")


def _positions(tokens: keras.KerasTensor, length: int) -> keras.KerasTensor:
    """Returns the positions 0, 1, 2, ... one-hot, [1, length, length]; a Functional model needs them as an operation.

    Multiplied by a matrix, they are an embedding with a dense gradient. Do not use `layers.Embedding`: each replica
    would send gradient rows for the same positions, and Keras' Adam squares each row, not their sum. So two replicas
    would train a different model than one.
    """
    one_row = ops.max(tokens, axis=0, keepdims=True)
    return ops.one_hot(ops.cumsum(ops.ones_like(one_row), axis=1) - 1, length)


def _attention(x: keras.KerasTensor, heads: int, dropout: float, name: str) -> keras.KerasTensor:
    y = layers.LayerNormalization(epsilon=1e-5, name=f"{name}_norm")(x)
    # No biases: a key bias shifts all positions equally, which the softmax cancels. Its gradient is rounding error,
    # from which Adam would take full steps.
    attention = layers.MultiHeadAttention(heads, x.shape[-1] // heads, use_bias=False, name=name)
    return _add(x, attention(y, y, use_causal_mask=True), dropout, name)


def _perceptron(x: keras.KerasTensor, expansion: int, dropout: float, name: str) -> keras.KerasTensor:
    y = layers.LayerNormalization(epsilon=1e-5, name=f"{name}_norm")(x)
    y = layers.Dense(expansion * x.shape[-1], activation="gelu", name=f"{name}_up")(y)
    return _add(x, layers.Dense(x.shape[-1], name=f"{name}_down")(y), dropout, name)


def _add(x: keras.KerasTensor, y: keras.KerasTensor, dropout: float, name: str) -> keras.KerasTensor:
    if dropout:
        y = layers.Dropout(dropout, name=f"{name}_dropout")(y)
    return layers.Add(name=f"{name}_add")([x, y])


def blocks(model: keras.Model) -> list[keras.Model]:
    """Returns what comes before the blocks of a model of `build`, and each block, as models that share its layers.

    Raises:
        ValueError: it is another model.
    """
    tensors = [model.get_layer("block0_attention_norm").input]
    tensors += [model.get_layer(f"block{block}_mlp_add").output for block in range(_depth(model))]
    return [keras.Model(one, other) for one, other in itertools.pairwise([model.input, *tensors])]


def _depth(model: keras.Model) -> int:
    """Returns the number of blocks of a model of `build`.

    Raises:
        ValueError: it is another model.
    """
    names = {layer.name for layer in model.layers}
    depth = sum(f"block{block}_attention" in names for block in range(len(names)))
    parts = ("attention_norm", "attention", "mlp_norm", "mlp_up", "mlp_down", "mlp_add")
    expected = {f"block{block}_{part}" for block in range(depth) for part in parts}
    ends = {"embed_tokens", "embed_positions", "final_norm", "head"}
    if not depth or not expected | ends <= names:
        raise ValueError(f"the model {model.name} is none of models/gpt.py")
    return depth


class Cached:
    """A model of `build` that takes a text piece by piece: the keys and values of earlier tokens are kept.

    So the next token costs one position, and not the whole window.

    Args:
        model: what `build` returned, or a file of it.

    Raises:
        ValueError: it is another model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._depth = _depth(model)
        self.window = model.input_shape[1]
        self._layer = model.get_layer

    def empty(self) -> list[tuple[keras.KerasTensor, keras.KerasTensor]]:
        """Returns the keys and values of no token, of each block: [window, heads, size]."""
        attention = self._layer("block0_attention")
        nothing = ops.zeros([self.window, attention.num_heads, attention.key_dim], attention.compute_dtype)
        return [(nothing, nothing)] * self._depth

    def __call__(
        self, tokens: keras.KerasTensor, first: keras.KerasTensor, kept: list[tuple]
    ) -> tuple[keras.KerasTensor, list[tuple]]:
        """Returns the logits behind each of the tokens, [tokens, vocabulary], and what is kept from now on.

        Args:
            tokens: int32 [tokens].
            first: position of the first of them in the window; the last one must lie in it, too.
            kept: the keys and values of the positions before; later ones are overwritten.
        """
        positions = first + ops.arange(tokens.shape[0])
        places = self._layer("embed_positions")(ops.one_hot(positions, self.window))
        x = (self._layer("embed_tokens")(tokens) + places)[None]
        is_seen = ops.arange(self.window)[None] <= positions[:, None]
        after = []
        for block in range(self._depth):
            name = f"block{block}"
            y = self._layer(f"{name}_attention_norm")(x)
            y, *now = self._attend(self._layer(f"{name}_attention"), y, first, is_seen, *kept[block])
            after.append(tuple(now))
            x = x + y
            y = self._layer(f"{name}_mlp_up")(self._layer(f"{name}_mlp_norm")(x))
            x = x + self._layer(f"{name}_mlp_down")(y)
        return self._layer("head")(self._layer("final_norm")(x))[0], after

    def _attend(
        self,
        attention: layers.MultiHeadAttention,
        y: keras.KerasTensor,
        first: keras.KerasTensor,
        is_seen: keras.KerasTensor,
        keys: keras.KerasTensor,
        values: keras.KerasTensor,
    ) -> tuple[keras.KerasTensor, keras.KerasTensor, keras.KerasTensor]:
        """Returns the attention of some positions to all up to each, and all keys and values."""
        start = (first, 0, 0)
        keys = ops.slice_update(keys, start, attention.key_dense(y)[0])
        values = ops.slice_update(values, start, attention.value_dense(y)[0])
        query = attention.query_dense(y)[0] * attention.key_dim**-0.5
        scores = ops.where(is_seen[None], ops.einsum("qhd,khd->hqk", query, keys), -np.inf)
        mixed = ops.einsum("hqk,khd->qhd", ops.softmax(scores), values)
        return attention.output_dense(mixed[None]), keys, values
