"""How vectors are cut, and which optimizers are refused."""

import numpy as np
import pytest


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 40])
def test_parts_are_equal_and_together_are_all(ranks):
    import keras
    import tensorflow as tf

    from hvdkit.optimizers.flat import Flat

    shapes = [(3, 5), (), (17,), (0,), (2, 2, 2)]
    values = [np.random.default_rng(0).normal(size=shape).astype("float32") for shape in shapes]
    variables = [keras.Variable(value) for value in values]
    flats = [Flat(variables, range(5), ranks, rank) for rank in range(ranks)]
    parts = [tf.concat(flat.take(values, flat.mine), axis=0) for flat in flats]
    assert {part.shape[0] for part in parts} == {flats[0].part}
    assert ranks * flats[0].part < sum(v.size for v in values) + 16 * (len(shapes) + ranks)
    vector = tf.concat(parts, axis=0)
    assert np.array_equal(vector, flats[0].join(values))
    for value, found in zip(values, flats[0].divide(vector), strict=True):
        assert np.array_equal(value, found)
    assert np.array_equal(tf.concat(flats[-1].take([None] * 5, flats[-1].mine), axis=0), np.zeros(flats[-1].part))


def test_optimizers_that_look_at_whole_variables_are_refused():
    import keras

    import hvdkit as hvd

    class Mine(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            self.assign_sub(variable, learning_rate * gradient / keras.ops.norm(gradient))

    class Known(keras.optimizers.AdamW):
        pass

    hvd.ShardedOptimizer(Known())
    hvd.ShardedOptimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.Lion()))
    for optimizer, why in (
        (keras.optimizers.Lamb(), "Lamb scales each variable's step by the norms of the whole variable"),
        (keras.optimizers.Adafactor(), "Adafactor keeps means of a matrix's rows and columns"),
        (Mine(), "Mine has an update of its own, which may look at more than one weight at a time. Use one of SGD, "),
    ):
        with pytest.raises(hvd.UsageError, match=why):
            hvd.ShardedOptimizer(optimizer)
    with pytest.raises(TypeError, match="is a DistributedOptimizer already"):
        hvd.ShardedOptimizer(hvd.DistributedOptimizer(keras.optimizers.Adam()))
