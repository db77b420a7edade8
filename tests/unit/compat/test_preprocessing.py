"""What Keras' layers learn in `adapt`: where it is, and that the layer uses what is put there."""

import gc
import pickle

import keras
import numpy as np
import pytest

from hvdkit.compat import preprocessing
from hvdkit.compat.preprocessing import LEARNING, can_learn, give_learnt, learnt

NUMBERS = np.random.default_rng(0).normal(4.0, 2.0, size=[50, 2]).astype("float32")
WORDS = np.array([["b", "a"], ["c", "b"], ["b", "a"]])
LAYERS = {
    "Normalization": (lambda: keras.layers.Normalization(), NUMBERS),
    "Discretization": (lambda: keras.layers.Discretization(num_bins=3), NUMBERS),
    "StringLookup": (lambda: keras.layers.StringLookup(num_oov_indices=2, mask_token=""), WORDS),
    "StringLookup, inverted": (lambda: keras.layers.StringLookup(invert=True), WORDS),
    "IntegerLookup": (lambda: keras.layers.IntegerLookup(), np.array([[3, 5], [5, 9]])),
    "TextVectorization": (lambda: keras.layers.TextVectorization(output_mode="tf_idf"), WORDS[:, 0]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_learnt_is_none_before_and_complete_after(name):
    make, data = LAYERS[name]
    layer = make()
    assert isinstance(layer, LEARNING)
    before = learnt(layer)
    assert all(value is None or len(value) == 0 for value in before.values())
    layer.adapt(data)
    after = pickle.loads(pickle.dumps(learnt(layer)))
    assert after.keys() == before.keys()
    if "vocabulary" in after:
        expected = layer.get_vocabulary(include_special_tokens=False)
        assert [t.decode() if isinstance(t, bytes) else t for t in after["vocabulary"]] == list(expected)
    if "idf_weights" in after:
        assert len(after["idf_weights"]) == len(layer.get_vocabulary())
    if name == "Normalization":
        np.testing.assert_allclose(after["mean"].ravel(), NUMBERS.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(after["variance"].ravel(), NUMBERS.var(axis=0), rtol=1e-5)


def test_a_layer_that_was_given_what_it_would_learn_cannot_learn():
    layers = keras.layers
    given = [
        layers.Normalization(mean=0.0, variance=1.0),
        layers.Discretization(bin_boundaries=[0.5]),
        layers.StringLookup(vocabulary=["a"]),
        layers.TextVectorization(vocabulary=["a"]),
        layers.Dense(1),
    ]
    assert not any(map(can_learn, given))
    assert all(can_learn(make()) for make, _ in LAYERS.values())


@pytest.mark.parametrize("name", ["Normalization", "Discretization"])
def test_a_layer_computes_with_the_numbers_that_it_is_given(name):
    make, data = LAYERS[name]
    one, other = make(), make()
    one.adapt(data)
    other.adapt(2 * data - 1)
    assert not np.array_equal(one(data), other(data))
    give_learnt(other, learnt(one))
    np.testing.assert_array_equal(one(data), other(data))


def test_layers_are_known_once_they_are_adapted_and_as_long_as_they_are_used():
    before = {kind: kind.adapt for kind in LEARNING}
    preprocessing.watch()
    preprocessing.watch()
    try:
        layers = [make() for make, _ in LAYERS.values()]
        for layer, (_, data) in zip(layers, LAYERS.values(), strict=True):
            layer.adapt(data)
            layer.adapt(data)
        assert [id(layer) for layer in preprocessing.adapted()] == [id(layer) for layer in layers]
        del layers[1:], layer
        gc.collect()
        assert [id(layer) for layer in preprocessing.adapted()] == [id(layers[0])]
    finally:
        preprocessing.stop_watching()
    assert preprocessing.adapted() == []
    assert {kind: kind.adapt for kind in LEARNING} == before
    keras.layers.Normalization().adapt(NUMBERS)
    assert preprocessing.adapted() == []
