"""`fit` with shards of loaders and arrays: two ranks train, and validate, as one process does."""

import os

import numpy as np

SIZES = [4, 4, 4, 4, 4, 2]  # of the batches: the second rank's last one is short
EPOCHS = 2


def _examples():
    generator = np.random.default_rng(5)
    return generator.normal(size=(sum(SIZES), 6)).astype("float32"), generator.integers(3, size=sum(SIZES))


def _batches():
    ends = np.cumsum(SIZES)
    return [tuple(array[end - size : end] for array in _examples()) for size, end in zip(SIZES, ends, strict=True)]


def _numbered(**options):
    """Returns a PyDataset of the batches, which notes what is read and what it is told."""
    import keras

    class Numbered(keras.utils.PyDataset):
        def __init__(self):
            super().__init__(**options)
            self.read, self.epochs = [], 0

        def __len__(self):
            return len(SIZES)

        def __getitem__(self, index):
            self.read.append(index)
            return _batches()[index]

        def on_epoch_end(self):
            self.epochs += 1

    return Numbered()


def trained_on_loaders():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    hvd.init()
    model = keras.Sequential([keras.layers.Input([6]), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    start = [np.random.default_rng(1).normal(size=w.shape).astype("float32") for w in model.get_weights()]
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss=loss, jit_compile=False)

    def fit(data, *labels, shuffle=False, **options):
        model.set_weights(start)
        options = {"epochs": EPOCHS, "verbose": 0, **options}
        history = model.fit(data, *labels, shuffle=shuffle, **options)
        return np.concatenate([w.ravel() for w in model.get_weights()]), history.history

    x, y = _examples()
    exact = {"callbacks": hvd.callbacks.standard()}
    whole, shuffled = _numbered(workers=2), _numbered()
    results = {"PyDataset with workers": fit(hvd.data.shard(whole), **exact)[0]}
    os.environ["HVDKIT_STEPS_PER_EXECUTION"] = "1"  # from here on, trace one graph less for each kind of data
    stream = (batch for _ in range(EPOCHS) for batch in _batches())
    results["generator"] = fit(hvd.data.shard(stream), steps_per_epoch=3)[0]
    fit(hvd.data.shard(shuffled), shuffle=True)
    mine = hvd.data.shard((x, y))
    options = {"validation_split": 0.27, "batch_size": 4, "initial_epoch": 1, "epochs": 3}
    splits = fit(*mine, **options, **exact)[1]
    validation = hvd.data.shard(tf.data.Dataset.from_tensor_slices((x[:6], y[:6]))).batch(3).repeat()
    sets = fit(*mine, **{**options, "validation_split": 0}, validation_data=validation, validation_steps=1, **exact)[1]
    lengths = fit(*mine, batch_size=4, validation_data=(x[: 4 + 7 * hvd.rank()], y[: 4 + 7 * hvd.rank()]), **exact)[1]
    model.compile(keras.optimizers.SGD(0.1), loss=loss, jit_compile=False)  # each rank alone
    pairs = [tuple(np.concatenate(parts) for parts in zip(*_batches()[i : i + 2], strict=True)) for i in (0, 2, 4)]
    expected = {
        "loaders": fit((pair for _ in range(EPOCHS) for pair in pairs), steps_per_epoch=3)[0],
        "splits": fit(x, y, **{**options, "batch_size": 8})[1],
        "sets": fit(x, y, **{**options, "batch_size": 8, "validation_split": 0}, validation_data=(x[:6], y[:6]))[1],
        "lengths": fit(
            x,
            y,
            batch_size=8,
            validation_data=tuple(np.concatenate([a[:4], a[:11]]) for a in (x, y)),
        )[1],
    }
    reads = shuffled.read[2:]  # Keras reads two for their shapes
    return results, expected, {"splits": splits, "sets": sets, "lengths": lengths}, reads, whole.epochs, shuffled.epochs


def test_ranks_train_on_shards_of_loaders_as_one_process(ranks):
    everyone = ranks(2, trained_on_loaders)
    for rank, (results, expected, histories, reads, *epochs) in enumerate(everyone):
        for kind, weights in results.items():
            np.testing.assert_allclose(weights, expected["loaders"], atol=2e-6, err_msg=kind)
        for kind, history in histories.items():
            np.testing.assert_allclose(history["val_loss"], expected[kind]["val_loss"], rtol=1e-5, err_msg=kind)
        assert len(histories["splits"]["val_loss"]) == 2, "initial_epoch"
        assert sorted(reads[:3]) == sorted(reads[3:6]) == [rank, rank + 2, rank + 4]
        assert epochs == [EPOCHS + 1] * 2, "Keras tells of one before the first"
    assert any(reads[:3] != sorted(reads[:3]) or reads[3:6] != sorted(reads[3:6]) for _, _, _, reads, *_ in everyone)
