"""`CompressionGuard` in one process; what it does on several is in tests/parallel/compression."""

import keras
import numpy as np
import pytest

import hvdkit as hvd
from hvdkit import callbacks


def fit(optimizer, *chosen, epochs=1):
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse", jit_compile=False)
    model.fit(np.ones([8, 2]), np.ones([8, 1]), batch_size=2, epochs=epochs, verbose=0, callbacks=chosen)


def compressed():
    return hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=hvd.Compression.int8())


def test_a_fall_back_stays_when_training_is_resumed(tmp_path):
    first = callbacks.CompressionGuard()
    first.fell_back_at = 3
    fit(compressed(), first, callbacks.CheckpointCallback(tmp_path))
    resumed = callbacks.CompressionGuard()
    fit(compressed(), resumed, callbacks.CheckpointCallback(tmp_path), epochs=2)
    assert resumed.fell_back_at == 3


@pytest.mark.parametrize("compression", [hvd.Compression.none, hvd.Compression.fp16])
def test_what_cannot_be_switched_off_is_refused(compression):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=compression)
    with pytest.raises(hvd.UsageError, match="with int8, onebit, topk or powersgd"):
        fit(optimizer, callbacks.CompressionGuard())
    with pytest.raises(hvd.UsageError, match="with int8, onebit, topk or powersgd"):
        fit(keras.optimizers.SGD(0.1), callbacks.CompressionGuard())


@pytest.mark.parametrize("wrong", [{"dense_steps": -1}, {"every": 0}, {"tolerance": 0}, {"smoothing": 1.5}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(hvd.UsageError, match="CompressionGuard needs dense_steps of 0 or more"):
        callbacks.CompressionGuard(**wrong)
