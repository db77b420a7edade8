"""The main job's parts: flags, models, artefacts."""

import dataclasses
import fractions
import json
import types

import hvdkit_models
import keras
import numpy as np
import pytest
import tensorflow as tf
from hvdkit_models.recipe import Recipe

from hvdkit import reporting
from hvdkit.data.sources import open_source
from hvdkit.errors import UsageError
from hvdkit.strategies import MirroredStrategy, SingleStrategy, create
from hvdkit.train import artifacts, callbacks, compiled, flag_checks, objectives
from hvdkit.train import flags as train_flags
from hvdkit.train import settings as train_settings
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
from hvdkit.train.data import prepared, schema_of


def parse(*flags):
    return train_flags.parse(["train", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modle=mnist_mlp"], "Unknown command line flag 'modle'"),
        (["mnist_mlp"], "'mnist_mlp' is not a flag"),
        (["--epochs=0"], "flag --epochs=0: 0 is not"),
        (["--strategy=magic"], "single|horovod|mirrored|multiworker"),
        (["--epochs=1", "--steps=3"], "--epochs and --steps exclude each other"),
        (["--global_batch=8", "--local_batch=3"], "--global-batch and --local-batch exclude each other"),
        (["--shard_optimizer", "--compression=fp16"], "--shard-optimizer and --compression exclude each other"),
        (["--text-column=a", "--feature-columns=b"], "--text-column and --feature-columns exclude each other"),
        (["--task=ranking"], "auto|classification|regression|multilabel"),
        (["--fragments=4"], "--fragments=4 divides the synchronization of --local-steps, which was not given"),
        (["--fragments=4", "--local_steps=3"], "--fragments=4 is more than --local-steps=3"),
        (["--fragments=2", "--local_steps=8", "--compression=int8"], "--fragments and --compression=int8 exclude"),
    ],
)
def test_wrong_flags(flags, message):
    from absl import flags as absl_flags

    try:
        with pytest.raises(UsageError, match=message.replace("|", r".*")):
            parse(*flags)
    finally:
        absl_flags.FLAGS.unparse_flags()
        for name in (
            "epochs",
            "steps",
            "global_batch",
            "local_batch",
            "shard_optimizer",
            "compression",
            "fragments",
            "local_steps",
            "text_column",
            "feature_columns",
        ):
            absl_flags.FLAGS[name].unparse()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--strategy=single --compression=int8", "--compression has no use with --strategy=single: it belongs to"),
        ("--strategy=mirrored --shard_optimizer", "--shard-optimizer has no use with --strategy=mirrored"),
        ("--strategy=multiworker --local_steps=8", "--local-steps has no use with --strategy=multiworker"),
        ("--strategy=multiworker --compression=fp16", "--compression has no use with --strategy=multiworker"),
        ("--strategy=tensor --local_steps=8", "--local-steps has no use with --strategy=tensor"),
        ("--strategy=pipeline --shard_optimizer", "--shard-optimizer has no use with --strategy=pipeline"),
        ("--strategy=branches --compression=topk", "--compression=topk exclude each other: of the compressions, fp16"),
        ("--strategy=tensor --compression_guard=9 --compression=int8", "--compression-guard has no use with"),
        ("--strategy=tensor --micro_batches=2", "it belongs to --strategy=pipeline"),
        ("--strategy=tensor --schedule=gpipe", "--schedule has no use with --strategy=tensor"),
        ("--branches=left,right", "--branches has no use with --strategy=horovod"),
        ("--model_ranks=2", "it belongs to --strategy=tensor and --strategy=branches and --strategy=pipeline"),
        ("--outer_momentum=0", "--outer-momentum changes the synchronization of --local-steps, which was not given"),
        ("--outer_learning_rate=1", "--outer-learning-rate changes the synchronization of --local-steps"),
        ("--local_steps=4 --optimizer=sgd:gradient_accumulation_steps=2", "exclude each other: a rank that trains"),
    ],
)
def test_flags_that_the_strategy_has_no_use_for_are_refused(flags, sentence, capsys):
    assert train_flags.main(["train", *flags.split()]) == 2
    assert sentence in capsys.readouterr().err
    parse(*flags.split())  # which jobs that train by several strategies call


@pytest.mark.parametrize(
    "flags",
    [
        "--local_steps=8 --compression=int8 --outer_momentum=0",
        "--local_steps=8 --fragments=2 --compression=fp16",
        "--compression=powersgd:rank=2 --compression_guard=9",
        "--strategy=pipeline --micro_batches=2 --schedule=gpipe --model_ranks=2 --compression=bf16",
        "--strategy=branches --branches=left,right",
        "--shard_optimizer --optimizer=sgd:gradient_accumulation_steps=2",
    ],
)
def test_flags_that_the_strategy_uses_are_taken(flags):
    assert train_flags.main(["train", *flags.split()]) == 0


def test_the_recipe_fills_in_what_the_flags_leave_open():
    recipe = Recipe("mnist", global_batch=100, learning_rate=0.1, epochs=20)
    config = train_settings.resolve(parse(), recipe, 2)
    assert (config.dataset, config.global_batch, config.local_batch, config.learning_rate) == ("mnist", 100, 50, 0.1)
    assert config.warmup_epochs == 0
    config = train_settings.resolve(_with(local_batch=100), recipe, 4)
    assert (config.global_batch, config.learning_rate, config.warmup_epochs) == (400, pytest.approx(0.4), 2.0)


def _with(**changes):
    return dataclasses.replace(parse(), **changes)


def test_a_batch_that_cannot_be_divided():
    with pytest.raises(
        UsageError, match="global batch of 127 cannot be divided evenly over 2 replicas. Use --global-batch=126 or 128"
    ):
        train_settings.resolve(_with(global_batch=127), Recipe(), 2)


def test_the_help_groups_all_flags():
    text = train_flags.help_text()
    assert [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")] == [
        "What to train:",
        "How to train it:",
        "On which machine:",
        "What to write:",
        "Checkpoints:",
    ]
    assert all(
        f"--{name}" in text or f"--[no-]{name}" in text
        for name in (field.name.replace("_", "-") for field in dataclasses.fields(train_settings.Config))
    )


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


def test_measured_values_that_a_model_does_not_scale_are_warned_of(caplog):
    job = types.SimpleNamespace(model_source=find_model("cifar_cnn"), source=types.SimpleNamespace(name="x.npz"))
    given = {"label_mean": (3.0,), "label_variance": (40_000.0,)}
    compiled._warn_of_units(job, given)
    assert "The model cifar_cnn starts with values near 0, and those of x.npz are about 200," in caplog.text
    caplog.clear()
    compiled._warn_of_units(job, {"label_mean": (3.0,), "label_variance": (4.0,)})
    job.model_source = find_model("text_classifier")
    compiled._warn_of_units(job, given)
    assert not caplog.text
    model = build_model(
        find_model("text_classifier"), given | {"vocabulary_size": 9, "sequence_length": 6, "num_classes": 1}
    )
    assert np.abs(model(np.ones([1, 6], "int32")) - 3).max() < 200, "in the values' unit"


def test_what_each_task_is_trained_and_judged_by():
    logits = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(3)])
    sigmoid = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(3, activation="sigmoid")])
    wanted = np.float32([[1, 0, 1], [0, 0, 1]])
    given = np.float32([[2, -1, -3], [-2, -2, 1]])
    found = {}
    for model, outputs in ((logits, given), (sigmoid, 1 / (1 + np.exp(-given)))):
        accuracy, auc = objectives.metrics_for("multilabel", model)
        accuracy.update_state(wanted, outputs)
        auc.update_state(wanted, outputs)
        assert float(accuracy.result()) == pytest.approx(5 / 6)
        found[model] = float(objectives.loss_for("multilabel", model)(wanted, outputs)), float(auc.result())
    assert found[logits] == pytest.approx(found[sigmoid], rel=1e-3)
    values, near = np.float32([[1.0], [2.0], [5.0]]), np.float32([[1.5], [2.0], [4.0]])
    error, r2_score = objectives.metrics_for("regression", logits, [2.0], [3.0])
    for metric in (error, r2_score):
        metric.update_state(values, near)
    assert float(error.result()) == pytest.approx(0.5)
    assert float(r2_score.result()) == pytest.approx(1 - 1.25 / np.square(values - values.mean()).sum(), rel=1e-6)
    assert float(objectives.loss_for("regression", logits)(values, near)) == pytest.approx(1.25 / 3)
    of_years = objectives.metrics_for("regression", logits, [2000.0], [3.0])
    assert [metric.name for metric in of_years] == ["mean_absolute_error"], "R2Score would lose their variance"


def test_results_of_each_task_by_name():
    metrics = {"loss": 2.0, "mean_absolute_error": 1.5, "r2_score": 0.5}
    found = objectives.results_of("regression", "test", metrics)
    assert list(found.items()) == [("test_mean_absolute_error", 1.5), ("test_r2_score", 0.5), ("test_loss", 2.0)]
    main = objectives.main_metric("regression", None, list(metrics))
    assert objectives.describe(main, found[f"test_{main}"]) == "test mean absolute error 1.5"
    found = objectives.results_of("classification", "test", {"loss": np.float32(2.0), "f1": np.zeros(3)})
    assert found == {"test_accuracy": None, "test_loss": 2.0}
    assert objectives.describe("accuracy", found["test_accuracy"]) == "test accuracy unknown"
    assert objectives.describe("accuracy", 0.5) == "test accuracy 50.00%"
    assert objectives.results_of("compiled", "test", {"loss": 2.0, "iou": 0.5}) == {"test_iou": 0.5, "test_loss": 2.0}
    assert objectives.main_metric("multilabel", None, ["loss", "auc"]) == "accuracy"
    assert objectives.main_metric("compiled", None, ["loss", "box_loss", "iou", "mae"]) == "iou"
    assert objectives.main_metric("compiled", None, ["loss", "box_loss"]) == "loss"
    assert objectives.main_metric("compiled", "mae", ["loss", "iou", "mae"]) == "mae"


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


@pytest.mark.parametrize("wrong", ["width", "width=", "width=256;depth=6", "256", "width=2*x", "a=1,a=2", "**x"])
def test_arguments_of_the_model_that_cannot_be_read(wrong):
    with pytest.raises(UsageError, match=r"^--model-args=.* cannot be read \(.*\)\. The form is name=value,name=value"):
        flag_checks.check(_with(model_args=wrong))


def test_optimizers_by_name():
    optimizer = make_optimizer("sgd:momentum=0.9,nesterov=True", 0.1)
    assert (type(optimizer), optimizer.momentum, optimizer.nesterov) == (keras.optimizers.SGD, 0.9, True)
    for wrong in ("sdg", "sgd:speed=3", "sgd:momentum"):
        with pytest.raises(UsageError, match=f"--optimizer={wrong} is not a Keras optimizer"):
            make_optimizer(wrong, 0.1)


def test_strategies_are_chosen_by_name(monkeypatch):
    assert isinstance(create("single", 3), SingleStrategy)
    assert list(create("single", 3).shares) == [0, 1, 2]
    with pytest.raises(
        UsageError, match="There is no strategy 'magic'. Choose one of: single, horovod, mirrored, multiworker"
    ):
        create("magic")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    for name in ("single", "mirrored"):
        with pytest.raises(UsageError, match=f"--strategy={name} trains in one process, but 2 were started"):
            create(name)


@pytest.mark.parametrize(("examples", "size", "expected"), [(360, 2, 32), (10_000, 2, 32), (33, 2, 30), (7, 4, 8)])
def test_every_device_gets_an_example_of_every_evaluation_batch(examples, size, expected):
    strategy = object.__new__(MirroredStrategy)
    strategy.size = size
    batch = strategy.evaluation_batch(examples, 32 if size == 2 else 8)
    rest = examples % batch
    assert batch == expected
    assert rest == 0 or rest > -(-rest // size) * (size - 1)


@pytest.mark.parametrize(
    ("steps", "steps_per_epoch", "expected"), [(220, 44, 11), (1872, 468, 13), (200, 781, 10), (7, 5, 1)]
)
def test_steps_per_execution_divides_every_epoch(steps, steps_per_epoch, expected):
    chosen = callbacks.steps_per_execution(None, steps, steps_per_epoch, None)
    assert chosen == expected
    assert min(steps, steps_per_epoch) % chosen == 0 == (steps % steps_per_epoch) % chosen


def test_too_few_test_examples_for_the_devices_are_refused():
    strategy = object.__new__(MirroredStrategy)
    strategy.size = 4
    with pytest.raises(UsageError, match="5 test examples cannot be divided into batches that give each of 4 devices"):
        strategy.evaluation_batch(5, 8)


def test_steps_per_execution_that_would_run_over_an_epochs_end_are_refused():
    assert callbacks.steps_per_execution(4, 220, 44, None) == 4
    with pytest.raises(
        UsageError, match="--steps-per-execution=16 does not divide an epoch of 44 .* 1, 2, 4, 11, 22, 44"
    ):
        callbacks.steps_per_execution(16, 220, 44, None)


def test_a_compiled_models_optimizer_is_its_own():
    settings = train_settings.resolve(_with(), Recipe(lr_schedule="cosine", warmup_epochs=1), 2)
    left = train_settings.leave_optimizer_to_model(_with(), settings, "mine", 0.25)
    assert (left.optimizer, left.learning_rate, left.lr_schedule, left.warmup_epochs) == (
        "the model's",
        0.25,
        "constant",
        0,
    )
    with pytest.raises(UsageError, match="--learning-rate was given, but the model mine is compiled by its function"):
        train_settings.leave_optimizer_to_model(_with(learning_rate=0.1), settings, "mine", 0.25)


def test_the_cosine_begins_where_the_warmup_ends():
    multiplier = callbacks._cosine(0.5, 2.0)
    assert [multiplier(e) for e in (0.0, 0.5, 1.25, 2.0)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert train_settings.resolve(_with(warmup_epochs=3.0), Recipe(), 1).warmup_epochs == 0


@pytest.mark.parametrize("strategy", ["single"])
def test_compression_without_an_exchange_is_refused(strategy):
    with pytest.raises(UsageError, match="--strategy=single has no compression: it trains in one process"):
        create(strategy).distribute(keras.optimizers.Adam(), compression=None)


def test_an_old_run_is_cleared_away(tmp_path):
    for name in ("result.json", "model.keras", "logs"):
        (tmp_path / name).touch()
    (tmp_path / "tensorboard" / "train").mkdir(parents=True)
    artifacts.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "result.json"
    reporting.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        reporting.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_workdir_with_a_run_is_not_overwritten(tmp_path):
    artifacts.make_workdir(tmp_path, overwrite=False, begin_anew=False)
    (tmp_path / "result.json").touch()
    with pytest.raises(UsageError, match="has a finished run"):
        artifacts.make_workdir(tmp_path, overwrite=False, begin_anew=False)
    artifacts.make_workdir(tmp_path, overwrite=True, begin_anew=False)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be written to \(Not a directory\)"):
        artifacts.make_workdir(tmp_path / "file", overwrite=True, begin_anew=False)


def test_an_interrupted_run_is_not_begun_anew_by_accident(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    artifacts.make_workdir(tmp_path, overwrite=False, begin_anew=False)
    with pytest.raises(UsageError, match="has the checkpoints of an interrupted run, and --resume=never would lose"):
        artifacts.make_workdir(tmp_path, overwrite=False, begin_anew=True)
    artifacts.make_workdir(tmp_path, overwrite=True, begin_anew=True)


def test_the_step_at_which_a_run_goes_on_is_reached():
    found = types.SimpleNamespace(state={"step_in_epoch": 6})
    assert callbacks.steps_per_execution(None, 220, 44, found) == 2


def test_curves_of_a_run_that_took_no_step(tmp_path):
    """It went on from where another one had ended, so that there is a history, and no loss by step."""
    artifacts.plot_curves(tmp_path, {"loss": [1.0], "accuracy": [0.5]}, 44, parse(), "title")
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("given", "validates", "share"),
    [
        ([], False, None),
        (["--eval-every=2"], True, None),
        (["--keep-best=1"], True, None),
        (["--validation=yes"], True, None),
        (["--validation=0.25"], True, 0.25),
        (["--validation=no", "--eval-every=1"], False, None),
        (["--fold=0/5", "--eval-every=1"], False, None),
    ],
)
def test_what_is_chosen_is_chosen_on_a_validation_split(given, validates, share):
    config = train_flags.parse(["hvdkit.train", *given])
    assert (config.validates, config.validation_share) == (validates, share)


@pytest.mark.parametrize("given", ["0", "0.7", "1", "-0.1", "maybe"])
def test_a_wrong_share_to_validate_on_is_refused(given):
    with pytest.raises(UsageError, match=f"--validation={given} is none of auto, yes and no, and no share"):
        train_flags.parse(["hvdkit.train", f"--validation={given}"])
    with pytest.raises(UsageError, match="--fold=0/5 and --validation=0.1 exclude each other"):
        train_flags.parse(["hvdkit.train", "--fold=0/5", "--validation=0.1"])


# ----------------------------------------------------------------------- Models of the user's, before they are trained


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


def small(loss, metrics=()):
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", loss=loss, metrics=list(metrics), jit_compile=False)
    return model


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


def two_outputs(loss=None, **options):
    inputs = keras.layers.Input([4])
    outputs = {name: keras.layers.Dense(width, name=name)(inputs) for name, width in (("box", 4), ("score", 1))}
    model = keras.Model(inputs, outputs)
    if loss or options:
        model.compile(loss=loss, **options)
    return model


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


def test_a_metric_to_monitor_must_be_there_and_say_what_is_better():
    def dice(y_true, y_pred):
        return keras.ops.mean(y_true * y_pred)

    model = small("mean_squared_error", [dice, "mae"])
    check_batch(model, (np.zeros([2, 4]), np.zeros([2, 3])), "mine", "mine:data")
    assert objectives.check_monitor(model, "mae", "auto", []) == "min"
    assert objectives.check_monitor(model, "dice", "max", []) == "max"
    metrics = [keras.metrics.AUC(name="auc")]
    assert objectives.check_monitor(two_outputs(), "auc", "auto", metrics) == "max"
    with pytest.raises(UsageError, match="--monitor=auc is no metric of the model, which has loss, dice, mae"):
        objectives.check_monitor(model, "auc", "auto", [])
    with pytest.raises(UsageError, match="--monitor=dice: it cannot be known whether less or more of it is better"):
        objectives.check_monitor(model, "dice", "auto", [])
    with pytest.raises(UsageError, match="Write --monitor=auc"):
        parse("--monitor=val_auc")


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


def test_values_have_no_classes_to_balance(tmp_path):
    (tmp_path / "x.csv").write_text("n,label\n" + "".join(f"{i},{i}.5\n" for i in range(10)))
    source = open_source(str(tmp_path / "x.csv"), schema=schema_of(_with(task="regression", feature_columns="n")))
    settings = train_settings.resolve(parse(), Recipe(), 1)
    assert prepared(source, settings) is source
    with pytest.raises(UsageError, match=r"--sampling=over balances classes, and x\.csv, for regression, have none"):
        prepared(source, dataclasses.replace(settings, sampling="over"))


def test_what_cannot_be_augmented_or_weighed_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("n,label\n" + "".join(f"{i},{i}.5\n" for i in range(10)))
    values = open_source(str(tmp_path / "x.csv"), schema=schema_of(_with(task="regression", feature_columns="n")))
    digits = open_source("digits")
    for source, changed, message in (
        (values, {"augment": "flip"}, r"--augment=flip changes images, and x\.csv has none"),
        (values, {"focal": 2.0}, "--focal=2.0 balances classes, and x.csv, for regression, have none"),
        (values, {"effective_number": 0.9}, "--effective-number=0.9 balances classes"),
        (digits, {"augment": "rand"}, r"--augment=rand changes colors, and the images of digits have 1 channel\(s\)"),
    ):
        settings = dataclasses.replace(train_settings.resolve(parse(), Recipe(), 1), **changed)
        with pytest.raises(UsageError, match=message):
            prepared(source, settings)
    with pytest.raises(UsageError, match="--effective-number and --class-weights exclude each other"):
        parse("--effective-number=0.9", "--class-weights")
    with pytest.raises(UsageError, match="'flop' is unknown. Name some of flip, crop, rand, mixup, cutmix"):
        parse("--augment=flip,flop")
    assert parse("--augment=flip,cutmix").one_hot_labels
    assert not parse("--augment=flip,crop").one_hot_labels


def test_the_focal_loss_and_results_by_class():
    from sklearn.metrics import balanced_accuracy_score, precision_score

    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=[50, 4]).astype("float32"), generator.integers(3, size=50)
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Identity()])
    one_hot = np.eye(4, dtype="float32")[labels]
    right = np.exp(logits)[np.arange(50), labels] / np.exp(logits).sum(axis=1)
    for gamma in (0.0, 2.0):
        loss = objectives.loss_for("classification", model, one_hot=True, focal=gamma)
        assert float(loss(one_hot, logits)) == pytest.approx((-np.log(right) * (1 - right) ** gamma).mean(), rel=1e-4)
    loss = objectives.loss_for("classification", model, one_hot=True)
    assert float(loss(one_hot, logits)) == pytest.approx(-np.log(right).mean(), rel=1e-5)

    batches = tf.data.Dataset.from_tensor_slices((logits, labels)).batch(16)
    counts = objectives.confusion(model, batches, 4)
    taken = logits.argmax(axis=1)
    assert counts.sum() == 50
    assert counts[1, 2] == ((labels == 1) & (taken == 2)).sum()
    found = objectives.results_by_class(counts, list("abcd"))
    assert found["test_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, taken))
    precision = precision_score(labels, taken, labels=range(4), average=None, zero_division=0)
    assert [found["test_classes"][name]["precision"] for name in "abc"] == pytest.approx(precision[:3].tolist())
    assert found["test_classes"]["d"] == {"examples": 0, "recall": None, "precision": 0.0}
    assert objectives.confusion(model, batches, 3) is None, "another number of outputs"
