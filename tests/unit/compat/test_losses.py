"""What losses of Keras reduce, and by what they divide. Run on each supported Keras by tests/versions.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdkit.compat import losses
from hvdkit.compat.lookup import MissingNameError

MASK = np.array([[True, True, False], [True, False, False]])
WEIGHTS = np.array([[1.0, 2.0, 3.0], [0.5, 0.25, 4.0]], "float32")
MEANS = ("sum_over_batch_size", "mean_with_sample_weight")


@pytest.fixture
def reduced():
    """What losses reduce, in order, as `Elements`."""
    found = []

    def reduce(elements, keras_result):
        found.append(elements)
        return keras_result()

    original = losses.reduction_of_keras()
    restore = losses.replace_reduction(reduce)
    yield found
    restore()
    assert losses.reduction_of_keras() is original


def called(reduction, mask=None, weights=None):
    """The result of a loss for values 0 to 5, [2, 3]."""
    predictions = tf.reshape(tf.range(6.0), [2, 3, 1])
    if mask is not None:
        predictions._keras_mask = tf.constant(mask)
    loss = keras.losses.MeanAbsoluteError(reduction=reduction)
    return loss(tf.zeros([2, 3, 1]), predictions, weights)


@pytest.mark.parametrize("reduction", MEANS)
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("weights", [None, WEIGHTS, WEIGHTS[:, :1]])
def test_the_denominator_is_what_keras_divides_by(reduced, reduction, mask, weights):
    result = called(reduction, mask, weights)
    (elements,) = reduced
    assert (elements.is_reduced, elements.is_summed, elements.reduction) == (False, False, reduction)
    counts_some = mask is not None or (weights is not None and reduction == "mean_with_sample_weight")
    assert elements.counts_some is counts_some
    given = (1 if weights is None else weights) * (1 if mask is None else mask) * np.ones([2, 3])
    total = np.sum(np.arange(6).reshape([2, 3]) * given)
    np.testing.assert_allclose(elements.values, np.arange(6).reshape([2, 3]))
    np.testing.assert_allclose(total / elements.denominator(), result, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none", None])
def test_sums_have_no_denominator(reduced, reduction):
    called(reduction, MASK)
    assert [e.is_summed for e in reduced] == [True]


def test_labels_to_ignore_are_a_mask(reduced):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=9)
    loss(tf.constant([[1, 9, 9], [0, 1, 9]]), tf.zeros([2, 3, 2]))
    (elements,) = reduced
    assert elements.counts_some
    assert float(elements.denominator()) == 3


def test_a_loss_that_returns_one_number_is_known(reduced):
    class Mean(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return keras.ops.mean(y_pred - y_true)

    assert float(Mean()(tf.zeros([2, 1]), tf.ones([2, 1]))) == 1
    assert [e.is_reduced for e in reduced] == [True]


def test_the_result_of_a_replacement_is_the_loss():
    restore = losses.replace_reduction(lambda elements, keras_result: 2 * keras_result())
    try:
        assert float(called("sum")) == 2 * 15
        model = keras.Sequential([keras.Input([3]), keras.layers.Identity()])
        model.compile("sgd", loss="mae")
        assert model.evaluate(np.ones([4, 3]), np.zeros([4, 3]), verbose=0) == 2
    finally:
        restore()


def test_a_renamed_function_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(losses, "_FUNCTION", "_gone")
    with pytest.raises(MissingNameError, match="_gone"):
        losses.replace_reduction(lambda elements, keras_result: None)
