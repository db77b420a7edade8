"""`LocalSGD`: ranks train independently for some steps, then synchronize their weights. For slow networks.

Every H steps the ranks average how far each has moved the weights since the last synchronization. An outer optimizer
takes this average as its gradient:

    Δ = mean over ranks of (anchor - weights);  m ← μ m + Δ;  anchor ← anchor - η (Δ + μ m);  weights ← anchor

With η = 1 and μ = 0 the result is the mean of the weights: local SGD (S. Stich, "Local SGD converges fast and
communicates little", 2019, https://arxiv.org/abs/1805.09767). With Nesterov momentum it is DiLoCo (A. Douillard et al.,
"DiLoCo: distributed low-communication training of language models", 2023, https://arxiv.org/abs/2311.08105,
algorithm 1).
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.compat.keras3 import learning_rate_source
from hvdkit.compression import Compression
from hvdkit.optimizers.distributed import DistributedOptimizer
from hvdkit.optimizers.gradients import Gradient
from hvdkit.optimizers.parts import optimizers_of, parts_of


class LocalSGD(DistributedOptimizer):
    """Wraps a Keras optimizer so that ranks synchronize every `steps` steps, not every step.

    In `fit`, the ranks synchronize before each evaluation, at the end of each epoch and at the end of training. In a
    custom training loop, call `synchronise()` at these points, and `start()` before the first step.

    Args:
        optimizer: the optimizer of each rank between synchronizations; its slots differ between ranks.
        steps: H, the number of steps between synchronizations. Stich's local SGD uses 4 to 64, DiLoCo hundreds.
        outer_learning_rate: η. DiLoCo uses 0.7, local SGD 1.0.
        outer_momentum: μ, as Nesterov momentum. DiLoCo uses 0.9, local SGD 0.0.
        compression: compression of what the ranks send, as for `DistributedOptimizer`.
        name: prefix of the names of the collectives.
        process_set: the ranks that take part; by default all.

    Raises:
        TypeError: `optimizer` is not a Keras 3 optimizer, or is already wrapped.
        ValueError: an argument is invalid, or the optimizer accumulates gradients, which LocalSGD replaces.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        steps: int = 16,
        outer_learning_rate: float = 0.7,
        outer_momentum: float = 0.9,
        compression: Any = Compression.none,
        name: str | None = None,
        process_set: Any = None,
    ) -> None:
        super().__init__(optimizer, name=name, compression=compression, sparse_as_dense=True, process_set=process_set)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be 1 or more, but is {steps!r}.")
        if not outer_learning_rate > 0 or not 0 <= outer_momentum < 1:
            raise ValueError(
                f"outer_learning_rate must be above 0, and outer_momentum from 0 up to but not 1, but they are "
                f"{outer_learning_rate!r} and {outer_momentum!r}."
            )
        if any(part.gradient_accumulation_steps for part in parts_of(optimizer)):
            raise ValueError("LocalSGD and gradient_accumulation_steps exclude each other: give a larger `steps`.")
        self._self_steps = steps
        self._self_rate = outer_learning_rate
        self._self_momentum = outer_momentum
        self._self_weights: list[Any] = []
        self._self_own: list[Any] = []
        self._self_outer: list[keras.Variable] = []  # steps since the last synchronization, anchors, momenta

    def build(self, variables: Sequence[Any]) -> None:
        """Builds the optimizer, and keeps the weights as the first anchor."""
        super().build(variables)
        if self._self_outer or self._self_gradients.is_alone():
            return
        self._self_weights = list(variables)
        common = {id(v) for p in parts_of(self.__wrapped__) for v in (p.iterations, learning_rate_source(p))}
        self._self_own = [*variables, *(v for v in self.__wrapped__.variables if id(v) not in common)]
        with tf.init_scope():
            self._self_since = keras.Variable(0, trainable=False, dtype="int32", name="local_steps")
            self._self_anchors = [_like(v, "anchor") for v in variables]
            self._self_momenta = [_like(v, "outer_momentum") for v in variables] if self._self_momentum else []
            for anchor, weight in zip(self._self_anchors, variables, strict=True):
                anchor.assign(weight)
            for momentum in self._self_momenta:
                momentum.assign(np.zeros(momentum.shape))
        self._self_outer = [self._self_since, *self._self_anchors, *self._self_momenta]

    def apply(self, grads: Sequence[Gradient], trainable_variables: Sequence[Any] | None = None) -> None:
        """Takes this rank's own step, and synchronizes with the other ranks after the last of `steps`.

        Args:
            grads: this rank's gradients, one per variable: `tf.Tensor`, `tf.IndexedSlices` or None.
            trainable_variables: their variables; by default those that the optimizer was built with.
        """
        if not self.__wrapped__.built:
            with tf.init_scope():
                self.build(list(trainable_variables or []))
        self.__wrapped__.apply(list(grads), trainable_variables)
        if not self._self_outer:
            return
        self._self_gradients.used = True  # fit learns that it works at the first synchronization, not at the first step
        self._self_since.assign_add(1)
        tf.cond(self._self_since.value >= self._self_steps, self._agree, lambda: None)

    @property
    def local_steps(self) -> int:
        """The number of steps between synchronizations."""
        return self._self_steps

    @property
    def variables(self) -> list[Any]:
        """The variables of the optimizer and of the outer optimizer, and the state of the compressor."""
        return [*super().variables, *self._self_outer]

    def wire_bytes(self, variables: Sequence[Any]) -> tuple[float, float]:
        """As for `DistributedOptimizer`: the bytes of a synchronization, divided by its steps."""
        sent, whole = super().wire_bytes(variables)
        return sent / self._self_steps, whole

    def keeps_local(self, variable: Any) -> bool:
        """Returns whether a variable differs between ranks, as weights and slots do; the outer optimizer's do not."""
        return any(variable is v for v in self._self_own) or super().keeps_local(variable)

    def start(self) -> None:
        """Broadcasts the weights, unless training resumes between two synchronizations. A collective call."""
        if self._self_outer and not int(self._self_since.numpy()):
            collectives.broadcast_variables(self._self_weights, process_set=self._self_gradients.process_set)
            for anchor, weight in zip(self._self_anchors, self._self_weights, strict=True):
                anchor.assign(weight)

    def synchronise(self) -> None:
        """Synchronizes the weights now, unless they are unchanged since the last time. A collective call."""
        if self._self_outer and int(self._self_since.numpy()):
            tf.function(self._agree, autograph=False)()

    def _agree(self) -> None:
        moved = [
            a.value - tf.cast(w.value, a.dtype) for a, w in zip(self._self_anchors, self._self_weights, strict=True)
        ]
        for place, change in enumerate(self._self_gradients(moved, self._self_weights)):
            anchor = self._self_anchors[place]
            if self._self_momenta:
                momentum = self._self_momenta[place]
                momentum.assign(self._self_momentum * momentum + change)
                change = change + self._self_momentum * momentum
            anchor.assign(anchor - self._self_rate * change)
            self._self_weights[place].assign(tf.cast(anchor.value, self._self_weights[place].dtype))
        self._self_since.assign(0)


def local_optimizers(model: keras.Model) -> list[LocalSGD]:
    """Returns the model's `LocalSGD` optimizers."""
    return [o for o in optimizers_of(model) if isinstance(o, LocalSGD)] if world.is_initialized() else []


def _like(weight: Any, name: str) -> keras.Variable:
    return keras.Variable(weight, trainable=False, dtype=weight.dtype, name=f"{weight.path.replace('/', '_')}_{name}")
