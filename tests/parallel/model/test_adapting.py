"""Layers that learn in `adapt`: from the data of all ranks what one process learns, and the same on all ranks."""

import contextlib
import logging

import numpy as np

WORDS = [f"w{number}" for number in range(12)]


@contextlib.contextmanager
def _warnings():
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hvdkit.model.same_layers").addHandler(handler)
    yield said
    logging.getLogger("hvdkit.model.same_layers").removeHandler(handler)


def learnt_together():
    """For each kind of layer, what `hvd.adapt` learns from unequal parts, and what a layer learns from all data."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.compat.preprocessing import learnt

    world = hvd.init()
    layers = keras.layers
    generator = np.random.default_rng(3)
    numbers = generator.normal(1e3, 5.0, size=[700, 3]).astype("float32")
    # Many tokens have the same count, so that their order counts.
    tokens = np.array(WORDS)[generator.integers(len(WORDS), size=[90, 4])]
    texts = np.array([" ".join(row) for row in tokens])

    def part(array):
        """Rank 1 has a sixth of the rest."""
        third = len(array) * 5 // 6
        return array[:third] if world.rank == 0 else array[third:]

    def batched(array, size=16):
        return tf.data.Dataset.from_tensor_slices(array).batch(size)

    cases = {
        "normalization": (layers.Normalization, numbers, lambda a: a),
        "normalization of batches": (layers.Normalization, numbers, batched),
        "normalization of batches with labels": (
            lambda: layers.Normalization(axis=None),
            numbers,
            lambda a: batched((a, a)),
        ),
        "normalization of pictures": (
            lambda: layers.Normalization(axis=(1, 3)),
            numbers.reshape([-1, 5, 2, 3]),
            lambda a: a,
        ),
        "texts": (lambda: layers.TextVectorization(max_tokens=9), texts, batched),
        "n-grams": (lambda: layers.TextVectorization(ngrams=2, output_mode="count"), texts, lambda a: a),
        "weighted texts": (
            lambda: layers.TextVectorization(max_tokens=9, output_mode="tf_idf", pad_to_max_tokens=True),
            texts,
            batched,
        ),
        "strings": (lambda: layers.StringLookup(num_oov_indices=2, mask_token="w1", max_tokens=8), tokens, batched),
        "integers": (
            lambda: layers.IntegerLookup(output_mode="multi_hot"),
            generator.integers(20, size=[60, 2]),
            lambda a: a,
        ),
        "bins": (lambda: layers.Discretization(num_bins=7), numbers, lambda a: a),
        "few bins": (lambda: layers.Discretization(num_bins=2), numbers[:9], lambda a: a),
        "fine bins": (lambda: layers.Discretization(num_bins=50, epsilon=0.003), numbers, lambda a: a),
    }
    pairs = {}
    for name, (make, data, form) in cases.items():
        together, alone = make(), make()
        hvd.adapt(together, form(part(data)))
        alone.adapt(form(data))
        pairs[name] = learnt(together), learnt(alone)
    together = layers.Discretization(num_bins=4)
    hvd.adapt(together, batched(part(numbers[:, 0])))
    quantiles = np.searchsorted(np.sort(numbers[:, 0]), together.bin_boundaries) / len(numbers)

    features = {"a": numbers[:90, 0], "b": tokens[:, 0], "c": numbers[:90, 1]}
    kinds = {"a": "float_normalized", "b": "string_categorical", "c": "float_discretized"}
    spaces = [keras.utils.FeatureSpace(dict(kinds), output_mode="concat") for _ in range(2)]
    hvd.adapt(spaces[0], {name: part(array) for name, array in features.items()})
    spaces[1].adapt(features)
    for name in ("a", "b"):
        pairs[f"feature {name}"] = tuple(learnt(space.preprocessors[name]) for space in spaces)

    def model():
        inputs = {"x": keras.Input([3], name="x"), "text": keras.Input([1], dtype="string", name="text")}
        scaled = layers.Rescaling(0.5, 3.0)(inputs["x"])
        inner = keras.Sequential([layers.Input([3]), layers.Normalization(name="inner")], name="nested")
        numbers = inner(layers.Normalization(name="outer", mean=1.0, variance=4.0)(scaled))
        words = layers.TextVectorization(output_mode="multi_hot", max_tokens=6, name="words")(inputs["text"])
        return keras.Model(inputs, [numbers, words])

    data = {"x": numbers[:90], "text": texts[:, None]}
    for name, form in (("arrays", lambda a: a), ("batches", lambda a: batched((a, a["x"])))):
        adapted = model()
        hvd.adapt(adapted, form({key: part(array) for key, array in data.items()}))
        expected = layers.Normalization()
        expected.adapt((numbers[:90] * 0.5 + 3.0 - 1.0) / 2.0)
        inner = adapted.get_layer("nested").get_layer("inner")
        pairs[f"inside a model, of {name}"] = learnt(inner), learnt(expected)
        assert len(adapted.get_layer("words").get_vocabulary()) == 6

    refused = []
    plain = keras.Sequential([layers.Input([3]), layers.Dense(1)])
    static = layers.Normalization(mean=0.0, variance=1.0)
    for layer in (plain, layers.Dense(1), static, keras.Sequential([layers.Normalization()])):
        try:
            hvd.adapt(layer, numbers)
        except hvd.UsageError as error:
            refused.append(str(error))
    return pairs, quantiles, refused


def test_all_ranks_learn_what_one_process_learns(ranks):
    check_what_was_learnt(ranks(2, learnt_together))


def check_what_was_learnt(results):
    """Check what two ranks return from `learnt_together`."""
    for pairs, quantiles, refused in results:
        for name, (together, alone) in pairs.items():
            assert together.keys() == alone.keys()
            for what, value in together.items():
                if what == "vocabulary" or what == "bin_boundaries":
                    assert list(value) == list(alone[what]), f"{what} of {name}"
                else:
                    np.testing.assert_allclose(value, alone[what], rtol=1e-4, err_msg=f"{what} of {name}")
        np.testing.assert_allclose(quantiles, [0.25, 0.5, 0.75], atol=0.011)
        assert len(refused) == 4
        assert "no layer that learns" in refused[0]
        assert "does not know how to combine what Dense learns" in refused[1]
        assert "nothing to adapt" in refused[2]
        assert "not a functional model, or not built" in refused[3]
    bits = [{n: str(together) for n, (together, _) in pairs.items()} for pairs, *_ in results]
    assert bits[0] == bits[1], "all ranks have the same bits"


def trained_after_adapting():
    """What `fit` says of layers that were adapted, configured or filled in several ways, and what it predicts."""
    import keras

    import hvdkit as hvd

    world = hvd.init()
    layers = keras.layers
    generator = np.random.default_rng(world.rank)
    inputs = generator.normal(10.0 * world.rank, 1.0 + world.rank, size=[64, 3]).astype("float32")
    common = np.random.default_rng(9).normal(3.0, size=[64, 3]).astype("float32")
    words = ["a b", "b c"] if world.rank == 0 else ["a b", "c c"]

    class Holding(layers.Layer):
        def __init__(self, values):
            super().__init__()
            self.values = np.asarray(values, "float32")

        def call(self, x):
            return x * self.values

    def fit(*first, kept=()):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([layers.Input([3]), *first, layers.Dense(1)])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), loss="mse", run_eagerly=True)
        with _warnings() as said:
            try:
                model.fit(inputs, inputs[:, :1], batch_size=32, verbose=0)
            except hvd.UsageError as error:
                return str(error), None
        return said, model.predict(common, verbose=0)

    def normalization(adapt, *data):
        layer = layers.Normalization()
        adapt(layer, *data)
        return layer

    def keras_own(layer, data):
        layer.adapt(data)

    found = {
        "own part": fit(normalization(keras_own, inputs)),
        "together": fit(normalization(hvd.adapt, inputs)),
        "another order": fit(normalization(keras_own, np.roll(common, world.rank * 7, axis=0))),
        "seeds": fit(layers.Dropout(0.1, seed=world.rank)),
        "other rate": fit(layers.Dropout(0.1 + 0.2 * world.rank)),
        "other policy": fit(layers.Dense(3, dtype=["float32", "mixed_bfloat16"][world.rank])),
        "own array": fit(Holding([1 + world.rank, 2, 3])),
        "common array": fit(Holding([1, 2, 3])),
    }
    vectorize = layers.TextVectorization()
    vectorize.adapt(np.array(words))
    found["pipeline"] = fit()
    hvd.adapt(vectorize, np.array(words))
    found["pipeline together"] = fit()
    return found, vectorize.get_vocabulary()


def test_fit_trains_one_model_or_says_which_layer_differs(ranks):
    check_what_fit_says(ranks(2, trained_after_adapting))


def check_what_fit_says(results):
    """Check what two ranks return from `trained_after_adapting`."""
    (first, vocabulary), (second, other) = results
    assert list(vocabulary) == list(other) == ["", "[UNK]", "c", "b", "a"]
    for found in (first, second):
        refusal, _ = found.pop("own part")
        assert "(Normalization) has another mean on rank(s) 1 than on rank 0" in refusal
        assert "hvd.adapt(layer, data)" in refusal
        refusal, _ = found.pop("pipeline")
        assert "(TextVectorization) has another vocabulary on rank(s) 1" in refusal
        warned = {
            "other rate": "(Dropout) has another rate on rank(s) 1 than on rank 0",
            "other policy": "(Dense) has another dtype on",
            "own array": "(Holding) has another values on",
        }
        for name, (said, _) in found.items():
            assert len(said) == (name in warned), f"{name}: {said}"
            assert warned.get(name, "") in str(said)
    for name in ("together", "another order", "seeds", "common array", "pipeline together"):
        np.testing.assert_array_equal(first[name][1], second[name][1], err_msg=name)
