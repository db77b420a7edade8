"""A model of few operations and many weights, 5.8 million: what an exchange of gradients costs shows here."""

import keras


def build(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Returns 784 -> 2048 ReLU -> 2048 ReLU -> classes, from raw pixels to logits."""
    return keras.Sequential(
        [
            keras.layers.Input(input_shape),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(2048, activation="relu"),
            keras.layers.Dense(2048, activation="relu"),
            keras.layers.Dense(num_classes, dtype="float32"),
        ],
        name="large_mlp",
    )
