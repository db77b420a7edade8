"""Models are built from the shapes of the data that `fit` reads, and nothing else is read for it."""

import keras
import numpy as np
import pytest

from hvdkit.model.build import BuildFirst

BATCHES = 6


class Batches(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()
        self.read = []

    def __len__(self):
        return BATCHES

    def __getitem__(self, number):
        self.read.append(number)
        return np.ones([4, 3], "float32"), np.ones([4, 1], "float32")


class Generator:
    def __init__(self):
        self.read = []

    def __iter__(self):
        return self

    def __next__(self):
        if len(self.read) == BATCHES:
            raise StopIteration
        self.read.append(len(self.read))
        return np.ones([4, 3], "float32"), np.ones([4, 1], "float32")


class Watch(keras.callbacks.Callback):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def on_train_begin(self, logs=None):
        self.shapes = [tuple(w.shape) for w in self.model.weights]
        self.read = len(self.data.read)


def one_by_one(data):
    while (batch := next(data, None)) is not None:
        yield batch


@pytest.mark.parametrize("kind", ["PyDataset", "generator"])
@pytest.mark.parametrize("building", [True, False])
def test_the_model_is_built_before_training_and_no_batch_is_read_for_it(kind, building):
    data = Batches() if kind == "PyDataset" else Generator()
    model = keras.Sequential([keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    watch = Watch(data)
    given = data if kind == "PyDataset" else one_by_one(data)
    model.fit(given, verbose=0, callbacks=[*([BuildFirst()] if building else []), watch])
    assert watch.shapes == ([(3, 2), (2,), (2, 1), (1,)] if building else [])
    assert watch.read == 2, "Keras itself looks at two batches, in order to know their shapes"
    assert sorted(set(data.read)) == list(range(BATCHES))
