"""Parts of a model, and copies of them."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import layers

from hvdkit.errors import UsageError
from hvdkit.parallel import graph, whole_model
from hvdkit.parallel.pipeline import even_cuts


class _Scaled(layers.Layer):
    """A user's layer with a name of Keras' own, and a weight."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, shape):
        self.scale = self.add_weight(shape=[shape[-1]], initializer="random_normal", name="scale")

    def call(self, x):
        return x * self.scale * self.factor

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


_Scaled.__name__ = "Rescaling"


def _model():
    x = begin = layers.Input([4])
    x = layers.Dense(5, activation="tanh", name="first")(x)
    x = middle = layers.BatchNormalization(name="normal")(x)
    inner = keras.Sequential([layers.Input([5]), _Scaled(3.0, name="inner_scale"), layers.Dense(5)], name="inner")
    x = layers.Dropout(0.5, seed=3, name="drop")(inner(x) + x)
    return keras.Model(begin, layers.Dense(2, name="last")(x)), middle


def test_a_copy_of_a_part_computes_the_same_and_needs_nothing_of_the_model():
    model, middle = _model()
    for weight in model.weights:
        weight.assign(np.random.default_rng(1).normal(size=weight.shape) ** 2)
    data = np.random.default_rng(2).normal(size=[3, 5]).astype("float32")
    part = graph.between([middle], [model.outputs[0]], "behind")
    copy = graph.Copies().of(part)
    assert copy.name == "behind"
    assert [w._hvdkit_path for w in copy.weights] == [w.path for w in part.weights]
    for training in (False, True):  # with dropout, from a generator in the same state
        np.testing.assert_allclose(copy(data, training=training), part(data, training=training), rtol=1e-6)
    first = weakref.ref(model.get_layer("first").kernel.value)
    own = weakref.ref(copy.get_layer("last").kernel.value)
    del model, middle, part, weight
    gc.collect()
    assert (first() is None, own() is None) == (True, False)


def _two_with(shared):
    inputs = [layers.Input([4]) for _ in range(2)]
    return [graph.between([x], [shared(x)], f"part{number}") for number, x in enumerate(inputs)]


def test_a_layer_in_two_parts_is_copied_once():
    shared = layers.Dense(4, name="shared")
    one, two = _two_with(shared)
    copies = graph.Copies()
    one, two = copies.of(one), copies.of(two)
    assert one.get_layer("shared") is two.get_layer("shared")
    assert one.get_layer("shared") is not shared


def test_a_weight_in_two_ranks_parts_is_refused():
    parts = _two_with(layers.Dense(4, name="shared"))
    with pytest.raises(UsageError, match=r"'shared/kernel' is used in the parts 'part0' and 'part1'"):
        graph.refuse_shared(parts)
    graph.refuse_shared(parts[:1])


def test_what_cannot_be_divided_is_refused():
    inputs = layers.Input([None, 4], name="of_any_length")
    model = keras.Model(inputs, layers.Dense(2)(layers.Activation("relu")(inputs)), name="m")
    with pytest.raises(UsageError, match=r"all sizes except the batch must be known"):
        graph.refuse_unknown_sizes(model, model.inputs)
    idle = graph.between(model.inputs, [model.layers[1].output], "stage0")
    with pytest.raises(UsageError, match=r"leaves 'stage0' without a weight to train"):
        graph.refuse_idle("stage0", [idle])
    tokens = layers.Input([3], dtype="int32")
    masked = layers.Embedding(5, 4, mask_zero=True)(tokens)
    with pytest.raises(UsageError, match=r"which has a mask"):
        graph.refuse_masks(model, [masked])
    places = [layers.Input([4]) for _ in range(2)]
    blocks = [keras.Model(x, layers.Dense(4, name="up")(x)) for x in places]
    twice = keras.Sequential([layers.Input([4]), *blocks], name="twice")
    with pytest.raises(UsageError, match=r"Two weights of the model 'twice' have the path 'up/kernel'"):
        whole_model.remember(twice, twice)


def test_each_stage_has_weights_to_train():
    names = ["a", "b", "c"]
    dense = [layer for n in names for layer in (layers.Dense(4, name=n), layers.Activation("relu", name=f"{n}_relu"))]
    model = keras.Sequential([layers.Input([4]), layers.Rescaling(0.5), *dense, layers.Dropout(0.5)])
    functional = graph.functional(model)
    assert even_cuts(functional, 3) == ["a", "b"]
    with pytest.raises(UsageError, match="has 2 possible cuts .* too few for 4 stages"):
        even_cuts(functional, 4)
