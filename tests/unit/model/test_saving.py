"""`load_model` in a job of one rank."""

import keras
import numpy as np
import pytest

import hvdkit as hvd


class Halved(keras.optimizers.SGD):
    """An optimizer of the user's own."""


def _saved(path, optimizer):
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile(optimizer, loss=keras.losses.MeanSquaredError())
    model.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0)
    model.save(path)
    return model


@pytest.mark.parametrize("file", ["x.keras", "x.h5"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_plain_and_a_wrapped_model_are_loaded_alike(tmp_path, wrapped, file):
    optimizer = keras.optimizers.Adam(0.25)
    model = _saved(tmp_path / file, hvd.DistributedOptimizer(optimizer) if wrapped else optimizer)
    loaded = hvd.load_model(tmp_path / file, compression=hvd.Compression.fp16)
    assert type(loaded.optimizer) is hvd.DistributedOptimizer
    for mine, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        assert np.array_equal(mine, theirs)
    loaded.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0)
    assert int(loaded.optimizer.iterations) == 2


def test_custom_optimizers_are_known(tmp_path):
    _saved(tmp_path / "x.keras", Halved(0.5))
    loaded = hvd.load_model(tmp_path / "x.keras", custom_optimizers=[Halved])
    assert isinstance(loaded.optimizer, Halved)


def test_a_model_that_was_not_compiled_stays_so(tmp_path):
    keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)]).save(tmp_path / "x.keras")
    assert not hvd.load_model(tmp_path / "x.keras").compiled


def test_legacy_optimizers_are_refused():
    with pytest.raises(ValueError, match=r"which Keras 3 does not have. Leave the argument out"):
        hvd.load_model("x.keras", legacy_opts=True)
