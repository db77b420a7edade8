"""What Keras 2 had and Keras 3 has not is answered with what to write instead."""

import keras
import pytest

from hvdkit.compat import keras2


@pytest.fixture
def model():
    keras2.explain_in_keras()
    keras2.explain_in_keras()  # a second time changes nothing
    yield keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    keras2.leave_keras_alone()
    assert not hasattr(keras.Model, "fit_generator")
    with pytest.raises(ValueError, match="not recognized"):  # Keras' own words
        keras.optimizers.SGD(lr=0.1)
    with pytest.raises(ImportError, match="TF_USE_LEGACY_KERAS"):
        keras.optimizers.legacy.SGD()


def test_arguments_of_compile(model):
    with pytest.raises(TypeError, match=r"does not take experimental_run_tf_function: Leave it out"):
        model.compile("sgd", "mse", experimental_run_tf_function=False)
    model.compile("sgd", "mse", metrics=["mae"])
    assert model.compiled
    assert type(model).from_config(model.get_config()).name == model.name


def test_methods_of_models(model):
    with pytest.raises(AttributeError, match=r"have no fit_generator. Write model.fit\(\.\.\.\), which takes"):
        model.fit_generator()
    assert not hasattr(model, "predict_generator")


@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop", "Adadelta"])
def test_the_old_name_of_the_learning_rate(model, name):
    make = getattr(keras.optimizers, name)
    with pytest.raises(ValueError, match=r"does not take lr: Write learning_rate=\.\.\. instead"):
        make(lr=0.1)
    assert float(keras.ops.convert_to_numpy(make(learning_rate=0.25).learning_rate)) == 0.25


@pytest.mark.parametrize("name", ["Adam", "SGD", "Optimizer"])
def test_legacy_optimizers(model, name):
    with pytest.raises(ImportError, match=r"no keras\.optimizers\.legacy\. Write keras\.optimizers\.SGD\(\.\.\.\) for"):
        getattr(keras.optimizers.legacy, name)(0.1)


def test_models_still_load_compiled(model, tmp_path):
    model.compile("sgd", loss="mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, keras.optimizers.SGD)
