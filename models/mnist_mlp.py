"""A multilayer perceptron: 784 -> 128 ReLU -> 64 ReLU -> 10.

launch/local.sh -np 2 --model=mnist_mlp                                         96 to 98 % in 2 s on two cores
launch/local.sh -np 2 --model=mnist_mlp --dataset=mnist --data-dir=DIR          97.9 to 98.2 % in 10 s
"""

import keras

from .recipe import Recipe

KIND = "image"
RECIPES = (
    Recipe(
        "digits", global_batch=32, optimizer="adam", learning_rate=5e-3, lr_schedule="cosine", epochs=5, accuracy=0.95
    ),
    Recipe(
        "mnist", global_batch=128, optimizer="adam", learning_rate=5e-3, lr_schedule="cosine", epochs=4, accuracy=0.975
    ),
)


def build(input_shape: tuple[int, int, int], num_classes: int, hidden: tuple[int, ...] = (128, 64)) -> keras.Model:
    """Returns the model from raw pixels (0 to 255, [batch, height, width, channels]) to logits [batch, num_classes].

    `hidden` gives the widths of the hidden layers.
    """
    return keras.Sequential(
        [
            keras.layers.Input(input_shape),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            *(keras.layers.Dense(width, activation="relu") for width in hidden),
            keras.layers.Dense(num_classes, dtype="float32"),
        ],
        name="mnist_mlp",
    )
