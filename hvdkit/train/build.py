"""Builds and compiles the Keras model of `--model`: one of hvdkit's models, or a function of the user's."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hvdkit_models
import keras
import tensorflow as tf
from hvdkit_models.recipe import Recipe

from hvdkit.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A function that builds a model, and the defaults to train it with.

    Attributes:
        name: a short name that can be part of a folder's name.
        build: returns a Keras model, compiled or not. It is called with those of `input_shape`, `num_classes`,
            `vocabulary_size` and `sequence_length`, and for features and measured values of `feature_mean`,
            `feature_variance`, `label_mean` and `label_variance`, for which it has parameters.
        recipes: the defaults, one for each data set.
        kind: the kind of source that it learns from; None if that is not known.
    """

    name: str
    build: Callable[..., keras.Model]
    recipes: tuple[Recipe, ...]
    kind: str | None = None

    def recipe_for(self, dataset: str) -> Recipe:
        """The recipe for a data set, by its name; the first one for a data set that has none."""
        return next((recipe for recipe in self.recipes if recipe.dataset == dataset), self.recipes[0])


def find_model(model: str) -> ModelSource:
    """Finds a model by name, or a user's function by `path/to/file.py:function` or `package.module:function`.

    Raises:
        UsageError: there is no such model, file, module or function, or it cannot be imported.
    """
    place, _, function = model.partition(":")
    if ".py" not in model and not function:
        if model not in hvdkit_models.names():
            raise UsageError(
                f"There is no model {model!r}. Choose one of {', '.join(hvdkit_models.names())}, or give your own as "
                f"path/to/file.py:function or package.module:function."
            )
        module = hvdkit_models.load(model)
        return ModelSource(model, module.build, module.RECIPES, module.KIND)
    path = Path(place).expanduser()
    if path.suffix == ".py":
        if not path.is_file() or not function:
            missing = "names no function" if path.is_file() else f"names the file {path}, which is not there"
            raise UsageError(f"--model={model} {missing}. The form is path/to/file.py:function.")
        build, name = getattr(_import_file(path), function, None), path.stem
    else:
        build, name = getattr(_import_module(place, "."), function, None), place.rpartition(".")[2]
    if not callable(build):
        raise UsageError(f"{place} has no function {function!r} that --model={model} could call.")
    return ModelSource(name, build, (Recipe(),))


_KINDS = {
    "image": "images",
    "text": "texts with labels",
    "tokens": "text of which each byte is predicted",
    "features": "columns of numbers and categories",
}


def check_kind(model: ModelSource, kind: str, dataset: str) -> None:
    """Raises a `UsageError` if one of hvdkit's models learns from another kind of source than the data set's."""
    if model.kind in (None, kind):
        return
    kinds = {name: hvdkit_models.load(name).KIND for name in hvdkit_models.names()}
    fitting = [name for name, learns_from in kinds.items() if learns_from == kind]
    raise UsageError(
        f"The model {model.name} learns from {_KINDS[str(model.kind)]}, but {dataset} has {_KINDS[kind]}. Use "
        f"--model={' or '.join(fitting)}, or one of your own."
    )


def build_model(source: ModelSource, given: dict[str, Any], chosen: Mapping[str, Any] | None = None) -> keras.Model:
    """Calls the build function with the arguments in `given` that it accepts, and with all in `chosen`.

    Args:
        source: the function.
        given: arguments that follow from the data, by name.
        chosen: arguments that the user gave, by name.

    Raises:
        UsageError: it needs another argument, does not accept one, fails, or does not return a Keras model.
    """
    parameters = inspect.signature(source.build).parameters
    _check_chosen(source, given, chosen or {})
    given = {**given, **(chosen or {})}
    unknown = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in given
    ]
    if unknown:
        raise UsageError(
            f"The model {source.name} needs the argument {unknown[0]!r}, which this data set does not have: it gives "
            f"{', '.join(given)}. Choose another data set, or give the parameter a default."
        )
    try:
        model = source.build(**{n: value for n, value in given.items() if n in parameters or n in (chosen or {})})
    except Exception as error:  # a user's function may raise anything
        raise UsageError(f"The model {source.name} cannot be built: {_describe(error)}.") from error
    if not isinstance(model, keras.Model):
        raise UsageError(
            f"The model {source.name} is a {type(model).__module__}.{type(model).__name__}, not a Keras 3 model "
            f"(keras.Model). A model of tf_keras or PyTorch has to be rewritten in Keras 3."
        )
    return model


def _check_chosen(source: ModelSource, given: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Raises a `UsageError` if the build function does not accept an argument, or if the data determines it."""
    parameters = inspect.signature(source.build).parameters.values()
    own = [p.name for p in parameters if p.name not in given and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in chosen:
        if name in given:
            raise UsageError(
                f"--model-args was given {name}, which the data decide ({name} is {given[name]}). Leave it out; texts "
                f"are cut by --sequence-length, images resized by --image-size."
            )
        if name not in own and not takes_all:
            raise UsageError(
                f"--model-args was given {name}, and the model {source.name} takes {', '.join(own) or 'none'}. Correct "
                f"the name, or leave it out."
            )


def make_optimizer(spec: str, learning_rate: float) -> keras.optimizers.Optimizer:
    """Makes a Keras optimizer from a name with optional arguments, such as `sgd:momentum=0.9,nesterov=True`.

    Raises:
        UsageError: Keras has no such optimizer, or it takes no such argument.
    """
    name, _, arguments = spec.partition(":")
    try:
        config = {k.strip(): ast.literal_eval(v.strip()) for k, v in (a.split("=") for a in arguments.split(",") if a)}
        optimizer = keras.optimizers.get({"class_name": name, "config": {"learning_rate": learning_rate, **config}})
    except (ValueError, TypeError, SyntaxError) as error:
        raise UsageError(
            f"--optimizer={spec} is not a Keras optimizer ({str(error).splitlines()[0]}). The form is "
            f"name:argument=value,argument=value, for example sgd:momentum=0.9,nesterov=True."
        ) from None
    return optimizer


def ends_in(model: keras.Model, activation: Callable[..., Any]) -> bool:
    """Whether the model's last layer applies an activation. Then the loss must not apply it again."""
    last = model.layers[-1] if model.layers else None
    is_softmax = isinstance(last, keras.layers.Softmax) and activation is keras.activations.softmax
    return is_softmax or getattr(last, "activation", None) is activation


def check_output(
    model: keras.Model,
    spec: tf.TensorSpec,
    num_classes: int,
    name: str,
    *,
    each_token: bool = False,
    outputs: str = "classes",
) -> None:
    """Computes the model's output shape and compares it with the number of classes.

    Args:
        model: the model.
        spec: shape and dtype of one example.
        num_classes: number of classes, or of tokens.
        name: the model's name.
        each_token: whether each token of an example has a label, instead of one label per example.
        outputs: what the output must have one value of, for the message.

    Raises:
        UsageError: the model does not accept the input, or its output does not have one value per class.
    """
    dtype = "float32" if spec.dtype == tf.uint8 else spec.dtype.name
    try:
        output = model(keras.KerasTensor((None, *spec.shape), dtype))
    except Exception as error:  # a user's layers may raise anything for a shape that they do not support
        raise UsageError(
            f"The model {name} cannot take examples of shape {tuple(spec.shape)} "
            f"({str(error).strip().splitlines()[0]}). Choose another data set, resize images with --image-size, or "
            f"build the model with the argument input_shape."
        ) from error
    if model.compiled:
        return
    shape = getattr(output, "shape", None)
    if shape is None:
        raise UsageError(
            f"The model {name} has several outputs, and each example one label. Return a model with one output, or "
            f"compile it with losses that take this label."
        )
    needed = (*(spec.shape if each_token else ()), num_classes)
    if tuple(shape[1:]) != needed:
        what, argument = ("tokens", "vocabulary_size") if each_token else (outputs, "num_classes")
        raise UsageError(
            f"The model {name} gives {shape}, but {num_classes} {what} need (batch, {', '.join(map(str, needed))}). "
            f"Build it with the argument {argument}, or compile it with a loss of its own."
        )


def check_loss(
    model: keras.Model,
    spec: tf.TensorSpec,
    name: str,
    label: tf.TensorSpec | None = None,
    meaning: str = "numbers of classes",
) -> None:
    """Computes the loss and the metrics of a compiled model for two examples, before anything is trained.

    Args:
        model: the model, compiled by the user's function.
        spec: shape and dtype of one example.
        name: the model's name.
        label: shape and dtype of one example's label; by default an int64 scalar.
        meaning: what labels are, for the message.

    Raises:
        UsageError: they cannot be computed from such labels.
    """
    if tf.distribute.has_strategy():
        return  # metrics are updated in replicas only
    inputs = tf.zeros([2, *spec.shape], tf.float32 if spec.dtype == tf.uint8 else spec.dtype)
    label = label or tf.TensorSpec([], tf.int64)
    labels = tf.zeros([2, *label.shape], label.dtype)
    try:
        outputs = model(inputs, training=False)
        model.compute_loss(inputs, labels, outputs)
        model.compute_metrics(inputs, labels, outputs)
    except Exception as error:  # a user's loss may raise anything
        raise UsageError(
            f"The loss or a metric of the model {name} does not take labels of shape {tuple(labels.shape)}, which are "
            f"{meaning} ({_first_line(error)}). Compile it with a loss for them, such as "
            f"{'mean_squared_error' if label.dtype.is_floating else 'sparse_categorical_crossentropy'!r} instead of "
            f"'categorical_crossentropy'."
        ) from error
    finally:
        model.reset_metrics()


def check_savable(model: keras.Model, name: str) -> None:
    """Describes the model as its file will, so that no training is lost at its end.

    Raises:
        UsageError: the model, a layer of it or its loss has no description.
    """
    try:
        json.dumps(keras.saving.serialize_keras_object(model))
    except Exception as error:  # a user's get_config may raise anything
        raise UsageError(
            f"The model {name} cannot be saved ({_first_line(error)}). Give each class of your own a method get_config "
            f"that returns the arguments of its constructor: "
            f"https://keras.io/guides/serialization_and_saving/#custom-objects."
        ) from error


def _import_file(path: Path) -> Any:
    """Imports a file: as part of its package if it is in one, so that relative imports work."""
    path = path.resolve()
    sys.path.insert(0, str(path.parent))  # like `python file.py`, for modules in the same folder
    packages = list(itertools.takewhile(lambda folder: (folder / "__init__.py").is_file(), path.parents))
    if packages:
        names = [folder.name for folder in reversed(packages)]
        return _import_module(".".join([*names, path.stem]), str(packages[-1].parent))
    spec = importlib.util.spec_from_file_location(f"user_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for dataclasses, pickle and autograph
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} cannot be imported: {_describe(error)}.") from error
    return module


def _import_module(name: str, folder: str) -> Any:
    """Imports a module by its name, also from a folder."""
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UsageError(f"The module {name} cannot be imported: {_describe(error)}.") from error


def _describe(error: Exception) -> str:
    """An error as one sentence, with the line that raised it."""
    if isinstance(error, SyntaxError):
        line, file, message = error.lineno, error.filename, error.msg
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        line, file, message = last.lineno, last.filename, _first_line(error)
    return f"{type(error).__name__}: {message} (line {line} of {file})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
