import numpy as np
import pytest
import tensorflow as tf

from hvdkit import callbacks
from hvdkit.callbacks.replica_guard import fingerprint
from hvdkit.errors import UsageError

DTYPES = ["float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "uint32", "int64", "bool"]


@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (5000,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_flipped_bit_hides(dtype, shape):
    dtype = tf.as_dtype(dtype)
    generator = np.random.default_rng(1)
    raw = generator.integers(256 if dtype != tf.bool else 2, size=(*shape, dtype.size), dtype=np.uint8)
    known = int(fingerprint(_as(raw, dtype, shape)))
    assert known == int(fingerprint(_as(raw.copy(), dtype, shape)))
    for bit in range(8 * dtype.size if dtype != tf.bool else 1):
        flipped = raw.reshape(-1, dtype.size).copy()
        flipped[generator.integers(len(flipped)), bit // 8] ^= 1 << bit % 8
        assert int(fingerprint(_as(flipped.reshape(raw.shape), dtype, shape))) != known, f"bit {bit}"


def _as(raw, dtype, shape):
    return tf.constant(np.frombuffer(raw.tobytes(), dtype.as_numpy_dtype).reshape(shape))


def test_elements_that_change_places_show():
    values = np.random.default_rng(0).normal(size=5000).astype("float32")
    known = int(fingerprint(tf.constant(values)))
    for one, other in [(0, 1), (0, 1024), (3, 2051), (1025, 2048), (0, 4999)]:
        swapped = values.copy()
        swapped[[one, other]] = swapped[[other, one]]
        assert int(fingerprint(tf.constant(swapped))) != known, f"{one} and {other}"


def test_an_empty_tensor_has_a_fingerprint():
    assert int(fingerprint(tf.zeros([0, 3]))) == 0


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match="every must be a number of steps, 1 or more, but is 0"):
        callbacks.ReplicaGuardCallback(every=0)
    with pytest.raises(UsageError, match="action must be 'stop' or 'broadcast', but is 'warn'"):
        callbacks.ReplicaGuardCallback(action="warn")
