"""Residual networks: ResNet-20 for small images (32×32), ResNet-50 of `keras.applications` for 64×64 and larger.

    launch/local.sh -np 2 --model=resnet --dataset=cifar10 --data-dir=DIR --steps=200
    launch/local.sh -np 2 --model=resnet --dataset=synthetic:224x224x3:1000:64 --local-batch=4 --steps=4

K. He et al., "Deep residual learning for image recognition", 2015, https://arxiv.org/abs/1512.03385; section 4.2 for
ResNet-20, here with projection shortcuts (option B).
"""

import keras
from keras import layers

from .recipe import Recipe

KIND = "image"
RECIPES = (
    Recipe(
        "cifar10", global_batch=64, optimizer="sgd:momentum=0.9", learning_rate=0.05, lr_schedule="cosine", epochs=60
    ),
)


def build(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Returns the model from raw pixels (0 to 255, [batch, height, width, channels]) to logits [batch, num_classes].

    Images with a height of less than 64 pixels get ResNet-20, all others ResNet-50.
    """
    return resnet20(input_shape, num_classes) if input_shape[0] < 64 else resnet50(input_shape, num_classes)


def resnet20(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Returns ResNet-20: three stages of three blocks with 16, 32 and 64 filters; 0.27 million parameters."""
    image = layers.Input(input_shape)
    x = layers.ReLU()(_conv(layers.Rescaling(1 / 64, offset=-1.875)(image), 16, 3))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            x = _block(x, filters, strides=2 if stage and not block else 1)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(num_classes, dtype="float32")(x), name="resnet20")


def resnet50(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Returns ResNet-50 with random weights, 25.6 million parameters for 1,000 classes; centers pixels as Keras."""
    image = layers.Input(input_shape)
    centred = layers.Rescaling(1.0, offset=[-123.68, -116.779, -103.939][: input_shape[-1]])(image)
    body = keras.applications.ResNet50(include_top=False, weights=None, input_shape=input_shape, pooling="avg")
    return keras.Model(image, layers.Dense(num_classes, dtype="float32")(body(centred)), name="resnet50")


def _conv(x: keras.KerasTensor, filters: int, size: int, strides: int = 1) -> keras.KerasTensor:
    x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
    return layers.BatchNormalization()(x)


def _block(x: keras.KerasTensor, filters: int, strides: int) -> keras.KerasTensor:
    y = layers.ReLU()(_conv(x, filters, 3, strides))
    y = _conv(y, filters, 3)
    shortcut = x if strides == 1 else _conv(x, filters, 1, strides)
    return layers.ReLU()(layers.Add()([y, shortcut]))
