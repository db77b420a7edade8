"""Models with few operations and many weights, whose step time is mostly the gradient allreduce."""

import keras
from hvdkit_models import mnist_mlp


def build(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Build 784 -> 2048 ReLU -> 2048 ReLU -> classes, from raw pixels to logits: 5.8 million weights."""
    return mnist_mlp.build(input_shape, num_classes, hidden=(2048, 2048))


def build_larger(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Build 784 -> 6656 ReLU -> 6656 ReLU -> classes, from raw pixels to logits: 50 million weights, 200 MB."""
    return mnist_mlp.build(input_shape, num_classes, hidden=(6656, 6656))
