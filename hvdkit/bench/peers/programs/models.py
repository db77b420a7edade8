"""The workloads of `hvdkit.bench` for any Keras: same layers, number of weights and optimizer.

`torch_ddp.py` builds the same models in PyTorch.
"""

import runpy
from pathlib import Path

SHAPES = {"mlp": (28, 28, 1), "lenet": (32, 32, 3), "large_mlp": (28, 28, 1), "resnet20": (32, 32, 3)}
BATCHES = {"mlp": 64, "lenet": 64, "large_mlp": 64, "resnet20": 32}
EXAMPLES = 4096  # of each rank, in memory
_DENSE = {"mlp": (128, 64), "large_mlp": (2048, 2048)}


def examples(name, rank):
    """Return this rank's images, float32 [EXAMPLES, height, width, channels], and labels, int64, as NumPy arrays."""
    import numpy as np

    # By its path: hvdkit itself cannot be imported in the peers' environments.
    images = runpy.run_path(str(Path(__file__).parents[3] / "data" / "sources" / "synthetic.py"))["images"]
    pixels, labels = images(SHAPES[name], 10, EXAMPLES, np.random.default_rng(1 + rank))
    return pixels.astype("float32"), labels


def build_keras(keras, name):
    """Build the uncompiled model in Keras 2 or 3."""
    layers = keras.layers
    image = keras.Input(SHAPES[name])
    if name in _DENSE:
        x = layers.Flatten()(layers.Rescaling(1 / 255)(image))
        for width in _DENSE[name]:
            x = layers.Dense(width, activation="relu")(x)
        return keras.Model(image, layers.Dense(10)(x))
    x = layers.Rescaling(1 / 64, offset=-1.875)(image)
    if name == "lenet":
        for filters in (6, 16):
            x = layers.MaxPooling2D(2)(layers.Conv2D(filters, 5, padding="same", activation="relu")(x))
        x = layers.Flatten()(x)
        for width in (120, 84):
            x = layers.Dense(width, activation="relu")(x)
        return keras.Model(image, layers.Dense(10)(x))

    def convolve(x, filters, size, strides=1):
        return layers.BatchNormalization()(layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x))

    x = layers.ReLU()(convolve(x, 16, 3))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            strides = 2 if stage and not block else 1
            y = convolve(layers.ReLU()(convolve(x, filters, 3, strides)), filters, 3)
            x = layers.ReLU()(layers.Add()([y, x if strides == 1 else convolve(x, filters, 1, strides)]))
    return keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def optimizer_of(keras, name):
    """Create the workload's optimizer in Keras 2 or 3."""
    return keras.optimizers.SGD(0.05, momentum=0.9) if name == "resnet20" else keras.optimizers.Adam(1e-3)
