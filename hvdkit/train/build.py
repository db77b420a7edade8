"""Builds and compiles the Keras model of `--model`: one of hvdkit's models, or a function of the user's."""

import ast
import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import hvdkit_models
import keras
import tensorflow as tf
from hvdkit_models.recipe import Recipe

from hvdkit.command import functions
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
    if ".py" not in model and ":" not in model:
        if model not in hvdkit_models.names():
            raise UsageError(
                f"There is no model {model!r}. Choose one of {', '.join(hvdkit_models.names())}, or give your own as "
                f"path/to/file.py:function or package.module:function."
            )
        module = hvdkit_models.load(model)
        return ModelSource(model, module.build, module.RECIPES, module.KIND)
    name, build = functions.find_function(model, "model")
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
    if kind not in _KINDS:
        raise UsageError(
            f"--dataset={dataset} is a function, whose examples may have any structure, and the model {model.name} "
            f"learns from {_KINDS[str(model.kind)]}. Give --model a function of your own that returns a compiled "
            f"model: path/to/file.py:function."
        )
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
        raise UsageError(f"The model {source.name} cannot be built: {functions.describe(error)}.") from error
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
            f"{meaning} ({functions.first_line(error)}). Compile it with a loss for them, such as "
            f"{'mean_squared_error' if label.dtype.is_floating else 'sparse_categorical_crossentropy'!r} instead of "
            f"'categorical_crossentropy'."
        ) from error
    finally:
        model.reset_metrics()


def check_batch(model: keras.Model, batch: tuple, name: str, dataset: str) -> None:
    """Computes outputs, loss and metrics of a compiled model for a batch of the data, before anything is trained.

    Args:
        model: the model, compiled by the user's function.
        batch: inputs, and perhaps targets and sample weights, as `fit` takes them.
        name: the model's name.
        dataset: the data set's name.

    Raises:
        UsageError: the model is not compiled, has an output without a loss, or does not take the batch.
    """
    if not model.compiled:
        raise UsageError(
            f"The model {name} is not compiled, and {dataset} is a function, whose targets may mean anything. Compile "
            f"the model in its function: model.compile(optimizer, loss=...)."
        )
    x, y, weights = keras.utils.unpack_x_y_sample_weight(batch)
    shapes = _shapes(x)
    try:
        outputs = model(x, training=False)
    except Exception as error:  # a user's layers may raise anything
        raise UsageError(
            f"The model {name} cannot take inputs of {dataset} of shape {shapes} ({functions.first_line(error)}). "
            f"Build it for such inputs; if {dataset} returns batches, return examples, or a data set that ends in "
            f"batch()."
        ) from error
    _check_has_losses(model, name)
    if tf.distribute.has_strategy():
        return  # metrics are updated in replicas only
    try:
        model.compute_loss(x, y, outputs, weights)
        model.compute_metrics(x, y, outputs, weights)
    except Exception as error:  # a user's loss may raise anything
        raise UsageError(
            f"The loss or a metric of the model {name} does not take targets of {dataset} of shape "
            f"{_shapes(y)} for outputs of shape {_shapes(outputs)} "
            f"({functions.first_line(error)}). Return targets in the structure of the outputs, or compile it with "
            f"another loss."
        ) from error
    finally:
        model.reset_metrics()


def _shapes(values: Any) -> str:
    """Returns the shapes of a structure of tensors, for a message."""
    return str(keras.tree.map_structure(lambda leaf: None if leaf is None else str(tuple(leaf.shape)), values)).replace(
        "'", ""
    )


def _check_has_losses(model: keras.Model, name: str) -> None:
    """Raises a `UsageError` if the model has no loss, or its losses by name leave an output out."""
    loss = model.loss
    if loss is None and not model.losses:
        raise UsageError(
            f"The model {name} is compiled without a loss, so nothing would be learned. Give compile one: loss=..., "
            f"or add_loss in a layer."
        )
    if isinstance(loss, dict):
        missing = [output for output in getattr(model, "output_names", None) or [] if output not in loss]
        if missing:
            raise UsageError(
                f"The model {name} is compiled with losses for {', '.join(loss)}, and none for its output "
                f"{missing[0]}. Add {missing[0]!r} to loss={{...}}; None says that it has no loss."
            )


def check_savable(model: keras.Model, name: str) -> None:
    """Describes the model as its file will, so that no training is lost at its end.

    Raises:
        UsageError: the model, a layer of it or its loss has no description.
    """
    try:
        json.dumps(keras.saving.serialize_keras_object(model))
    except Exception as error:  # a user's get_config may raise anything
        raise UsageError(
            f"The model {name} cannot be saved ({functions.first_line(error)}). Give each class of your own a method "
            f"get_config that returns the arguments of its constructor: "
            f"https://keras.io/guides/serialization_and_saving/#custom-objects."
        ) from error
