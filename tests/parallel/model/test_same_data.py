"""A warning for data that no rank has divided, of each kind, and none for those that are."""

import logging

import numpy as np


def _made_by_python(x, y):
    """A data set of examples that a generator yields, and a function that reads one in Python."""
    import tensorflow as tf

    specs = tf.TensorSpec([3]), tf.TensorSpec([1])

    def read(row):
        both = tf.py_function(lambda row: (x[row], y[row]), [row], [tf.float32, tf.float32])
        return tuple(tf.ensure_shape(part, spec.shape) for part, spec in zip(both, specs, strict=True))

    return tf.data.Dataset.from_generator(lambda: zip(x, y, strict=True), output_signature=specs), read


def warned():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    rank = hvd.init().rank
    tf.random.set_seed(None)  # an earlier test may have set one
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    y = x[:, :1]

    class Shuffled(keras.utils.PyDataset):
        def __init__(self, seed):
            super().__init__()
            self.order = np.random.default_rng(seed).permutation(4)

        def __len__(self):
            return 4

        def __getitem__(self, index):
            rows = slice(8 * self.order[index], 8 * self.order[index] + 8)
            return x[rows], y[rows]

    def batches():
        return ((x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8))

    elements, read = _made_by_python(x, y)
    ones = np.ones([32, 3]), np.ones([32, 1])
    slices = tf.data.Dataset.from_tensor_slices((x, y))
    undivided = {
        "arrays": (x, y),
        "data set": (slices.shuffle(32).batch(8),),
        "PyDataset": (Shuffled(0),),
        "generator": (batches(),),
        "from_generator": (elements.batch(8),),
        "py_function": (tf.data.Dataset.range(32).map(read).batch(8),),
    }
    divided = {
        "arrays": hvd.data.shard((x, y)),
        "data set": (hvd.data.shard(slices).batch(8),),
        "PyDataset": (hvd.data.shard(Shuffled(0)),),
        "generator": (hvd.data.shard(batches()),),
        "from_generator": (hvd.data.shard(elements).batch(8),),
        "py_function": (hvd.data.shard(tf.data.Dataset.range(32)).map(read).batch(8),),
        "constant": ones,
        "drawn": (slices.shuffle(32, seed=1 + rank).repeat().batch(8),),
        "of several orders": (hvd.data.shard(Shuffled(rank)),),
        "of unseeded shuffles": (slices.shuffle(32).shard(2, rank).batch(8),),
        "of unlike shuffles": (slices.shuffle(32, seed=1 + rank).shard(2, rank).batch(8),),
    }
    model = keras.Sequential([keras.layers.Input([3]), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse", run_eagerly=True)
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("hvdkit.model.same_data", "hvdkit.data.common_order")]
    for logger in loggers:
        logger.addHandler(handler)
    results = {}
    for kind, cases in ("undivided", undivided), ("divided", divided):
        for name, data in cases.items():
            said.clear()
            batch_size = 8 if len(data) > 1 else None
            model.fit(*data, batch_size=batch_size, steps_per_epoch=2 if name == "drawn" else None, verbose=0)
            results[kind, name] = [message[:40] for message in said]
    for logger in loggers:
        logger.removeHandler(handler)
    return results


def test_fit_warns_of_data_that_no_rank_has_divided(ranks):
    first, second = ranks(2, warned)
    assert not any(second.values()), "one rank says it"
    for (kind, name), said in first.items():
        expected = ["All 2 ranks train on the same data, so e"] if kind == "undivided" else []
        if name == "of several orders":
            expected = ["hvd.data.shard was given a PyDataset tha"]
        if name in ("of unseeded shuffles", "of unlike shuffles"):
            expected = ["The data are shuffled in another order o"]
        assert said == expected, (kind, name)
