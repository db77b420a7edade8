"""A rank with one core reads its data without autotuning, one with several cores does not change it."""

import pytest


def autotuning(cores):
    """Whether tf.data tunes the data of a fit, on this many cores."""
    import os

    import keras
    import numpy as np

    import hvdkit as hvd
    from hvdkit.compat import fit_loop

    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.enabled = fit_loop.of(self.model)[0]._distributed_dataset.options().autotune.enabled

    hvd.init()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(cores))  # the launcher has bound the rank to one core
    try:
        model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()), "mse")
        look = Look()
        model.fit(np.ones([4, 1]), np.ones([4, 1]), batch_size=2, verbose=0, callbacks=[look])
    finally:
        os.sched_setaffinity(0, before)
    return look.enabled


@pytest.mark.parametrize(("cores", "enabled"), [(1, False), (2, None)])
def test_only_a_rank_with_one_core_turns_autotuning_off(ranks, cores, enabled):
    import os

    if cores > (os.cpu_count() or 1):
        pytest.skip(f"needs {cores} cores")
    assert ranks(2, autotuning, cores=cores) == [enabled] * 2
