"""The model of --model: found, built, and checked against the data."""

import dataclasses
import fractions

import hvdkit_models
import keras
import numpy as np
import pytest
import tensorflow as tf
from hvdkit_models.recipe import Recipe

from hvdkit.errors import UsageError
from hvdkit.train import flags as train_flags
from hvdkit.train.build import (
    ModelSource,
    build_model,
    check_batch,
    check_kind,
    check_loss,
    check_output,
    check_savable,
    ends_in,
    find_model,
    make_optimizer,
)
from tests.unit.train.small_models import small, two_outputs


def parse(*flags):
    return train_flags.parse(["train", *flags])


def _with(**changes):
    return dataclasses.replace(parse(), **changes)


@pytest.mark.parametrize("name", hvdkit_models.names())
def test_every_model_builds_and_has_a_recipe_and_its_command(name):
    source = find_model(name)
    assert all(isinstance(recipe, Recipe) for recipe in source.recipes)
    given = {"input_shape": (32, 32, 3), "num_classes": 7, "vocabulary_size": 50, "sequence_length": 12}
    inputs = np.ones([2, 12], "int32") if source.kind in ("text", "tokens") else np.ones([2, 32, 32, 3])
    if source.kind == "features":
        given |= {"input_shape": (3,), "feature_mean": (1.0, 2.0, 3.0), "feature_variance": (1.0, 4.0, 9.0)}
        inputs = np.ones([2, 3], "float32")
    model = build_model(source, given)
    assert model(inputs).shape == {"gpt": (2, 12, 50), "detector": (2, 16, 4 + 7)}.get(name, (2, 7))
    header = hvdkit_models.load(name).__doc__
    assert f"launch/local.sh -np 2 --model={name}" in header
    assert "hvdkit" not in header.replace("launch/local.sh", "")


def test_a_model_of_other_data_is_refused_and_another_named():
    check_kind(find_model("mnist_mlp"), "image", "digits")
    check_kind(ModelSource("mine", dict, ()), "features", "x.csv")
    with pytest.raises(UsageError, match=r"mnist_mlp learns from images, but x.csv has columns of .*=tabular_mlp, or"):
        check_kind(find_model("mnist_mlp"), "features", "x.csv")
    with pytest.raises(UsageError, match=r"--model=branch_cnn or cifar_cnn or mnist_mlp or resnet, or one of your own"):
        check_kind(find_model("gpt"), "image", "digits")


def test_a_tabular_model_takes_raw_features_and_gives_values_in_their_unit(tmp_path):
    given = {"input_shape": (2,), "num_classes": 1, "feature_mean": (1e6, 5.0), "feature_variance": (4.0, 1.0)}
    given |= {"label_mean": (300.0,), "label_variance": (100.0,)}
    keras.utils.set_random_seed(0)
    model = build_model(find_model("tabular_mlp"), given, {"dropout": 0.1})
    inputs = np.float32([[1e6, 5], [1e6 + 2, 6]])
    inside = keras.Model(model.input, model.get_layer("standardize").output)
    np.testing.assert_allclose(inside(inputs), [[0, 0], [1, 1]], atol=1e-6)
    assert model(inputs).numpy()[0, 0] == 300, "the mean, since biases are 0"
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(inputs), model(inputs))
    keras.config.set_dtype_policy("mixed_float16")
    try:
        assert np.isfinite(build_model(find_model("tabular_mlp"), given)(inputs)).all(), "raw values exceed 16 bits"
    finally:
        keras.config.set_dtype_policy("float32")


def test_the_models_have_the_sizes_they_should():
    shapes = {
        "mnist_mlp": ((28, 28, 1), 109_386),
        "cifar_cnn": ((32, 32, 3), 136_886),
        "resnet": ((32, 32, 3), 274_042),
    }
    for name, (shape, parameters) in shapes.items():
        assert hvdkit_models.load(name).build(shape, 10).count_params() == parameters
    assert hvdkit_models.load("resnet").build((224, 224, 3), 1000).count_params() == 25_636_712
    branches = hvdkit_models.load("branch_cnn").build((28, 28, 1), 10, branches=3)
    assert sum("conv0" in layer.name for layer in branches.layers) == 3
    assert hvdkit_models.load("branch_cnn").build((8, 8, 1), 10)(np.ones([1, 8, 8, 1])).shape == (1, 10)


USER_MODEL = """
import keras

def plain():
    return keras.Sequential([keras.layers.Input([8, 8, 1]), keras.layers.Flatten(), keras.layers.Dense(10)])

def greedy(input_shape, colour):
    return plain()

def nothing():
    return 3

def broken():
    return keras.Sequential(12)
"""


def test_a_users_own_model(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_MODEL)
    source = find_model(f"{path}:plain")
    given = {"input_shape": (8, 8, 1), "num_classes": 10}
    assert source.name == "mine"
    assert build_model(source, given).count_params() == 650
    with pytest.raises(UsageError, match="needs the argument 'colour'"):
        build_model(find_model(f"{path}:greedy"), given)
    with pytest.raises(UsageError, match=r"The model mine cannot be built: TypeError: .* \(line \d+ of "):
        build_model(find_model(f"{path}:broken"), given)
    with pytest.raises(UsageError, match=r"is a builtins\.int, not a Keras 3 model"):
        build_model(find_model(f"{path}:nothing"), given)


def test_a_model_that_ends_in_probabilities_is_told_from_one_that_does_not():
    softmax = keras.activations.softmax
    layers = [keras.layers.Input([4]), keras.layers.Dense(3, activation="softmax")]
    assert ends_in(keras.Sequential(layers), softmax)
    assert ends_in(keras.Sequential([keras.layers.Input([4]), keras.layers.Softmax()]), softmax)
    assert not ends_in(keras.Sequential([*layers, keras.layers.Dense(3)]), softmax)
    assert not ends_in(keras.Sequential(layers), keras.activations.sigmoid)
    assert not ends_in(keras.Sequential(), softmax)


def test_the_recipe_is_that_of_the_data_set():
    digits, mnist = Recipe("digits"), Recipe("mnist")
    source = ModelSource("m", keras.Sequential, (digits, mnist))
    assert [source.recipe_for(name) for name in ("mnist", "digits", "cifar10")] == [mnist, digits, digits]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lenet", "There is no model 'lenet'. Choose one of branch_cnn, "),
        ("missing.py:build", r"names the file missing\.py, which is not there"),
        ("{mine}", "names no function"),
        ("{mine}:other", "has no function 'other'"),
        ("{broken}:build", r"cannot be imported: ZeroDivisionError"),
    ],
)
def test_models_that_are_not_there(tmp_path, model, message):
    (tmp_path / "mine.py").write_text(USER_MODEL)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UsageError, match=message):
        find_model(model.format(mine=tmp_path / "mine.py", broken=tmp_path / "broken.py"))


def test_a_model_that_does_not_fit_the_data():
    import tensorflow as tf

    model = hvdkit_models.load("mnist_mlp").build((28, 28, 1), 10)
    with pytest.raises(UsageError, match=r"cannot take examples of shape \(8, 8, 1\)"):
        check_output(model, tf.TensorSpec([8, 8, 1], tf.uint8), 10, "mine")
    with pytest.raises(UsageError, match=r"but 3 classes need \(batch, 3\)"):
        check_output(model, tf.TensorSpec([28, 28, 1], tf.uint8), 3, "mine")


def model_arguments(text):
    return _with(model_args=text).model_arguments


def test_arguments_of_the_model(tmp_path):
    assert model_arguments("width=256, depth=6,hidden=(128,64),rate=1e-3,norm=layer,bias=False") == {
        "width": 256,
        "depth": 6,
        "hidden": (128, 64),
        "rate": 1e-3,
        "norm": "layer",
        "bias": False,
    }
    assert model_arguments(None) == {}
    given = {"input_shape": (28, 28, 1), "num_classes": 10}
    small = build_model(find_model("mnist_mlp"), given, model_arguments("hidden=(8,)"))
    assert small.count_params() == 784 * 8 + 8 + 8 * 10 + 10
    with pytest.raises(UsageError, match="was given width, and the model mnist_mlp takes hidden. Correct the name"):
        build_model(find_model("mnist_mlp"), given, {"width": 3})
    with pytest.raises(UsageError, match=r"was given num_classes, which the data decide \(num_classes is 10\)"):
        build_model(find_model("mnist_mlp"), given, {"num_classes": 3})
    with pytest.raises(UsageError, match="cannot be built: ValueError: a width of 130 cannot be divided over 4 heads"):
        build_model(find_model("gpt"), {"sequence_length": 8}, {"width": 130})
    path = tmp_path / "mine.py"
    path.write_text(USER_MODEL + "\ndef open_ended(**sizes):\n    return plain() if sizes == {'n': 3} else 0\n")
    assert build_model(find_model(f"{path}:open_ended"), given, {"n": 3}).count_params() == 650


def test_optimizers_by_name():
    optimizer = make_optimizer("sgd:momentum=0.9,nesterov=True", 0.1)
    assert (type(optimizer), optimizer.momentum, optimizer.nesterov) == (keras.optimizers.SGD, 0.9, True)
    for wrong in ("sdg", "sgd:speed=3", "sgd:momentum"):
        with pytest.raises(UsageError, match=f"--optimizer={wrong} is not a Keras optimizer"):
            make_optimizer(wrong, 0.1)


def test_models_in_packages_may_import_relatively(tmp_path, monkeypatch):
    package = tmp_path / "my_package" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package.parent / "sizes.py").write_text("WIDTH = 3\n")
    (package / "beside_it.py").write_text("MORE = 0\n")
    program = "from ..sizes import WIDTH\nfrom beside_it import MORE\ndef build(): return WIDTH + MORE\n"
    (package / "of_mine.py").write_text(program)
    assert find_model(f"{package / 'of_mine.py'}:build").build() == 3
    monkeypatch.chdir(tmp_path)
    by_name = find_model("my_package.inner.of_mine:build")
    assert (by_name.name, by_name.build()) == ("of_mine", 3)
    with pytest.raises(UsageError, match="The module no_such cannot be imported: ModuleNotFoundError"):
        find_model("no_such:build")


def test_a_syntax_error_is_shown_with_its_place(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text("import keras\ndef build(:\n")
    with pytest.raises(UsageError, match=rf"SyntaxError: .* \(line 2 of {file}\)"):
        find_model(f"{file}:build")


def test_losses_and_metrics_that_do_not_take_the_labels_are_found_before_training():
    spec = tf.TensorSpec([4], tf.float32)
    model = small("sparse_categorical_crossentropy", ["accuracy"])
    before = [v.numpy() for v in model.variables]
    check_loss(model, spec, "mine")
    assert all((a == b.numpy()).all() for a, b in zip(before, model.variables, strict=True)), "nothing is left of it"
    values = tf.TensorSpec([3], tf.float32)
    check_loss(small("mse", ["mae"]), spec, "mine", values, "measured values")
    with pytest.raises(
        UsageError, match=r"labels of shape \(2, 3\), which are measured values .* as 'mean_squared_err"
    ):
        check_loss(model, spec, "mine", values, "measured values")
    for wrong in (small("categorical_crossentropy"), small("sparse_categorical_crossentropy", ["precision"])):
        with pytest.raises(UsageError, match=r"The loss or a metric of the model mine does not take labels of shape"):
            check_loss(wrong, spec, "mine")


def test_a_model_with_several_outputs_must_be_compiled_by_its_function():
    inputs = keras.Input([4])
    model = keras.Model(inputs, {"a": keras.layers.Dense(3)(inputs), "b": keras.layers.Dense(1)(inputs)})
    with pytest.raises(UsageError, match="The model mine has several outputs, and each example one label"):
        check_output(model, tf.TensorSpec([4], tf.float32), 3, "mine")


def test_a_model_must_take_the_examples_that_a_function_gives():
    batch = np.zeros([2, 4]), {"box": np.zeros([2, 4]), "score": np.zeros([2, 1])}, np.ones(2)
    check_batch(two_outputs({"box": "mse", "score": "mae"}), batch, "mine", "mine:data")
    check_batch(two_outputs({"box": "mse", "score": None}), batch, "mine", "mine:data")
    for model, given, message in (
        (two_outputs(), batch, "The model mine is not compiled, and mine:data is a function"),
        (two_outputs(metrics={"box": ["mae"]}), batch, "The model mine is compiled without a loss"),
        (two_outputs({"box": "mse"}), batch, "losses for box, and none for its output score. Add 'score'"),
        (two_outputs("mse"), (np.zeros([2, 4]), np.zeros([2, 9])), "does not take targets of mine:data of shape"),
        (two_outputs("mse"), (np.zeros([2, 3, 5]), batch[1]), r"cannot take inputs of mine:data of shape \(2, 3, 5\)"),
    ):
        with pytest.raises(UsageError, match=message):
            check_batch(model, given, "mine", "mine:data")
    with pytest.raises(UsageError, match="is a function, whose examples may have any structure, and the model mnist"):
        check_kind(find_model("mnist_mlp"), "arrays", "mine.py:data")


class _Undescribed(keras.layers.Layer):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def call(self, inputs):
        return inputs * float(self.width)


def test_a_model_that_cannot_be_saved_is_found_before_training():
    check_savable(small("mse"), "mine")
    check_savable(
        keras.Sequential([keras.layers.Input([4]), _Undescribed(2)]), "mine"
    )  # Keras describes numbers itself
    model = keras.Sequential([keras.layers.Input([4]), _Undescribed(fractions.Fraction(2))])
    with pytest.raises(
        UsageError, match=r"The model mine cannot be saved \(.*Give each class of your own a method get"
    ):
        check_savable(model, "mine")
