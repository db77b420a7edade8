"""What the planner is told of a model that is divided."""

import keras
import pytest
from keras import layers

from hvdkit.parallel import divisions


def test_a_pair_of_dense_layers_sends_its_output_and_its_inputs_gradient():
    model = keras.Sequential(
        [layers.Input([4]), layers.Dense(8, "relu"), layers.Dense(6, "relu"), layers.Dense(3), layers.Softmax()]
    )
    found = divisions(model)
    assert found["tensor"] == {"stages": False, "share": pytest.approx(94 / 115), "bytes": 4 * (6 + 4), "exchanges": 2}
    assert found["pipeline"] == {"stages": True, "share": 1.0, "bytes": 4 * 8}


def test_a_model_of_its_own_class_is_not_divided():
    class Own(keras.Model):
        def call(self, x):
            return x

    assert divisions(Own()) == {}
