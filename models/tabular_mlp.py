"""A multilayer perceptron on standardized features: classes, measured values, or several labels.

    launch/local.sh -np 2 --model=tabular_mlp                                       about 95 % in 2 s on two cores
    launch/local.sh -np 2 --model=tabular_mlp --dataset=houses.csv --label-column=price --task=regression

The means and variances of the training split are part of the model: it takes features as they are in the data, and
gives measured values in their own unit.
"""

from collections.abc import Sequence

import keras

from .recipe import Recipe

KIND = "features"
RECIPES = (
    Recipe("breast_cancer", global_batch=32, optimizer="adam", learning_rate=5e-3, lr_schedule="cosine", epochs=10),
)


def build(
    input_shape: tuple[int],
    num_classes: int,
    feature_mean: Sequence[float],
    feature_variance: Sequence[float],
    label_mean: Sequence[float] = (),
    label_variance: Sequence[float] = (),
    hidden: tuple[int, ...] = (64, 64),
    dropout: float = 0.0,
) -> keras.Model:
    """Returns the model from features (float [batch, features]) to logits or measured values [batch, num_classes].

    Args:
        input_shape: (features,).
        num_classes: number of classes, labels, or measured values.
        feature_mean: mean of each feature in the training split.
        feature_variance: variance of each feature.
        label_mean: mean of each measured value; empty for classes and labels.
        label_variance: variance of each measured value.
        hidden: widths of the hidden layers.
        dropout: dropout rate after each hidden layer.
    """
    # In float32 also if the layers between compute in 16 bits, which raw values may exceed.
    features = keras.layers.Input(input_shape)
    x = keras.layers.Normalization(
        mean=list(feature_mean), variance=list(feature_variance), dtype="float32", name="standardize"
    )(features)
    for width in hidden:
        x = keras.layers.Dense(width, activation="relu")(x)
        x = keras.layers.Dropout(dropout)(x) if dropout else x
    x = keras.layers.Dense(num_classes, dtype="float32")(x)
    if label_mean:
        x = keras.layers.Normalization(
            mean=list(label_mean), variance=list(label_variance), invert=True, dtype="float32", name="in_units"
        )(x)
    return keras.Model(features, x, name="tabular_mlp")
