"""`BestModelCheckpoint` in one process."""

import keras
import numpy as np
import pytest

import hvdkit as hvd


def _model():
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    return model


class Rising(keras.callbacks.Callback):
    """Makes the validation loss whatever the test wants."""

    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = [3.0, 1.0, 2.0][epoch]


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_best_epoch_is_kept_in_one_file(tmp_path, weights_only):
    path = tmp_path / ("best.weights.h5" if weights_only else "best.keras")
    model, best = _model(), hvd.callbacks.BestModelCheckpoint(save_weights_only=weights_only)
    best.filepath = path  # as Horovod's Spark estimator does
    seen = []
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(model.get_weights()))
    model.fit(np.ones([4, 2]), np.ones([4, 1]), epochs=3, verbose=0, callbacks=[Rising(), best, keep])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = _model()
    loaded.load_weights(path)
    assert np.array_equal(loaded.get_weights()[0], seen[1][0])
    assert not np.array_equal(loaded.get_weights()[0], seen[2][0])


def test_a_rank_that_is_not_the_root_writes_nothing(tmp_path):
    hvd.world.enter(hvd.World(rank=1, size=2, local_rank=1, local_size=2, cross_rank=0, cross_size=1, host="h"))
    best = hvd.callbacks.BestModelCheckpoint(filepath=tmp_path / "best.keras")
    _model().fit(np.ones([4, 2]), np.ones([4, 1]), epochs=3, verbose=0, callbacks=[Rising(), best])
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_training_does_not_begin():
    with pytest.raises(ValueError, match=r"does not know where to save: pass filepath='best.keras'"):
        _model().fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0, callbacks=[hvd.callbacks.BestModelCheckpoint("loss")])
