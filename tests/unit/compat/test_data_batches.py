"""How the sizes of a data set's batches may differ, told by what it is made from."""

import numpy as np
import pytest
import tensorflow as tf

from hvdkit.compat.data_batches import Sizes, sizes_of, unit_of

Data = tf.data.Dataset
SIX = Data.from_tensor_slices((np.ones([6, 3], "float32"), np.ones([6, 1])))


def _half(x, y):
    return x / 2, y


def test_what_the_elements_are():
    assert unit_of(SIX.batch(4).map(_half).shuffle(2)) == "batches"
    assert unit_of(Data.from_tensor_slices(["a.tfrecord"])) == "strings"
    assert unit_of(SIX.repeat(2)) == unit_of(SIX.batch(4).unbatch()) == "examples"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (SIX.batch(4), Sizes.LAST_IS_SHORT),
        (SIX.batch(4, drop_remainder=True).repeat(), Sizes.ONE),
        (SIX.batch(3).shuffle(2).repeat(2), Sizes.ONE),
        (SIX.repeat().batch(4).map(_half).prefetch(1), Sizes.ONE),
        (SIX.shuffle(6).batch(4, num_parallel_calls=2).map(_half, num_parallel_calls=2).take(2), Sizes.LAST_IS_SHORT),
        (SIX.batch(4).shard(2, 0).cache().skip(0), Sizes.LAST_IS_SHORT),
        (SIX.padded_batch(4).with_options(tf.data.Options()), Sizes.LAST_IS_SHORT),
        (Data.zip(SIX.batch(3), SIX.batch(4)), Sizes.LAST_IS_SHORT),
        (SIX.filter(lambda x, y: x[0] > 0).batch(4), Sizes.LAST_IS_SHORT),
        (Data.from_tensors(np.ones([4, 3])).repeat(2), Sizes.ONE),
        # Short batches that are not the last ones.
        (SIX.batch(4).repeat(2), Sizes.ANY),
        (SIX.batch(4).shuffle(2), Sizes.ANY),
        (SIX.batch(4).concatenate(SIX.batch(4)), Sizes.ANY),
        # Batches that something else than `batch` makes.
        (Data.from_tensor_slices([4, 2]).map(lambda size: tf.ones([size, 3])), Sizes.ANY),
        (SIX.batch(4).map(lambda x, y: tf.boolean_mask(x, x[:, 0] > 0)), Sizes.ANY),
        (
            SIX.batch(4).map(lambda x, y: tf.ensure_shape(tf.py_function(lambda x: x, [x], x.dtype), [None, 3])),
            Sizes.ANY,
        ),
        (SIX.batch(4).filter(lambda x, y: True).apply(tf.data.experimental.assert_cardinality(2)), Sizes.ANY),
        (Data.from_generator(list, output_signature=tf.TensorSpec([None, 3])), Sizes.ANY),
        (SIX.bucket_by_sequence_length(lambda x, y: tf.size(x), [2], [4, 2]), Sizes.ANY),
    ],
)
def test_sizes(data, expected):
    assert sizes_of(data) is expected
