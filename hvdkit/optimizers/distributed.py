"""`DistributedOptimizer`: any Keras 3 optimizer, applied to the gradients of all ranks.

Keras 3 updates weights through `Optimizer.apply`, which Horovod's own Keras layer does not support. This module wraps
the user's optimizer in a transparent proxy that changes one thing: `apply` receives the average over all ranks.
Everything after it (loss scale, clipping, weight decay, EMA, the update itself) sees the same values as one process
that trains on the global batch.

It is a proxy rather than a dynamically created subclass, because its class, configuration and state are those of the
user's optimizer. So `model.save` writes a plain Keras file, and `isinstance`, learning-rate callbacks and attribute
access work as before.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives.mesh import mesh_of, shard_of
from hvdkit.collectives.traffic import elements, ring_bytes
from hvdkit.compat import call_stack
from hvdkit.compat.horovod_arguments import of_both_modules
from hvdkit.compat.keras3 import gradient_accumulators, moving_averages, trained_variables
from hvdkit.compression import Compression, ErrorFeedback
from hvdkit.errors import UsageError
from hvdkit.optimizers import before_update, clipping, loss_scale, weighing
from hvdkit.optimizers.exchanging import ExchangingOptimizer
from hvdkit.optimizers.gradients import Gradient, GradientExchange, weights_of
from hvdkit.optimizers.parts import parts_of


class DistributedOptimizer(ExchangingOptimizer):
    """Wraps a Keras optimizer and averages gradients over all ranks before it applies them.

    For an optimizer of TensorFlow 1 (`tf.compat.v1.train`) the result is Horovod's own wrapper, for TF 1 graphs.

    Args:
        optimizer: any `keras.optimizers.Optimizer`. Under the global policy `mixed_float16` it is wrapped in a
            `LossScaleOptimizer` first, instead of by `Model.compile` later. The ranks then check the *averaged*
            gradients for overflow and skip a step together. If a `LossScaleOptimizer` wraps this optimizer instead, the
            ranks synchronize the overflow check with one more allreduce, of a few numbers.
        name: prefix of the names of the collectives.
        device_dense: ignored, accepted for compatibility with Horovod: gradients are sent from the device they are on.
        device_sparse: likewise.
        compression: `hvdkit.Compression.none`, `.fp16` or `.bf16`, or a class with the same two methods; or a
            compressor with error feedback: `.int8()`, `.onebit()`, `.topk(fraction)`, `.powersgd(rank)`.
        sparse_as_dense: converts sparse gradients (of embeddings) to dense ones. Off by default: Keras' adaptive
            optimizers update only the rows in a sparse gradient, so a dense gradient gives other results.
        gradient_predivide_factor: divides gradients by this factor before the sum over ranks, and by size / factor
            after it. It helps where gradients are so large that their sum overflows in the format in which they are
            sent. Needs `op=hvdkit.Average`.
        op: `hvdkit.Average` (the default), `hvdkit.Sum` or `hvdkit.Adasum`. With Adasum each rank's optimizer takes
            its own step, and the steps are combined (see `hvdkit.collectives.adasum`); slots then differ between ranks.
        backward_passes_per_step: allreduce and apply the sum of the gradients every so many calls. This switches on
            Keras' gradient accumulation in `optimizer`, with one allreduce at its end. An optimizer that already has
            `gradient_accumulation_steps` allreduces at that interval without this argument.
        average_aggregated_gradients: apply the mean of these gradients instead of their sum.
        num_groups: old name of `groups`.
        groups: a number of groups, starting with the last layers; or a list of lists of variables that are sent
            together, where each variable in no list is sent by itself. By default hvdkit chooses: between hosts,
            buckets of some megabytes are sent during the backward pass; elsewhere a single group is faster.
        process_set: the Horovod process set whose ranks take part; by default all. Other ranks send no gradients.
        scale_local_gradients: divide the gradients of local variables by the number of ranks, as averaging does for the
            others.
        use_locking: ignored, accepted for compatibility with Horovod.

    Positional arguments may also have the order of `horovod.tensorflow.DistributedOptimizer`.

    Raises:
        TypeError: `optimizer` is not a Keras 3 optimizer, or is already wrapped.
        ValueError: an argument is invalid, or conflicts with another.

    References: A. Sergeev and M. Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", 2018,
    https://arxiv.org/abs/1802.05799; the arguments are those of `horovod.tensorflow.keras.DistributedOptimizer` 0.28.1.
    """

    def __new__(cls, optimizer: Any = None, *args: Any, **options: Any) -> Any:
        """Makes Horovod's own wrapper of an optimizer of TensorFlow 1."""
        if cls is DistributedOptimizer and isinstance(optimizer, tf.compat.v1.train.Optimizer):
            return world.horovod().DistributedOptimizer(optimizer, *args, **options)
        return super().__new__(cls)

    @of_both_modules(
        "optimizer name use_locking device_dense device_sparse compression sparse_as_dense backward_passes_per_step op "
        "gradient_predivide_factor average_aggregated_gradients num_groups groups process_set scale_local_gradients"
    )
    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        name: str | None = None,
        device_dense: str = "",
        device_sparse: str = "",
        compression: Any = Compression.none,
        sparse_as_dense: bool = False,
        gradient_predivide_factor: float = 1.0,
        op: Any = None,
        backward_passes_per_step: int = 1,
        average_aggregated_gradients: bool = False,
        num_groups: int = 0,
        groups: int | Sequence[Sequence[Any]] | None = None,
        process_set: Any = None,
        scale_local_gradients: bool = True,
        use_locking: bool = False,
    ) -> None:
        _refuse_what_is_no_optimizer(optimizer)
        exchange = GradientExchange(
            # Use the class name: Keras numbers optimizer names, so they differ on a rank that made one more optimizer.
            name=name or f"Distributed{type(optimizer).__name__}",
            compression=compression,
            sparse_as_dense=sparse_as_dense,
            op=op,
            process_set=process_set,
            gradient_predivide_factor=gradient_predivide_factor,
            groups=_replace_num_groups(num_groups, groups),
            scale_local_gradients=scale_local_gradients,
        )
        optimizer = loss_scale.with_loss_scale(optimizer)
        super().__init__(optimizer, exchange)
        self._self_gradients = exchange
        self._self_factor = 1 if average_aggregated_gradients else backward_passes_per_step
        _accumulate(optimizer, backward_passes_per_step)
        self._self_variables: list[Any] | None = None
        self._self_exchanges_inside = self._exchanges_where_accumulated()
        self._hook_into_updates()
        if optimizer.built and mesh_of(trained := trained_variables(optimizer)) is not None:
            self._prepare_exchange(trained)  # the model was compiled first, as Model.compile_from_config does

    def apply(self, grads: Sequence[Gradient], trainable_variables: Sequence[Any] | None = None) -> None:
        """Reduces `grads` over the ranks and applies the result.

        Args:
            grads: this rank's gradients, one per variable: `tf.Tensor`, `tf.IndexedSlices` or None.
            trainable_variables: their variables; by default those that the optimizer was built with.
        """
        exchange = self._self_gradients
        self._hook_into_updates()  # another wrapper of this optimizer may have replaced the hooks
        if exchange.is_alone():
            self.__wrapped__.apply(list(grads), trainable_variables)
            return
        call_stack.refuse_xla()
        weighing.warn_of_unweighed()
        clipping.warn_of_clipped(grads)
        loss_scale.refuse_a_branch_of_this_rank(self.__wrapped__, exchange)
        if trainable_variables is None:
            trainable_variables = trained_variables(self.__wrapped__)
        variables = list(trainable_variables)
        if not exchange.is_adasum():
            grads = exchange.complete(grads, variables)
        self._self_variables = [v for g, v in zip(grads, variables, strict=True) if g is not None]
        if exchange.is_adasum():
            self._apply_by_adasum(list(grads), variables)
        elif self._self_exchanges_inside:
            exchange.used = True  # in eager training nothing else shows it before the first update
            shared = [i for i, v in enumerate(variables) if not exchange.is_local(v)]
            exchange.announce(grads, variables, f"{exchange.name}.accumulated", shared)
            self.__wrapped__.apply(list(grads), variables)
        else:
            self.__wrapped__.apply(exchange(grads, variables), variables)

    def build(self, variables: Sequence[Any]) -> None:
        """Builds the optimizer, and makes a `LossScaleOptimizer` around it check for overflow on all ranks.

        Raises:
            UsageError: the variables are shards of a model, and the optimizer needs whole variables.
        """
        outer = call_stack.loss_scale_in_build()
        if outer is not None:
            loss_scale.judge_overflow_together(outer, self._self_gradients)
        self.__wrapped__.build(variables)
        self._prepare_exchange(variables)

    def _prepare_exchange(self, variables: Sequence[Any]) -> None:
        self._self_gradients.build(variables)
        if mesh_of(variables) is not None:
            _refuse_what_looks_at_whole_variables(parts_of(self.__wrapped__), variables)
            for part in parts_of(self.__wrapped__):
                if isinstance(part, keras.optimizers.LossScaleOptimizer):  # ranks see gradients of different weights
                    loss_scale.judge_overflow_together(part, self._self_gradients)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Sets variables to their moving averages if the optimizer keeps these; a collective call where ranks differ.

        Args:
            var_list: the variables that the optimizer was built with.
        """
        if self._self_gradients.is_adasum():
            self._average_moving_averages()
        self.__wrapped__.finalize_variable_values(var_list)

    @property
    def variables(self) -> list[Any]:
        """The optimizer's variables, and the state of the compressor."""
        return [*self.__wrapped__.variables, *self._self_gradients.state()]

    @property
    def compression(self) -> ErrorFeedback | None:
        """The compressor with error feedback, or None."""
        return self._self_gradients.feedback

    def wire_bytes(self, variables: Sequence[Any]) -> tuple[float, float]:
        """Returns the bytes that a rank sends per step for gradients of these variables, compressed and uncompressed.

        Assumes a ring allreduce, as in Horovod and Gloo. Sparse gradients count as dense ones.
        """
        exchange = self._self_gradients
        sent, whole = exchange.wire_bytes([tuple(v.shape) for v in variables if not exchange.is_local(v)])
        shards = [v for v in variables if shard_of(v) is not None]
        mesh = mesh_of(shards)
        own = ring_bytes(4 * elements([tuple(v.shape) for v in shards]), mesh.data) if mesh else 0
        return sent + own, whole + own

    def register_local_var(self, var: Any) -> None:
        """Keeps the gradient of `var` (a Keras or TensorFlow variable) on this rank: each rank trains its own copy.

        Also pass the variable to `hvdkit.callbacks.BroadcastGlobalVariablesCallback(local_variables=...)`.
        """
        self._self_gradients.register_local(var)

    def keeps_local(self, variable: Any) -> bool:
        """Returns whether a weight, or a slot of this optimizer, differs between ranks.

        Slots differ under Adasum, and so do slots of local variables. Keras' slots do not name their variable, so all
        slots count as local once one variable does. Gradients that a rank accumulates are its own until the update,
        which may be in a later `fit`.
        """
        exchange = self._self_gradients
        if self._self_exchanges_inside and not exchange.is_alone():
            parts = parts_of(self.__wrapped__)
            if any(variable is v for part in parts for v in gradient_accumulators(part)):
                return True
        if exchange.feedback and any(variable is v for v in exchange.feedback.own):
            return True
        own_slots = exchange.is_adasum() or exchange.has_local()
        return exchange.is_local(variable) or (own_slots and any(variable is v for v in self.__wrapped__.variables))

    def _exchanges_where_accumulated(self) -> bool:
        return _accumulates(self.__wrapped__) and not self._self_gradients.is_adasum()

    def _hook_into_updates(self) -> None:
        """Installs the hooks that run between accumulation and the update.

        With gradient accumulation this includes the gradient allreduce. It runs in a branch that all ranks take every N
        calls.
        """
        for part in parts_of(self.__wrapped__):
            if isinstance(part, keras.optimizers.LossScaleOptimizer):
                if self._self_exchanges_inside:  # this optimizer decides at each call whether the branch runs
                    loss_scale.judge_overflow_together(part, self._self_gradients)
                continue
            before_update.hook(
                part,
                exchange=self._exchange_accumulated if self._self_exchanges_inside else None,
                clip=functools.partial(self._clip_over_shards, part),
            )

    def _exchange_accumulated(self, grads: list[Gradient]) -> list[Gradient]:
        variables = self._self_variables
        if variables is not None and len(variables) != len(grads):  # a part of a MultiOptimizer
            variables = None
        grads = self._self_gradients(grads, variables)
        return [g if g is None else g * tf.cast(self._self_factor, g.dtype) for g in grads]

    def _clip_over_shards(self, part: Any, grads: list[Gradient], keras_clip: Callable) -> list[Gradient]:
        return clipping.clip_over_shards(part, self._self_variables or [], grads, keras_clip)

    def _apply_by_adasum(self, grads: list[Gradient], variables: list[Any]) -> None:
        """Takes this rank's own step and replaces it with the Adasum combination of all ranks' steps."""
        exchange = self._self_gradients
        shared = [v for v in variables if not exchange.is_local(v)]
        starts = [tf.identity(v.value) for v in shared]
        self.__wrapped__.apply(grads, variables)
        steps = exchange([tf.identity(v.value) - start for v, start in zip(shared, starts, strict=True)])
        for variable, start, step in zip(shared, starts, steps, strict=True):
            variable.assign(start + step)
            constrain(variable)  # the optimizer did so before the steps were combined

    def _average_moving_averages(self) -> None:
        """Sets the moving averages of weights (`use_ema`) to their mean over ranks, which each compute their own."""
        exchange = self._self_gradients
        if exchange.is_alone():
            return
        averages = []
        for part in parts_of(self.__wrapped__):
            if part.use_ema and part.built:
                pairs = zip(trained_variables(part), moving_averages(part), strict=True)
                averages += [average for v, average in pairs if average is not None and not exchange.is_local(v)]
        if averages:
            collectives.average_variables(averages, exchange.process_set)


def constrain(variable: Any, like: Any = None) -> None:
    """Applies the constraint of the variable `like`, by default the variable's own, if there is one."""
    constraint = getattr(variable if like is None else like, "constraint", None)
    if constraint is not None:
        variable.assign(constraint(variable))


def _refuse_what_looks_at_whole_variables(
    parts: Sequence[keras.optimizers.Optimizer], variables: Sequence[Any]
) -> None:
    """Raises a `UsageError` if an optimizer takes norms or means of whole variables, but has only shards of them."""
    if not any(shard is not None and shard.axis is not None for shard in map(shard_of, variables)):
        return
    looks = {cls.__name__ for part in parts for cls in type(part).__mro__} & {"Adafactor", "Lamb", "Muon"}
    if looks:
        raise UsageError(
            f"{looks.pop()} looks at whole variables, and of this divided model each rank has a part of them. Use "
            f"another optimizer, such as Adam, or a pipeline."
        )


def PartialDistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = None,
    groups: int | Sequence[Sequence[Any]] | None = None,
    process_set: Any = None,
    local_layers: keras.layers.Layer | Sequence[keras.layers.Layer] | None = None,
    scale_local_gradients: bool = True,
) -> DistributedOptimizer:
    """Returns a `DistributedOptimizer` that keeps the weights of some layers local to each rank.

    Args:
        local_layers: one or several layers, already built, whose gradients stay on this rank.

    The other arguments are those of `DistributedOptimizer`.

    Raises:
        TypeError: `local_layers` contains something other than layers.
        ValueError: a local layer is not built, so its weights do not exist yet.
    """
    distributed = DistributedOptimizer(
        optimizer,
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    for variable in weights_of(local_layers):
        distributed.register_local_var(variable)
    return distributed


# Otherwise `inspect` would show the signature of `__new__` instead of that of `__init__`.
DistributedOptimizer.__new__.__signature__ = inspect.signature(DistributedOptimizer.__init__)  # type: ignore[attr-defined]


def scaled(learning_rate: float) -> float:
    """Returns the learning rate for the global batch: `learning_rate` times the number of ranks.

    This is the linear scaling rule of P. Goyal et al., "Accurate, Large Minibatch SGD", 2017,
    https://arxiv.org/abs/1706.02677, section 2.1. Use it together with a warm-up.
    """
    return learning_rate * world.size()


def keeps_local(optimizer: Any, variable: Any) -> bool:
    """Returns whether a `DistributedOptimizer`, at any depth inside `optimizer`, keeps a weight or slot local."""
    if isinstance(optimizer, DistributedOptimizer):
        return optimizer.keeps_local(variable)
    inner = getattr(optimizer, "inner_optimizer", None)
    return inner is not None and keeps_local(inner, variable)


def all_ranks_train(optimizers: Sequence[ExchangingOptimizer]) -> bool:
    """Returns whether all ranks of the job train this model; if not, some ranks may not call `fit` at all."""
    sets = [o._self_gradients.process_set for o in optimizers if isinstance(o, DistributedOptimizer)]
    return bool(optimizers) and all(s.process_set_id == 0 for s in sets)


def _refuse_what_is_no_optimizer(optimizer: Any) -> None:
    if any(isinstance(part, ExchangingOptimizer) for part in _all_parts(optimizer)):
        raise TypeError(
            f"The optimizer {optimizer.name!r} is a DistributedOptimizer already; wrapping it twice would average "
            f"twice. Pass the optimizer that is inside."
        )
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return
    module = type(optimizer).__module__
    if isinstance(optimizer, str):
        fix = f"Write keras.optimizers.get({optimizer!r})."
    elif "legacy" in module or module.split(".")[0] in ("tf_keras", "tensorflow"):
        fix = (
            f"That is an optimizer of Keras 2 or TensorFlow; write keras.optimizers.{type(optimizer).__name__}(...), "
            f"with learning_rate for lr, and a keras.optimizers.schedules schedule for decay."
        )
    else:
        fix = "Pass an instance such as keras.optimizers.Adam(1e-3)."
    raise TypeError(
        f"DistributedOptimizer needs a keras.optimizers.Optimizer, but was given {optimizer!r} "
        f"of type {module}.{type(optimizer).__name__}. {fix}"
    )


def _all_parts(optimizer: Any) -> list[Any]:
    return parts_of(optimizer) if isinstance(optimizer, keras.optimizers.Optimizer) else [optimizer]


def _replace_num_groups(num_groups: int, groups: Any) -> Any:
    if not num_groups:
        return groups
    warnings.warn("num_groups is Horovod's old name of groups: write groups.", DeprecationWarning, stacklevel=3)
    return num_groups if groups is None else groups


def _accumulate(optimizer: keras.optimizers.Optimizer, passes: int) -> None:
    """Switches on Keras' gradient accumulation in each part that applies updates."""
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"backward_passes_per_step must be 1 or more, but is {passes!r}.")
    if passes == 1:
        return
    for part in parts_of(optimizer):
        if part.gradient_accumulation_steps:
            raise ValueError(
                f"backward_passes_per_step={passes} and gradient_accumulation_steps={part.gradient_accumulation_steps} "
                f"of {type(part).__name__} are two names of one thing: give one of them."
            )
        if part.built:
            raise ValueError(
                f"backward_passes_per_step={passes} adds slots to the optimizer, but {type(part).__name__} is built "
                f"already: wrap it before it is used, or give it gradient_accumulation_steps={passes} when it is made."
            )
    for part in parts_of(optimizer):
        if not hasattr(part, "inner_optimizer") and not hasattr(part, "optimizers"):
            part.gradient_accumulation_steps = passes


def _accumulates(optimizer: keras.optimizers.Optimizer) -> bool:
    return any(part.gradient_accumulation_steps for part in parts_of(optimizer))
