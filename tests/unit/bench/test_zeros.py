"""Zeros of gradients, counted while a model trains."""

import keras
import numpy as np

from hvdkit.bench.zeros import ZeroShare


def test_the_zeros_of_the_last_step_are_counted():
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(3, use_bias=False)])
    model.compile("sgd", loss="mse", jit_compile=False)
    inputs = np.ones([8, 4], "float32")
    inputs[4:, 0] = 0  # of the second batch; three weights have no gradient then
    zeros = ZeroShare()
    model.fit(inputs, np.ones([8, 3], "float32"), batch_size=4, shuffle=False, verbose=0, callbacks=[zeros])
    assert zeros.share() == 0.25
    assert "apply" not in vars(model.optimizer), "the optimizer is as it was"
