"""Sentences: token numbers, embedding, convolutions of widths 3, 4 and 5, maximum over time, dropout, dense.

    launch/local.sh -np 2 --model=text_classifier --dataset=sentence_polarity --data-dir=DIR        77 to 78 % in 20 s

Y. Kim, "Convolutional neural networks for sentence classification", 2014, https://arxiv.org/abs/1408.5882, with an
embedding learned from scratch.
"""

from collections.abc import Sequence

import keras
from keras import layers

from .recipe import Recipe

KIND = "text"
RECIPES = (
    Recipe(
        "sentence_polarity",
        global_batch=128,
        optimizer="adam",
        learning_rate=2e-3,
        lr_schedule="cosine",
        epochs=3,
        max_tokens=20_000,
        sequence_length=48,
        accuracy=0.74,
    ),
)


def build(
    vocabulary_size: int,
    sequence_length: int,
    num_classes: int,
    label_mean: Sequence[float] = (),
    label_variance: Sequence[float] = (),
    width: int = 128,
    filters: int = 64,
) -> keras.Model:
    """Returns the model from token numbers (int [batch, sequence_length]) to logits or values [batch, num_classes].

    Args:
        vocabulary_size: number of different tokens.
        sequence_length: tokens per text.
        num_classes: number of classes, labels or measured values.
        label_mean: means of measured values in the training split; empty for classes and labels.
        label_variance: their variances.
        width: size of a token's vector.
        filters: filters of each convolution.
    """
    tokens = layers.Input([sequence_length], dtype="int32")
    embedded = layers.Embedding(vocabulary_size, width)(tokens)
    features = [
        layers.GlobalMaxPooling1D()(layers.Conv1D(filters, words, padding="same", activation="relu")(embedded))
        for words in (3, 4, 5)
    ]
    joined = layers.Dropout(0.5)(layers.Concatenate()(features))
    outputs = layers.Dense(num_classes, dtype="float32")(joined)
    if label_mean:
        units = layers.Normalization(
            mean=list(label_mean), variance=list(label_variance), invert=True, dtype="float32", name="in_units"
        )
        outputs = units(outputs)
    return keras.Model(tokens, outputs, name="text_classifier")
