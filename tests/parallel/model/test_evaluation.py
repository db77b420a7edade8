"""All ranks together evaluate and predict what one process does."""

import inspect

import numpy as np
import pytest

EXAMPLES = 41
BATCH = 4  # 11 batches, the last of one example: uneven over 2 ranks and over 3


def _data():
    generator = np.random.default_rng(2)
    labels = np.eye(3, dtype="float32")[generator.integers(3, size=EXAMPLES)]
    return generator.normal(size=(EXAMPLES, 5)).astype("float32"), labels, generator.random(EXAMPLES, "float32")


def _metrics():
    import keras

    class Scaled(keras.metrics.Metric):
        """A state that all ranks hold alike beside one that adds up, and one that only rank 0 is asked for."""

        def __init__(self):
            super().__init__(name="scaled")
            self.scale = self.add_variable((), "ones", aggregation="mean", name="scale")
            self.offset = self.add_variable((), "zeros", aggregation="only_first_replica", name="offset")
            self.total = self.add_variable((), "zeros", name="total")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.scale.assign(2.0)
            self.offset.assign(5.0)
            self.total.assign_add(keras.ops.sum(y_pred))

        def result(self):
            return self.total * self.scale + self.offset

    known = keras.metrics
    return [
        known.AUC(multi_label=True, num_labels=3, name="auc"),
        known.F1Score(average=None, name="f1"),
        known.TopKCategoricalAccuracy(2, name="top2"),
        known.OneHotMeanIoU(3, name="iou"),
        known.Precision(name="precision"),
        known.Recall(name="recall"),
        known.CosineSimilarity(name="cosine"),
        known.R2Score(name="r2"),
        known.RootMeanSquaredError(name="rmse"),
        known.SensitivityAtSpecificity(0.5, name="sensitivity"),
        Scaled(),
    ]


def _model(optimizer):
    import keras

    keras.utils.set_random_seed(4)
    inputs = keras.layers.Input([5])
    hidden = keras.layers.BatchNormalization(momentum=0.5)(keras.layers.Dense(8, activation="relu")(inputs))
    outputs = keras.layers.Dense(3, activation="softmax")(keras.layers.Dropout(0.5)(hidden))
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer, "categorical_crossentropy", metrics=_metrics(), weighted_metrics=["accuracy"], jit_compile=False
    )
    return model


def evaluated():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    world = hvd.init()
    x, y, weights = _data()
    model = _model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)))
    bounds = np.linspace(0, EXAMPLES**2, world.size + 1, dtype=int)
    mine = slice(*np.sqrt(bounds[[world.rank, world.rank + 1]]).astype(int))  # uneven on purpose
    history = model.fit(
        *(part[world.rank :: world.size][:12] for part in (x, y)),
        batch_size=BATCH,
        epochs=2,
        verbose=0,
        validation_data=(x[mine], y[mine]),
        callbacks=hvd.callbacks.standard(),
    )
    # After fit the averaged statistics are those of the last validation pass: nothing was trained since.
    cases = {"validation in fit": ({k[4:]: v[-1] for k, v in history.history.items() if k.startswith("val_")}, {})}
    cases["validation in fit"] = cases["validation in fit"][0], model.evaluate(x, y, verbose=0, return_dict=True)

    def both(name, *arguments, **options):
        ours = hvd.evaluate(model, *arguments, return_dict=True, **options)
        options.pop("callbacks", None)  # which would sum the metrics of all ranks here, too
        cases[name] = ours, model.evaluate(*arguments, return_dict=True, **{"verbose": 0, **options})

    dataset = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(BATCH)
    both("arrays", x, y, batch_size=BATCH)
    both("weights and steps", x, y, batch_size=BATCH, sample_weight=weights, steps=7)
    both("fewer batches than ranks", x[:3], y[:3], batch_size=BATCH)
    both("a data set", dataset)
    both(
        "a data set of unknown length", dataset.filter(lambda x, y, w: x[0, 0] > -9), callbacks=hvd.callbacks.standard()
    )
    as_list = hvd.evaluate(model, x, y), model.evaluate(x, y, verbose=0)
    return cases, as_list, _refused(world, model, x, y), [c.__name__ for c in _classes()], _every_metric(world)


def _refused(world, model, x, y):
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    # Each rank predicts one batch; they are padded to different lengths.
    anything = keras.Sequential([keras.layers.Input([None]), keras.layers.Activation("linear")])
    batches = [np.zeros((2, 7 + rank), "float32") for rank in range(world.size)]
    ragged = tf.data.Dataset.from_generator(lambda: batches, output_signature=tf.TensorSpec([None, None]))
    ragged = ragged.apply(tf.data.experimental.assert_cardinality(world.size))
    calls = {
        "shares": lambda: hvd.evaluate(model, x[world.rank :], y[world.rank :]),
        "nothing": lambda: hvd.predict(model, x[:0]),
        "rows of other lengths": lambda: hvd.predict(anything, ragged),
        "endless": lambda: hvd.predict(model, tf.data.Dataset.from_tensors(x).repeat()),
        "labels twice": lambda: hvd.evaluate(model, tf.data.Dataset.from_tensors((x, y)), y),
        "one rank": lambda: hvd.evaluate(model, x, y[: EXAMPLES - world.rank]),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except hvd.UsageError as error:
            messages[name] = str(error)
    return messages


def _classes():
    """Every metric that Keras has, but the base classes that compute nothing."""
    import keras

    found = [c for c in vars(keras.metrics).values() if inspect.isclass(c) and issubclass(c, keras.metrics.Metric)]
    return sorted(set(found) - {keras.metrics.Metric}, key=lambda c: c.__name__)


def _every_metric(world):
    """The value of each over uneven ranks, and over all examples in one process."""
    import keras

    from hvdkit.callbacks.metric_average import exact_metrics

    generator = np.random.default_rng(8)
    classes, binary = generator.integers(3, size=(2, 50)), generator.integers(2, size=50).astype("float32")
    probabilities = generator.dirichlet(np.ones(3), 50).astype("float32")
    one_hot = np.eye(3, dtype="float32")[classes[0]]
    numbers = generator.random(50, "float32")
    pairs = {"Accuracy": classes, "IoU": classes, "MeanIoU": classes, "Mean": (numbers,), "Sum": (numbers,)}
    several = ("Categorical", "OneHot", "F1", "FBeta", "TopK", "Cosine", "R2", "Concordance", "Pearson")
    arguments = {
        "IoU": {"num_classes": 3, "target_class_ids": [1]},
        "MeanIoU": {"num_classes": 3},
        "OneHotIoU": {"num_classes": 3, "target_class_ids": [1]},
        "OneHotMeanIoU": {"num_classes": 3},
        "MeanMetricWrapper": {"fn": keras.losses.mean_squared_error},
        "PrecisionAtRecall": {"recall": 0.5},
        "RecallAtPrecision": {"precision": 0.5},
        "SensitivityAtSpecificity": {"specificity": 0.5},
        "SpecificityAtSensitivity": {"sensitivity": 0.5},
    }

    class Holder(keras.Model):
        def __init__(self):
            super().__init__()
            self.tracked = [c(name=c.__name__, **arguments.get(c.__name__, {})) for c in _classes()]

        def update(self, rows):
            for metric in self.tracked:
                name = metric.name
                sparse = (
                    (classes[0], probabilities) if name.startswith("Sparse") else (binary[:, None], numbers[:, None])
                )
                default = (one_hot, probabilities) if name.startswith(several) else sparse
                metric.update_state(*(part[rows] for part in pairs.get(name, default)))

    ours, alone = Holder(), Holder()
    bounds = [0, 7, 50] if world.size == 2 else [0, 7, 18, 50]
    ours.update(slice(*bounds[world.rank : world.rank + 2]))
    alone.update(slice(None))
    return exact_metrics(ours), {m.name: np.asarray(m.result()) for m in alone.tracked}


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_metric_is_that_of_one_process(ranks, size):
    everyone = ranks(size, evaluated)
    for cases, (ours, alone), refused, names, (summed, expected) in everyone:
        for case, (together, plain) in cases.items():
            assert set(together) == set(plain)
            assert len(plain) == 13
            for name, value in plain.items():
                assert together[name] == pytest.approx(value, abs=1e-6, rel=1e-6), f"{case}: {name}"
        for value, plain in zip(ours, alone, strict=True):
            assert value == pytest.approx(plain, abs=1e-6, rel=1e-6)
        assert len(names) > 40
        for name in names:
            assert summed[name] == pytest.approx(expected[name], abs=1e-6, rel=1e-6), name
        assert "on rank 0 41 examples (2 steps) and on rank 1 40 examples (2 steps)" in refused["shares"]
        assert "nothing to work on: 0 examples" in refused["nothing"]
        assert "has rows of different shapes on the ranks: (7,), (8,)" in refused["rows of other lengths"]
        assert "infinite. Give steps=" in refused["endless"]
        assert "y and sample_weight go with arrays" in refused["labels twice"]
        assert "40 and 41 examples" in refused["one rank"]


def predicted():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    world = hvd.init()
    x, *_ = _data()
    keras.utils.set_random_seed(4)
    inputs = {"a": keras.layers.Input([5], name="a"), "b": keras.layers.Input([5], name="b")}
    both = keras.layers.concatenate(list(inputs.values()))
    norm = keras.layers.BatchNormalization()
    hidden = norm(both)
    outputs = {
        "pair": (keras.layers.Dense(2)(hidden), keras.layers.Reshape([5, 2])(hidden)),
        "half": keras.layers.Dense(1, dtype="float16")(hidden),
    }
    model = keras.Model(inputs, outputs)
    norm.moving_mean.assign(np.full(10, float(world.rank)))  # as ranks gather them: averaged before they are used
    results = {}
    for name, rows in {"all": EXAMPLES, "fewer than ranks": 1, "two batches": 5}.items():
        data = {"a": x[:rows], "b": -x[:rows]}
        results[name] = hvd.predict(model, data, batch_size=BATCH), model.predict(data, verbose=0)
    dataset = tf.data.Dataset.from_tensor_slices(({"a": x, "b": -x},)).batch(BATCH)
    results["a data set"] = hvd.predict(model, dataset), model.predict(dataset, verbose=0)
    results["steps"] = hvd.predict(model, dataset, steps=3), model.predict(dataset, steps=3, verbose=0)
    return {name: [keras.tree.flatten(side) for side in sides] for name, sides in results.items()}


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_predictions_come_whole_and_in_order(ranks, size):
    for results in ranks(size, predicted):
        for name, (ours, alone) in results.items():
            assert len(ours) == 3
            for mine, plain in zip(ours, alone, strict=True):
                assert mine.dtype == plain.dtype
                assert mine.shape == plain.shape, name
                assert np.abs(mine.astype("float64") - plain).max() < (1e-6 if mine.dtype != "float16" else 2e-3)
