"""A warning for data that no rank has divided, of each kind, and none for those that are."""

import logging

import numpy as np


def warned():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    rank = hvd.init().rank
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

    ones = np.ones([32, 3]), np.ones([32, 1])
    slices = tf.data.Dataset.from_tensor_slices((x, y))
    undivided = {
        "arrays": (x, y),
        "data set": (slices.shuffle(32).batch(8),),
        "PyDataset": (Shuffled(0),),
        "generator": (batches(),),
    }
    divided = {
        "arrays": hvd.data.shard((x, y)),
        "data set": (hvd.data.shard(slices).batch(8),),
        "PyDataset": (hvd.data.shard(Shuffled(0)),),
        "generator": (hvd.data.shard(batches()),),
        "constant": ones,
        "drawn": (slices.shuffle(32, seed=1 + rank).repeat().batch(8),),
        "of several orders": (hvd.data.shard(Shuffled(rank)),),
    }
    model = keras.Sequential([keras.layers.Input([3]), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse", run_eagerly=True)
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hvdkit.model.same_data").addHandler(handler)
    results = {}
    for kind, cases in ("undivided", undivided), ("divided", divided):
        for name, data in cases.items():
            said.clear()
            batch_size = 8 if len(data) > 1 else None
            model.fit(*data, batch_size=batch_size, steps_per_epoch=2 if name == "drawn" else None, verbose=0)
            results[kind, name] = [message[:40] for message in said]
    logging.getLogger("hvdkit.model.same_data").removeHandler(handler)
    return results


def test_fit_warns_of_data_that_no_rank_has_divided(ranks):
    first, second = ranks(2, warned)
    assert not any(second.values()), "one rank says it"
    for (kind, name), said in first.items():
        expected = ["All 2 ranks train on the same data, so e"] if kind == "undivided" else []
        if name == "of several orders":
            expected = ["hvd.data.shard was given a PyDataset tha"]
        assert said == expected, (kind, name)
