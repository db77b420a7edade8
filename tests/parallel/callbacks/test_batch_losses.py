"""An evaluation on ranks, each with its part of each batch, shows the loss of one process, also where it is no mean."""

import numpy as np
import pytest

BATCH, TIME = 4, 5
EXAMPLES = [13, 8, 6]  # of each rank: batches of 4, 4, 4, 1 and of 4, 4 and of 4, 2


def _data(ranks):
    """For each rank x, labels and weights; the ranks count different amounts."""
    parts = []
    for rank, examples in enumerate(EXAMPLES[:ranks]):
        generator = np.random.default_rng(rank)
        x = generator.normal(1, 1, [examples, TIME, 3]).astype("float32")
        lengths = generator.integers(rank + 1, 2 * rank + 4, examples)
        hidden = np.arange(TIME) >= lengths[:, None]
        x[hidden] = 0
        labels = np.where(hidden, 255, generator.integers(3, size=hidden.shape))
        parts.append((x, labels, generator.uniform(0.2, 1, hidden.shape).astype("float32") * (rank + 1)))
    return parts


def _data_set(parts, losses=1):
    """The batches of one process: those of one number, of all parts, one after another, for so many losses."""
    import tensorflow as tf

    batches = []
    for start in range(0, max(len(x) for x, *_ in parts), BATCH):
        of_all = zip(*parts, strict=True)
        x, *others = (np.concatenate([part[start : start + BATCH] for part in of_one]) for of_one in of_all)
        batches.append((x, *(other if losses == 1 else (other,) * losses for other in others)))
    # In the metric of each loss, Keras weighs batches of unknown size alike, and the end of data of unknown length
    # counts as one more batch.
    specs = tf.nest.map_structure(lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), batches[0])
    data = tf.data.Dataset.from_generator(lambda: batches, output_signature=specs)
    return data if losses == 1 else data.apply(tf.data.experimental.assert_cardinality(len(batches)))


def _cases(keras):
    """By name: outputs of the model, losses for them, and options of `compile`."""
    dense = keras.layers.Dense

    def classes(x):
        return dense(3)(x)

    def ignoring(**options):
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255, **options)

    def two(x):
        return [dense(3, name="a")(x), dense(3, kernel_regularizer="l2", name="b")(x)]

    by_weights = ignoring(reduction="mean_with_sample_weight")
    return {
        "by weights, eager": (classes, by_weights, {"run_eagerly": True}),
        "a mask": (lambda x: dense(3)(keras.layers.Masking(0.0)(x)), ignoring(), {"steps_per_execution": 2}),
        "a sum, compiled": (classes, ignoring(reduction="sum"), {"jit_compile": True}),
        "two losses": (two, [ignoring(), ignoring(reduction="sum")], {"loss_weights": [0.3, 2.0]}),
        "a plain mean": (classes, keras.losses.SparseCategoricalCrossentropy(from_logits=True), {}),
    }


SHORT = ["a mask", "two losses", "a plain mean"]


def evaluated(names=None):
    """By case, what ranks and one process show; and of how many losses something is noted."""
    import keras

    import hvdkit as hvd
    from hvdkit.callbacks import batch_losses

    me = hvd.init()
    room, batch_losses._ROOM = batch_losses._ROOM, 2  # so that it grows
    found = {}
    for name in names or _cases(keras):
        outputs, losses, options = _cases(keras)[name]
        parts = _data(me.size)
        if name == "a plain mean":
            parts = [(x, labels % 3, weights) for x, labels, weights in parts]
        keras.utils.set_random_seed(1)
        inputs = keras.Input([TIME, 3])
        model = keras.Model(inputs, outputs(keras.layers.Dense(4, "tanh")(inputs)))
        model.compile(
            hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), loss=losses, **{"jit_compile": False, **options}
        )
        number = 2 if name == "two losses" else 1
        mine, average = _data_set([parts[me.rank]], number), hvd.callbacks.MetricAverageCallback()
        model.evaluate(mine, verbose=0)  # without the callback, so nothing is noted
        ours = [model.evaluate(mine, verbose=0, callbacks=[average], return_dict=True) for _ in range(2)]
        alone = model.evaluate(_data_set(parts, number), verbose=0, return_dict=True)
        found[name] = alone, ours, len(batch_losses.of(model)._rows)
    batch_losses._ROOM = room
    return found, _in_fit(hvd, keras, _data(me.size), me)


def _in_fit(hvd, keras, parts, me):
    """The validation loss in `fit`, and that of one process with the final weights."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Input([TIME, 3]), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss=loss, jit_compile=False)
    parts = [(x, labels) for x, labels, _ in parts]
    x, labels = parts[me.rank]
    how = {"batch_size": BATCH, "verbose": 0, "callbacks": [hvd.callbacks.MetricAverageCallback()]}
    shown = model.fit(x[:BATCH], labels[:BATCH], validation_data=(x, labels), **how).history["val_loss"][-1]
    alone = model.evaluate(_data_set(parts), verbose=0)
    return shown, alone


@pytest.mark.parametrize(("size", "names"), [(2, SHORT), pytest.param(3, None, marks=pytest.mark.slow)])
def test_an_evaluation_shows_the_loss_of_one_process(ranks, size, names):
    for found, (shown, alone) in ranks(size, evaluated, names=names):
        assert len(found) == len(names or range(5))
        for name, (expected, both, _) in found.items():
            for ours in both:
                assert ours == {key: pytest.approx(value, rel=1e-5) for key, value in expected.items()}, name
        assert {name: noted for name, (*_, noted) in found.items() if noted != 1} == {
            "two losses": 2,
            "a plain mean": 0,
        }
        assert shown == pytest.approx(alone, rel=1e-5)
