import keras
import numpy as np

from hvdkit.optimizers import before_update


def test_the_last_hook_of_an_optimizer_counts():
    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=100.0)
    for factor in (2.0, 3.0):
        before_update.hook(
            optimizer,
            exchange=lambda grads, factor=factor: [factor * g for g in grads],
            clip=lambda grads, keras_clip: keras_clip([g + 1 for g in grads]),
        )
    variable = keras.Variable([0.0])
    optimizer.build([variable])
    optimizer.apply([keras.ops.ones([1])])
    assert np.asarray(variable).tolist() == [-4.0], "3 x 1 + 1, not 2 x 3 x 1 + 1 + 1"
    before_update.hook(optimizer)
    optimizer.apply([keras.ops.ones([1])])
    assert np.asarray(variable).tolist() == [-5.0]
