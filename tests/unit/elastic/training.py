"""The small training of these tests."""

import keras
import numpy as np

import hvdkit as hvd


def make_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.1)), loss="mse", jit_compile=False)
    return model


def make_data(examples=12):
    return np.ones([examples, 2], "float32"), np.ones([examples, 1], "float32")


def values_of(model):
    return [np.array(v) for v in [*model.variables, *model.optimizer.variables]]
