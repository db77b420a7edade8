"""`DistributedOptimizer`: any Keras 3 optimizer, fed with the gradients of all ranks.

Keras 3 updates weights through `Optimizer.apply`, which Horovod's own Keras layer does not know. Here the user's
optimizer is kept whole, inside a transparent proxy that changes one thing: what reaches `apply` is the average over all
ranks. Everything after it (loss scale, clipping, weight decay, EMA, the update itself) then sees what one process
with the global batch would see.

A proxy rather than a subclass made on the fly, because it *is* the user's optimizer for everyone who asks: its class,
its configuration and its state are the inner one's. So `model.save` writes a plain Keras file, and `isinstance`,
learning-rate callbacks and attribute access work as before.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import keras
import tensorflow as tf
import wrapt

from hvdkit import collectives, world
from hvdkit.compression import Compression

Gradient = Any  # tf.Tensor, tf.IndexedSlices or None

Average = "Average"
Sum = "Sum"


class ExchangingOptimizer(wrapt.ObjectProxy):
    """A Keras optimizer whose gradients pass through `exchange` on their way to `apply`.

    Args:
        optimizer: the optimizer that everything else is left to.
        exchange: maps this replica's gradients (`tf.Tensor`, `tf.IndexedSlices` or None) to those that are applied.
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, exchange: Callable[[list[Gradient]], list[Gradient]]
    ) -> None:
        super().__init__(optimizer)
        self._self_exchange = exchange

    def apply(self, grads: Sequence[Gradient], trainable_variables: Sequence[Any] | None = None) -> None:
        """Exchanges `grads` with the other replicas and applies the result.

        Args:
            grads: this replica's gradients: `tf.Tensor`, `tf.IndexedSlices` or None, one a variable.
            trainable_variables: their variables; by default those that the optimizer was built with.
        """
        _refuse_inner_place()
        self.__wrapped__.apply(self._self_exchange(list(grads)), trainable_variables)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Gradient, Any]]) -> Any:
        """Exchanges and applies `(gradient, variable)` pairs, and returns the iteration counter."""
        grads, variables = zip(*grads_and_vars, strict=True)
        self.apply(grads, list(variables))
        return self.iterations


class DistributedOptimizer(ExchangingOptimizer):
    """Wraps a Keras optimizer so that gradients are averaged over all ranks before they are applied.

    Args:
        optimizer: any `keras.optimizers.Optimizer`. Under the global policy `mixed_float16` it is put into a
            `LossScaleOptimizer` first, as `Model.compile` would do around it: the ranks then judge the *averaged*
            gradients, and skip a step with an overflow together.
        name: prefix of the exchanges' names; needed only to tell apart two optimizers used in one step.
        compression: `hvdkit.Compression.none`, `.fp16` or `.bf16`, or a class with the same two methods.
        sparse_as_dense: turns sparse gradients (of embeddings) into dense ones. Off by default: Keras' adaptive
            optimizers update only the rows that a sparse gradient names, so a dense one trains another model.
        op: `hvdkit.Average` or `hvdkit.Sum`.
        process_set: the Horovod process set whose ranks take part; by default all.

    Raises:
        TypeError: `optimizer` is not a Keras optimizer, or is wrapped already.
        ValueError: `op` is unknown.

    Reference: A. Sergeev and M. Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", 2018,
    https://arxiv.org/abs/1802.05799.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        name: str | None = None,
        compression: Any = Compression.none,
        sparse_as_dense: bool = False,
        op: str = Average,
        process_set: Any = None,
    ) -> None:
        _check(optimizer, op)
        exchange = GradientExchange(
            # By class: Keras numbers the optimizers' names, differently on a rank that has made one more.
            name=name or f"Distributed{type(optimizer).__name__}",
            compression=compression,
            sparse_as_dense=sparse_as_dense,
            average=op == Average,
            process_set=process_set,
        )
        super().__init__(with_loss_scale(optimizer), exchange)


class GradientExchange:
    """Averages a list of gradients over ranks: the function that `DistributedOptimizer` puts before `apply`.

    Dense gradients travel in one group and come back dense. Sparse ones are gathered, rows and indices, and stay
    `tf.IndexedSlices`. None stays None.
    """

    def __init__(self, name: str, compression: Any, sparse_as_dense: bool, average: bool, process_set: Any) -> None:
        self._name = name
        self._compression = compression
        self._sparse_as_dense = sparse_as_dense
        self._average = average
        self._process_set = process_set or world.horovod().global_process_set

    def __call__(self, grads: list[Gradient]) -> list[Gradient]:
        """Returns the gradients' average over all ranks, in the order given."""
        if world.size() == 1 or self._process_set.size() == 1:
            return grads
        if self._sparse_as_dense:
            grads = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in grads]
        # By position: the order of the variables is the order in which the layers were made, the same on all ranks.
        result = list(grads)
        dense = [i for i, g in enumerate(grads) if g is not None and not isinstance(g, tf.IndexedSlices)]
        for place, tensor in zip(dense, self._exchange_dense([grads[i] for i in dense]), strict=True):
            result[place] = tensor
        for place, grad in enumerate(grads):
            if isinstance(grad, tf.IndexedSlices):
                result[place] = self._exchange_sparse(grad, f"{self._name}.sparse{place}")
        return result

    def _exchange_dense(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        if not tensors:
            return []
        wires, contexts = zip(*[self._compression.compress(tf.convert_to_tensor(t)) for t in tensors], strict=True)
        reduced = collectives.average_dense(
            wires, f"{self._name}.dense", average=self._average, process_set=self._process_set
        )
        return [self._compression.decompress(t, c) for t, c in zip(reduced, contexts, strict=True)]

    def _exchange_sparse(self, grad: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        wire, context = self._compression.compress(grad.values)
        values = collectives.gather_rows(wire, f"{name}.values", self._process_set)
        values = self._compression.decompress(values, context)
        if self._average:
            values = values / tf.cast(self._process_set.size(), values.dtype)
        indices = collectives.gather_rows(grad.indices, f"{name}.indices", self._process_set)
        return tf.IndexedSlices(values, indices, grad.dense_shape)


def scaled(learning_rate: float) -> float:
    """The learning rate for the job's global batch: `learning_rate` times the number of ranks.

    The linear scaling rule of P. Goyal et al., "Accurate, Large Minibatch SGD", 2017,
    https://arxiv.org/abs/1706.02677, section 2.1; use it together with a warm-up.
    """
    return learning_rate * world.size()


def _check(optimizer: Any, op: str) -> None:
    if isinstance(optimizer, ExchangingOptimizer):
        raise TypeError(
            f"The optimizer {optimizer.name!r} is a DistributedOptimizer already; wrapping it twice would average "
            f"twice. Pass the optimizer that is inside."
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"DistributedOptimizer needs a keras.optimizers.Optimizer, but was given {optimizer!r} "
            f"of type {type(optimizer).__module__}.{type(optimizer).__name__}. Optimizers by name are made with "
            f"keras.optimizers.get(...); those of Keras 2 (tf_keras) do not work with Keras 3."
        )
    if op not in (Average, Sum):
        raise ValueError(f"op must be hvdkit.Average or hvdkit.Sum, but is {op!r}.")


def with_loss_scale(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Puts an optimizer into a `LossScaleOptimizer` if the global dtype policy is `mixed_float16`."""
    half = keras.config.dtype_policy().name == "mixed_float16"
    if half and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def _refuse_inner_place() -> None:
    """Stops a hang before it happens: an exchange inside `LossScaleOptimizer`'s branch "gradients are finite".

    A rank whose gradients overflow would not take that branch, and the others would wait for it for ever. Only the
    call stack tells: the outer optimizer leaves no mark on the inner one. In a graph this runs once, at its tracing.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if (
            type(caller) is keras.optimizers.LossScaleOptimizer
            and frame.f_code.co_name == "_stateful_handle_finite_grads"
        ):
            raise RuntimeError(_INNER_PLACE)
        frame = frame.f_back


_INNER_PLACE = (
    "A DistributedOptimizer is inside a LossScaleOptimizer (Model.compile adds one to a mixed_float16 model), where "
    "ranks would wait for each other for ever when the gradients of one overflow. Put it outside: "
    "hvdkit.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer)), or call "
    "keras.config.set_dtype_policy('mixed_float16') before the optimizer is made."
)
