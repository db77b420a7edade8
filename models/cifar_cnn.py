"""A small convolutional network with the layers of LeNet-5: conv 6@5×5, pool, conv 16@5×5, pool, 120, 84, 10.

    launch/local.sh -np 2 --model=cifar_cnn --dataset=cifar10 --data-dir=DIR        65.5 to 66.5 % in about a minute

Y. LeCun et al., "Gradient-based learning applied to document recognition", 1998; with ReLU, maximum pooling and "same"
padding, which is worth 3 points on CIFAR-10.
"""

import keras

from .recipe import Recipe

KIND = "image"
RECIPES = (
    Recipe(
        "cifar10",
        global_batch=128,
        optimizer="adamw:weight_decay=0.1",
        learning_rate=3e-3,
        lr_schedule="cosine",
        epochs=7,
        accuracy=0.64,
    ),
)


def build(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Returns the model from raw pixels (0 to 255, [batch, height, width, channels]) to logits [batch, num_classes]."""
    return keras.Sequential(
        [
            keras.layers.Input(input_shape),
            keras.layers.Rescaling(1 / 64, offset=-1.875),  # (pixel - 120) / 64: about CIFAR-10's mean and deviation
            keras.layers.Conv2D(6, 5, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(16, 5, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(120, activation="relu"),
            keras.layers.Dense(84, activation="relu"),
            keras.layers.Dense(num_classes, dtype="float32"),
        ],
        name="cifar_cnn",
    )
