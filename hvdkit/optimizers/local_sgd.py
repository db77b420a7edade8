"""`LocalSGD`: ranks train independently for some steps, then synchronize their weights. For slow networks.

Every H steps the ranks average how far each has moved the weights since the last synchronization. An outer optimizer
takes this average as its gradient:

    Δ = mean over ranks of (anchor - weights);  m ← μ m + Δ;  anchor ← anchor - η (Δ + μ m);  weights ← anchor

With η = 1 and μ = 0 the result is the mean of the weights: local SGD (S. Stich, "Local SGD converges fast and
communicates little", 2019, https://arxiv.org/abs/1805.09767). With Nesterov momentum it is DiLoCo (A. Douillard et al.,
"DiLoCo: distributed low-communication training of language models", 2023, https://arxiv.org/abs/2311.08105,
algorithm 1).

With P fragments it is streaming DiLoCo (A. Douillard et al., "Streaming DiLoCo with overlapping communication: towards
a distributed free lunch", 2025, https://arxiv.org/abs/2501.18512, algorithm 2). The weights are divided into P parts.
Each is synchronized every H steps, but at other steps than the others, H / P steps apart: the link carries 1 / P of
the bytes at a time. The allreduce of a fragment p that starts after step t may overlap the next τ steps:

    after step t       Δ_p = mean over ranks of (anchor_p - weights_p)      starts, and the ranks train on
    after step t + τ   m_p ← μ m_p + Δ_p;  anchor_p ← anchor_p - η (Δ_p + μ m_p)
                       weights_p ← α weights_p + (1 - α) anchor_p

The last line mixes in what the rank has learned in the τ steps. Without overlap (τ = 0) it is weights_p ← anchor_p.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.compat.keras3 import learning_rate_source
from hvdkit.compression import Compression
from hvdkit.errors import UsageError
from hvdkit.optimizers.distributed import DistributedOptimizer, constrain
from hvdkit.optimizers.fragments import UnderWay, divide, timetable
from hvdkit.optimizers.gradients import Gradient
from hvdkit.optimizers.parts import optimizers_of, parts_of


class LocalSGD(DistributedOptimizer):
    """Wraps a Keras optimizer so that ranks synchronize every `steps` steps, not every step.

    In `fit`, the ranks synchronize before each evaluation, at the end of each epoch and at the end of training: all
    fragments at once. In a custom training loop, call `synchronise()` at these points, and `start()` before the first
    step. With `use_ema` each rank averages its own weights over time; then `synchronise()` also sets these averages to
    their mean over the ranks. A weight's constraint holds after each synchronization, too.

    Args:
        optimizer: the optimizer of each rank between synchronizations; its slots differ between ranks.
        steps: H, the number of steps between synchronizations. Stich's local SGD uses 4 to 64, DiLoCo hundreds.
        outer_learning_rate: η. DiLoCo uses 0.7, local SGD 1.0.
        outer_momentum: μ, as Nesterov momentum. DiLoCo uses 0.9, local SGD 0.0.
        compression: compression of what the ranks send, as for `DistributedOptimizer`.
        name: prefix of the names of the collectives.
        process_set: the ranks that take part; by default all.
        fragments: P, the number of parts that are synchronized at different steps, at most H. A fragment consists of
            whole variables, so it has about 1 / P of the bytes if no variable is larger than that.
        overlap: τ, the steps that an allreduce may take while the rank trains on, from 0 to H / P. By default 0 for a
            single fragment, otherwise 5 or, if that is less, H / P. Only sockets send meanwhile (CPU ranks of
            several hosts); other transports allreduce after the τ steps, with the same results.
        mixing: α, the share of the rank's own weights where an overlapped result is applied; 0 leaves out what the
            rank has learned meanwhile.

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
        fragments: int = 1,
        overlap: int | None = None,
        mixing: float = 0.5,
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
        _check_streaming(steps, fragments, overlap, mixing)
        default = min(5, steps // fragments) if fragments > 1 else 0
        self._self_fragments, self._self_overlap = fragments, default if overlap is None else overlap
        self._self_mixing = mixing
        if self._streams and self._self_gradients.feedback:
            raise ValueError(
                f"{type(compression).__name__} compresses all weights at once, so it excludes fragments and overlap. "
                f"Leave it out, or use Compression.fp16 or Compression.bf16."
            )
        self._self_steps = steps
        self._self_rate = outer_learning_rate
        self._self_momentum = outer_momentum
        self._self_weights: list[Any] = []
        self._self_own: list[Any] = []
        self._self_outer: list[keras.Variable] = []  # steps since the last synchronization, anchors, momenta
        self._self_parts: list[list[int]] = []  # the places of the weights of each fragment
        self._self_under_way: UnderWay | None = None
        self._self_graphs: dict[tuple[Any, ...], Callable[[], None]] = {}  # of `synchronise`

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
        if self._streams:
            self._divide()

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
        if self._streams:
            self._stream()
        else:
            agree = functools.partial(self._agree, self._shared)
            tf.cond(self._self_since.value >= self._self_steps, agree, lambda: None)

    @property
    def local_steps(self) -> int:
        """The number of steps between synchronizations."""
        return self._self_steps

    @property
    def fragments(self) -> list[list[Any]]:
        """The weights of each fragment, once the optimizer is built on several ranks; of a single one without them."""
        return [[self._self_weights[i] for i in part] for part in self._self_parts] or [self._self_weights]

    @property
    def overlap(self) -> int:
        """The number of steps that an allreduce may overlap."""
        return self._self_overlap

    def schedule(self) -> str:
        """Describes when the ranks synchronize, in a few words, once the optimizer is built."""
        text = f"every {self._self_steps} steps"
        if self._self_fragments > 1:
            sizes = [sum(map(_bytes_of, part)) for part in self.fragments]
            text += f", in {len(sizes)} fragments of {min(sizes) / 1e6:.3g} to {max(sizes) / 1e6:.3g} MB"
        if self._self_overlap:
            text += f", which are applied {self._self_overlap} step(s) after they are sent"
        return text

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
        if self._self_under_way:
            self._self_under_way.resume()
        if self._self_outer and not int(self._self_since.numpy()):
            shared = [self._self_weights[place] for place in self._shared]
            collectives.broadcast_variables(shared, process_set=self._self_gradients.process_set)
            for anchor, weight in zip(self._self_anchors, self._self_weights, strict=True):
                anchor.assign(weight)

    def synchronise(self) -> None:
        """Synchronizes the weights now, unless they are unchanged since the last time. A collective call.

        The result of an allreduce that is under way is dropped: this synchronization includes its changes.
        """
        if not self._self_outer:
            return
        self._average_moving_averages()  # also those of steps before the last synchronization, which leaves them alone
        if not (step := int(self._self_since.numpy())):
            return
        if self._self_under_way:
            self._self_under_way.drop()
        there = timetable(self._self_steps, self._self_fragments)[step % self._self_steps]
        fresh = there if self._streams and not self._self_overlap else None  # has all that it has to give
        streamed = sorted(place for p, part in enumerate(self._self_parts) if p != fresh for place in part)
        places = tuple(streamed if self._streams else self._shared)
        key = (places, world.rank(), world.size())  # an elastic job may go on with other ranks
        if key not in self._self_graphs:
            self._self_graphs[key] = tf.function(lambda: self._agree(places), autograph=False)
        self._self_graphs[key]()

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Synchronizes, then sets variables to their moving averages if the optimizer keeps these; a collective call.

        Args:
            var_list: the variables that the optimizer was built with.
        """
        self.synchronise()
        self.__wrapped__.finalize_variable_values(var_list)

    @property
    def _streams(self) -> bool:
        return self._self_fragments > 1 or self._self_overlap > 0

    @property
    def _shared(self) -> list[int]:
        """The places of the weights that ranks synchronize: all but local ones (`register_local_var`)."""
        return [i for i, v in enumerate(self._self_weights) if not self._self_gradients.is_local(v)]

    def _divide(self) -> None:
        """Divides the weights that ranks share into fragments."""
        shared = self._shared
        if self._self_fragments > len(shared):
            raise UsageError(
                f"{self._self_fragments} fragments are more than the {len(shared)} weights of the model, which are not "
                f"divided further: use at most {len(shared)}."
            )
        sizes = [_bytes_of(self._self_weights[i]) for i in shared]
        self._self_parts = [[shared[i] for i in part] for part in divide(sizes, self._self_fragments)]
        if self._self_overlap:
            self._self_under_way = UnderWay(self._self_gradients, self.fragments)
            self._self_own += self._self_under_way.own
            self._self_outer += [*self._self_under_way.common, *self._self_under_way.own]

    def _stream(self) -> None:
        """Synchronizes the fragment that is due at this step, or starts it and applies the one that is under way."""
        number = len(self._self_parts)
        table = tf.constant(timetable(self._self_steps, number))
        step = self._self_since.value
        due = tf.gather(table, step % self._self_steps)
        under_way = self._self_under_way
        if not under_way:
            _run_one(due, [functools.partial(self._agree_on, part) for part in self._self_parts])
            return
        # The result is applied before the next fragment starts, which may be at the same step.
        late = tf.gather(table, (step - self._self_overlap) % self._self_steps)
        late = tf.where(under_way.is_under_way(late), late, number)
        _run_one(late, [functools.partial(self._apply, under_way, p) for p in range(number)])
        _run_one(due, [functools.partial(self._start, under_way, p) for p in range(number)])

    def _start(self, under_way: UnderWay, fragment: int) -> None:
        under_way.start(fragment, self._moved(self._self_parts[fragment]))

    def _apply(self, under_way: UnderWay, fragment: int) -> None:
        for place, change in zip(self._self_parts[fragment], under_way.done(fragment), strict=True):
            self._move_anchor(place, change)
            anchor, weight = self._self_anchors[place], self._self_weights[place]
            mixed = self._self_mixing * tf.cast(weight.value, anchor.dtype) + (1 - self._self_mixing) * anchor.value
            weight.assign(tf.cast(mixed, weight.dtype))
            constrain(weight)

    def _agree(self, places: Sequence[int]) -> None:
        """Synchronizes the weights at these places, and begins to count the steps again."""
        self._agree_on(places)
        self._self_since.assign(0)

    def _agree_on(self, places: Sequence[int]) -> None:
        weights = [self._self_weights[place] for place in places]
        for place, change in zip(places, self._self_gradients(self._moved(places), weights), strict=True):
            self._move_anchor(place, change)
            self._self_weights[place].assign(tf.cast(self._self_anchors[place].value, self._self_weights[place].dtype))

    def _moved(self, places: Sequence[int]) -> list[tf.Tensor]:
        """Returns how far this rank has moved weights from their anchors, with the opposite sign."""
        pairs = [(self._self_anchors[place], self._self_weights[place]) for place in places]
        return [anchor.value - tf.cast(weight.value, anchor.dtype) for anchor, weight in pairs]

    def _move_anchor(self, place: int, change: tf.Tensor) -> None:
        """Takes a step of the outer optimizer; the anchor keeps the weight's constraint."""
        anchor = self._self_anchors[place]
        if self._self_momenta:
            momentum = self._self_momenta[place]
            momentum.assign(self._self_momentum * momentum + change)
            change = change + self._self_momentum * momentum
        anchor.assign(anchor - self._self_rate * change)
        constrain(anchor, like=self._self_weights[place])


def local_optimizers(model: keras.Model) -> list[LocalSGD]:
    """Returns the model's `LocalSGD` optimizers."""
    return [o for o in optimizers_of(model) if isinstance(o, LocalSGD)] if world.is_initialized() else []


def _check_streaming(steps: int, fragments: int, overlap: int | None, mixing: float) -> None:
    """Raises a `ValueError` if an argument is out of its range."""
    if isinstance(fragments, bool) or not isinstance(fragments, int) or not 1 <= fragments <= steps:
        raise ValueError(f"fragments must be from 1 to steps, which is {steps}, but is {fragments!r}.")
    apart = steps // fragments
    if overlap is not None and (isinstance(overlap, bool) or not isinstance(overlap, int) or not 0 <= overlap <= apart):
        raise ValueError(
            f"overlap must be from 0 to {apart}, the steps between two fragments (steps / fragments), but is "
            f"{overlap!r}."
        )
    if not 0 <= mixing < 1:
        raise ValueError(f"mixing must be from 0 up to but not 1, but is {mixing!r}.")


def _run_one(index: tf.Tensor, branches: Sequence[Callable[[], None]]) -> None:
    """Runs the branch with this index, in a graph or eagerly; none if the index is the number of branches."""
    tf.switch_case(index, [*branches, lambda: None])


def _bytes_of(weight: Any) -> int:
    return int(np.prod(weight.shape)) * tf.as_dtype(keras.backend.standardize_dtype(weight.dtype)).size


def _like(weight: Any, name: str) -> keras.Variable:
    return keras.Variable(weight, trainable=False, dtype=weight.dtype, name=f"{weight.path.replace('/', '_')}_{name}")
