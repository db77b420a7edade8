"""A decoder-only Transformer that predicts the next byte of a text.

    launch/local.sh -np 2 --model=gpt                                   2.00 to 2.03 bits per byte in about a minute
    launch/local.sh -np 2 --model=gpt --dataset=text:PATH --sequence-length=256 --model-args=width=256,depth=6

A. Vaswani et al., "Attention is all you need", 2017, https://arxiv.org/abs/1706.03762, in the form of A. Radford et
al., "Language models are unsupervised multitask learners", 2019 (GPT-2): learned positions, normalization before each
part, GELU. Tokens are bytes: any text works, without a learned vocabulary.
"""

import keras
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
