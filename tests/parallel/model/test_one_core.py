"""A rank with one core hands no work to other threads; one with several cores keeps TensorFlow's defaults."""

from pathlib import Path

import pytest


def pool_seconds():
    """Seconds that the threads of TensorFlow's pool have computed in this process."""
    found = 0
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().startswith("tf_Compute"):
            found += int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def fit_on(cores):
    """How `fit` reads its data on this many cores, and the seconds that the pool computed meanwhile."""
    import os

    import keras
    import numpy as np

    import hvdkit as hvd
    from hvdkit.compat import fit_loop

    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.autotuning = fit_loop.of(self.model)[0]._distributed_dataset.options().autotune.enabled

    hvd.init()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(cores))  # the launcher has bound the rank to one core
    try:
        model = keras.Sequential([keras.Input([500]), keras.layers.Dense(500), keras.layers.Dense(500)])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()), "mse", jit_compile=False)
        look = Look()
        data = np.ones([1000, 500])
        began = pool_seconds()
        model.fit(data, data, batch_size=100, verbose=0, callbacks=[look])
        return look.autotuning, pool_seconds() - began
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("cores", "autotuning"), [(1, False), (2, None)])
def test_only_a_rank_with_one_core_stays_on_its_thread(ranks, cores, autotuning):
    import os

    if cores > (os.cpu_count() or 1):
        pytest.skip(f"needs {cores} cores")
    for tuned, seconds in ranks(2, fit_on, cores=cores):
        assert tuned is autotuning
        assert seconds < 0.005 if cores == 1 else seconds > 0.01
