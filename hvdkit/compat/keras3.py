"""Private names of Keras 3, each behind one function that documents its meaning in Keras 3.10 to 3.16.

Reading a name that Keras lacks raises `MissingNameError`. So does replacing one: otherwise Keras would never call the
replacement, and training would silently differ.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdkit.compat.lookup import missing_in_keras, private

# ---- Variables ------------------------------------------------------------------------------------------------------


def native_variable(variable: Any) -> tf.Variable:
    """Returns the `tf.Variable` behind a Keras variable: callers may request gradients for either."""
    return private(variable, "_value") if isinstance(variable, keras.Variable) else variable


class VectorVariable(keras.Variable):
    """A trainable variable that starts empty, [0], and accepts vectors of any length, [n].

    Args:
        length: the length in `shape`, used by code that creates slots for the variable.
        dtype: dtype of its elements.
        name: name of the variable.
    """

    def __init__(self, length: int, dtype: str, name: str) -> None:
        super().__init__("zeros", shape=[length], dtype=dtype, name=name)
        if native_variable(self).shape.as_list() != [None]:
            raise missing_in_keras("method Variable._initialize that makes the tf.Variable")

    def _initialize(self, value: Any) -> None:
        nothing = tf.zeros([0], self._dtype)
        self._value = tf.Variable(nothing, trainable=True, shape=tf.TensorShape([None]), name=self.name)


def is_seed(variable: Any) -> bool:
    """Returns whether a variable is the state of a `keras.random.SeedGenerator`, which only its path shows."""
    return variable.path.rpartition("/")[2] == _seed_name()


@functools.cache
def _seed_name() -> str:
    with tf.init_scope():
        return keras.random.SeedGenerator(seed=0, name="hvdkit_probe").state.path.rpartition("/")[2]


def global_seed_generator(make: bool = False) -> Any:
    """Returns the default generator of `keras.random`; None if it is unused so far and `make` is false.

    Raises:
        MissingNameError: this Keras keeps it elsewhere.
    """
    try:
        from keras.src.backend.common import global_state
        from keras.src.random import seed_generator
    except ImportError as error:
        raise missing_in_keras("keras.src.random.seed_generator") from error
    if make:
        return private(seed_generator, "global_seed_generator")()
    name = getattr(seed_generator, "GLOBAL_SEED_GENERATOR", "global_seed_generator")  # a constant from Keras 3.13 on
    return private(global_state, "get_global_attribute")(name)


# ---- Optimizers -----------------------------------------------------------------------------------------------------


def trained_variables(optimizer: Any) -> list[Any]:
    """Returns the variables that an optimizer was built for, in order."""
    return private(optimizer, "_trainable_variables")


def own_variables(optimizer: Any) -> list[Any]:
    """Returns an optimizer's variables without those of the optimizers inside it."""
    return private(optimizer, "_variables")


def calls_of_apply(optimizer: Any) -> Any:
    """Returns the counter of `apply` calls, a variable. With gradient accumulation, `iterations` counts updates."""
    return private(optimizer, "_iterations")


def learning_rate_source(optimizer: Any) -> Any:
    """Returns the source of an optimizer's learning rate: a variable, a schedule or a function."""
    return private(optimizer, "_learning_rate")


def gradient_accumulators(optimizer: Any) -> list[Any]:
    """Returns the variables that accumulate gradients between two updates (`gradient_accumulation_steps`)."""
    if not optimizer.gradient_accumulation_steps or not optimizer.built:
        return []
    return [v for v in private(optimizer, "_accumulated_gradients") if v is not None]


def moving_averages(optimizer: Any) -> list[Any]:
    """Returns the moving averages of the weights, of a built optimizer with `use_ema`."""
    return private(optimizer, "_model_variables_moving_average")


def without_empty_gradients(optimizer: Any, grads: list[Any], variables: list[Any]) -> tuple[list[Any], list[Any]]:
    """Removes gradients that are None, with their variables, and warns about them as Keras does."""
    return private(optimizer, "_filter_empty_gradients")(grads, variables)


def decays(optimizer: Any, variable: tf.Variable) -> bool:
    """Returns whether weight decay applies to a variable, or `exclude_from_weight_decay` excludes it."""
    return private(optimizer, "_use_weight_decay")(variable)


def copy_decay_exclusions(source: Any, target: Any) -> None:
    """Copies the settings of `exclude_from_weight_decay` to another optimizer: no configuration contains them."""
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(source, name):  # set by `exclude_from_weight_decay`
            setattr(target, name, getattr(source, name))
    vars(target).pop("_exclude_from_weight_decay_cache", None)  # the cache of Keras 3.6 and later


def replace_clipping(optimizer: Any, make: Callable[[Callable], Callable]) -> None:
    """Replaces an optimizer's function `clip(grads) -> grads`.

    Keras calls it once per update, between gradient accumulation and the update, with any clipping options or none.

    Args:
        optimizer: an optimizer that applies updates itself.
        make: takes Keras' function and returns the new one.
    """
    optimizer._clip_gradients = make(private(optimizer, "_clip_gradients"))


def leave_out_reduction(optimizer: Any) -> None:
    """Stops an optimizer from summing gradients over the replicas of `tf.distribute` after clipping."""
    private(optimizer, "_all_reduce_sum_gradients")
    optimizer._all_reduce_sum_gradients = list


def update_of(kind: type) -> Callable:
    """Returns a class's function `update(optimizer, gradient, variable, learning_rate)` for one variable."""
    return private(kind, "update_step")


def has_own_update(optimizer: Any) -> bool:
    """Returns whether this object itself, not its class, has an update function."""
    return "update_step" in vars(optimizer)


def replace_update(optimizer: Any, update: Callable) -> None:
    """Replaces an optimizer's `update(gradient, variable, learning_rate)`, which Keras calls once per variable."""
    private(optimizer, "update_step")
    optimizer.update_step = update


def adam_slots(optimizer: keras.optimizers.Adam, variable: Any) -> tuple[Any, Any]:
    """Returns a variable's slots for the mean of the gradient and of its square."""
    place = _place(optimizer, variable)
    return private(optimizer, "_momentums")[place], private(optimizer, "_velocities")[place]


def sgd_slot(optimizer: keras.optimizers.SGD, variable: Any) -> Any:
    """Returns a variable's slot for the momentum."""
    return optimizer.momentums[_place(optimizer, variable)]


def _place(optimizer: Any, variable: Any) -> int:
    return private(optimizer, "_get_variable_index")(variable)


def momentum_slots(optimizer: Any) -> list[Any]:
    """Returns the slots in which SGD or RMSprop sums `learning_rate * gradient`; none without momentum.

    None of other optimizers either: those with a `momentum`, such as Muon, leave the rate out of the sum.
    """
    names = {keras.optimizers.SGD: "momentums", keras.optimizers.RMSprop: "_momentums"}
    name = next((name for kind, name in names.items() if isinstance(optimizer, kind)), None)
    if name is None or not optimizer.built or not optimizer.momentum:
        return []
    return [slot for slot in private(optimizer, name) if slot is not None]


def role_of_slot(slot: Any, variable: Any) -> str | None:
    """Returns a slot's role (momentum, velocity, ...), which only its name shows; None for another variable's slot."""
    mark = f"{variable.path.replace('/', '_')}_"
    return slot.name.removeprefix(mark) if slot.name.startswith(mark) else None


# ---- Models ---------------------------------------------------------------------------------------------------------


def layers_of(model: Any, include_self: bool = True) -> list[Any]:
    """Returns a model or layer and all layers inside it, at any depth."""
    return private(model, "_flatten_layers")(include_self=include_self)


def keep_policies_of_parts(model: keras.Model) -> None:
    """Makes layers that are made of layers, such as `MultiHeadAttention`, save how these are quantized.

    Their configuration has one dtype policy. A `DTypePolicyMap` has one for each part, by its path.
    """
    for layer in layers_of(model, include_self=False):
        parts = {part.path: part.dtype_policy for part in layers_of(layer, include_self=False)}
        quantized = {path: policy for path, policy in parts.items() if policy.quantization_mode}
        if quantized and not isinstance(layer, keras.Model):
            layer.dtype_policy = keras.dtype_policies.DTypePolicyMap(layer.dtype_policy, quantized)


def keep_zero_points(layer: Any) -> None:
    """Makes a layer that GPTQ has quantized save its zero points: Keras 3.15 leaves them out, and cannot open it."""
    private(layer, "_get_kernel_with_merged_lora")
    layer._get_kernel_with_merged_lora = lambda: (None, None, layer.kernel_zero)


def strategy_of(model: keras.Model) -> tf.distribute.Strategy | None:
    """Returns the `tf.distribute` strategy in whose scope a model was created, or None."""
    return private(model, "_distribute_strategy")


def first_epoch(model: keras.Model) -> int | None:
    """Returns the first epoch of `fit` if a callback has set it; it takes precedence over `initial_epoch`."""
    return private(model, "_initial_epoch")


def set_first_epoch(model: keras.Model, epoch: int | None) -> None:
    """Makes `fit` start with `epoch`, if called in `on_train_begin`; None makes it use `initial_epoch`."""
    first_epoch(model)
    model._initial_epoch = epoch


def build_on(model: keras.Model, batch: Any) -> None:
    """Builds layers, optimizer and the metrics' states, for a batch of `keras.KerasTensor`."""
    private(model, "_symbolic_build")(data_batch=batch)


def replace_next_epoch_logs(model: keras.Model, make: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replaces the logs of the next epoch that ends in `fit`.

    Args:
        model: the model that is trained.
        make: takes the last step's logs, empty if the epoch had no step, and returns the logs to use instead.
    """
    original = private(model, "_get_metrics_result_or_logs")

    def result(logs: dict[str, Any]) -> dict[str, Any]:
        del model.__dict__["_get_metrics_result_or_logs"]
        return original(make(logs))

    model.__dict__["_get_metrics_result_or_logs"] = result


def results_in_order(model: keras.Model, results: dict[str, Any]) -> list[Any] | Any:
    """Converts results by name to the result of `evaluate`: a list in the order of the metrics, or the only result."""
    return private(model, "_flatten_metrics_in_order")(results)


def function_of_metric(metric: keras.metrics.MeanMetricWrapper) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns the function of a metric that averages what it returns, and its options."""
    return private(metric, "_fn"), private(metric, "_fn_kwargs")


def loss_tracker(model: keras.Model) -> keras.metrics.Metric:
    """Returns the metric that averages the loss of a compiled model."""
    return private(model, "_loss_tracker")


def compiled_losses(model: keras.Model) -> list[tuple[float, keras.metrics.Metric | None]]:
    """Returns the losses of a compiled model, in the order in which `compute_loss` calls them; empty if unbuilt.

    Returns:
        For each its loss weight, and the metric that averages it; None if it is the model's only loss.
    """
    compiled = private(model, "_compile_loss")
    losses = private(compiled, "_flat_losses") if compiled is not None else None
    metrics = compiled.metrics if compiled is not None else []
    pairs = itertools.zip_longest(losses or [], metrics)
    return [(1.0 if loss[2] is None else float(loss[2]), metric) for loss, metric in pairs]


def clear_losses(model: keras.Model) -> None:
    """Clears the losses that layers have added. Keras does so whenever the whole model is called."""
    private(model, "_clear_losses")()


def graph_of(model: keras.Model) -> Any | None:
    """Returns the functional model behind a functional or sequential one; None for other or unbuilt models."""
    graph = private(model, "_functional") if isinstance(model, keras.Sequential) else model
    return graph if isinstance(graph, keras.Function) else None


def inputs_in(graph: Any, layer: Any) -> list[list[Any]]:
    """Returns the symbolic tensors on which a functional model calls one of its layers, for each call."""
    nodes = [node for _, nodes in sorted(private(graph, "_nodes_by_depth").items(), reverse=True) for node in nodes]
    return [node.input_tensors for node in nodes if node.operation is layer]


def has_mask(tensor: Any) -> bool:
    """Returns whether a symbolic tensor has a mask, such as that of `Embedding(mask_zero=True)`."""
    _check_masks()
    return getattr(tensor, "_keras_mask", None) is not None


@functools.cache
def _check_masks() -> None:
    if getattr(keras.layers.Masking(name="hvdkit_probe")(keras.Input([1, 1])), "_keras_mask", None) is None:
        raise missing_in_keras("KerasTensor._keras_mask")


def operation_of(tensor: Any) -> Any:
    """Returns the layer or operation that produces a symbolic tensor."""
    return private(tensor, "_keras_history").operation


def consumers_of(operation: Any) -> list[Any]:
    """Returns the layers and operations that consume an operation's outputs, once per call."""
    return [node.operation for node in private(operation, "_outbound_nodes")]


# ---- Layers ---------------------------------------------------------------------------------------------------------


def moments_of_keras() -> Callable:
    """Returns BatchNormalization's function `moments(layer, inputs, mask) -> (mean, variance)`."""
    return private(keras.layers.BatchNormalization, "_moments")


def replace_moments(moments: Callable) -> None:
    """Replaces that function, in all layers; Keras calls it in training only."""
    moments_of_keras()
    keras.layers.BatchNormalization._moments = moments


def reduction_axes(layer: keras.layers.BatchNormalization) -> list[int]:
    """Returns the axes of the inputs over which a built layer computes its moments."""
    return private(layer, "_reduction_axes")


class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """Keras' layer; a subclass may replace the output projection by overriding `output_projection`."""

    def __init__(self, *args: Any, **config: Any) -> None:
        private(keras.layers.MultiHeadAttention, "_make_output_dense")
        super().__init__(*args, **config)

    def output_projection(self, keras_own: keras.layers.EinsumDense) -> keras.layers.EinsumDense:
        """Returns the layer to use in place of Keras' own."""
        return keras_own

    def _make_output_dense(self, *args: Any, **kwargs: Any) -> keras.layers.EinsumDense:
        return self.output_projection(super()._make_output_dense(*args, **kwargs))


# ---- Callbacks ------------------------------------------------------------------------------------------------------


class ModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Keras' callback; a subclass may prevent it from writing by overriding `may_write`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        private(keras.callbacks.ModelCheckpoint, "_save_model")
        super().__init__(*args, **options)

    def may_write(self) -> bool:
        """Returns whether this process writes."""
        return True

    def _save_model(self, *args: Any, **kwargs: Any) -> None:
        if self.may_write():
            super()._save_model(*args, **kwargs)


def attributes_of_callback(callback: Any) -> dict[str, Any]:
    """Returns a callback's attributes without those that Keras sets on all callbacks."""
    given = {"model", "_model", "params", "validation_data"}
    return {name: value for name, value in vars(callback).items() if name not in given}


def attributes_of_own_class(thing: Any) -> dict[str, Any]:
    """Returns the attributes that the user's class of a layer, model or metric has; none for Keras' own classes.

    Keras makes lists and dicts in them to its own kinds, which this makes plain again.
    """
    if type(thing).__module__.startswith("keras."):
        return {}
    own = {name: value for name, value in vars(thing).items() if name not in _attributes_of_keras()}
    return {n: list(v) if isinstance(v, list) else dict(v) if isinstance(v, dict) else v for n, v in own.items()}


@functools.cache
def _attributes_of_keras() -> frozenset[str]:
    layer = keras.layers.Identity(name="hvdkit_probe")
    model = keras.Sequential([keras.Input([1]), layer], name="hvdkit_probe")
    model.compile("sgd", "mse", jit_compile=False)
    return frozenset(
        name for example in (layer, model, keras.metrics.Metric(name="hvdkit_probe")) for name in vars(example)
    )


def chooses_direction_late(callback: Any) -> bool:
    """Returns whether a callback decides, or has decided, at the end of the first epoch whether less is better."""
    return hasattr(callback, "_set_monitor_op") and hasattr(callback, "monitor_op")


def choose_direction(callback: Any) -> None:
    """Makes such a callback decide now, at most once: Keras flips the sign of `min_delta` each time."""
    if callback.monitor_op is None:
        private(callback, "_set_monitor_op")()


def less_is_better(model: keras.Model, metric: str) -> bool | None:
    """Returns whether Keras finds that a smaller value of a metric in the logs is better; None if it cannot tell."""
    judge = keras.callbacks.EarlyStopping(metric)
    judge.set_model(model)
    try:
        choose_direction(judge)
    except ValueError:
        return None
    return None if judge.monitor_op is None else bool(judge.monitor_op(1.0, 2.0))


def tensorboard_counters(callback: keras.callbacks.TensorBoard) -> dict[str, int]:
    """Returns the counters with which TensorBoard numbers batches and epochs, by attribute."""
    found = {name: value for name, value in vars(callback).items() if name.startswith("_global_")}
    if "_global_train_batch" not in found:
        raise missing_in_keras("TensorBoard._global_train_batch")
    return found


def csv_state(callback: keras.callbacks.CSVLogger) -> dict[str, Any]:
    """Returns what a `CSVLogger` has written, text and columns; empty before the end of the first epoch."""
    if callback.csv_file is None or callback.keys is None:
        return {}
    with open(callback.filename, encoding="utf-8", newline="") as file:  # noqa: PTH123 - as Keras opens it
        return {"text": file.read(), "keys": list(callback.keys)}


def restore_csv(callback: keras.callbacks.CSVLogger, state: dict[str, Any]) -> None:
    """Undoes what was written since `csv_state`."""
    with open(callback.filename, "w", encoding="utf-8", newline="") as file:  # noqa: PTH123
        file.write(state["text"])
    callback.csv_file.seek(0, 2)  # Keras has the file open, and continues to write
    callback.keys, callback.append_header = state["keys"], False
