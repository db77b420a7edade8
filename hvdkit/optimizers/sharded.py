"""`ShardedOptimizer`: each rank keeps 1/N of the optimizer's state.

All ranks hold all weights, as in data parallel training, but each rank updates only its part of them. A step has three
phases: a reduce-scatter gives each rank the average gradient of its part; the optimizer, which knows only this part,
updates it; an allgather distributes the new weights. This is stage 1 of ZeRO (S. Rajbhandari et al., "ZeRO: memory
optimizations toward training trillion parameter models", 2020, https://arxiv.org/abs/1910.02054, section 5.1). In a
ring the two collectives send as much as the one allreduce of data parallel training: 2 (N - 1) / N times the weights.

The weights are the model's own at every step: a rank reads its part of them again before each update. So other code may
change them in between (a broadcast, loaded weights, a constraint) without notifying the optimizer.
"""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives import transports, wire
from hvdkit.collectives.mesh import mesh_of
from hvdkit.collectives.traffic import elements, ring_bytes
from hvdkit.compat import call_stack
from hvdkit.compat.keras3 import (
    VectorVariable,
    calls_of_apply,
    copy_decay_exclusions,
    decays,
    moving_averages,
    native_variable,
    own_variables,
    replace_update,
    role_of_slot,
    update_of,
    without_empty_gradients,
)
from hvdkit.errors import UsageError
from hvdkit.optimizers import before_update, clipping, heartbeat, loss_scale, weighing
from hvdkit.optimizers.clipping import norm_dtype
from hvdkit.optimizers.distributed import DistributedOptimizer, constrain
from hvdkit.optimizers.flat import Flat
from hvdkit.optimizers.fused_update import fuse_updates
from hvdkit.optimizers.gradients import Gradient
from hvdkit.optimizers.parts import parts_of
from hvdkit.optimizers.whole_slots import WholeSlot, gather, joined
from hvdkit.profiling import marks

_ELEMENTWISE = ("SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "Nadam", "Ftrl", "Lion")
_WHY_NOT = {
    "Lamb": "scales each variable's step by the norms of the whole variable and of its step",
    "Adafactor": "keeps means of a matrix's rows and columns, and scales by the whole variable's mean square",
    "Muon": "makes each matrix's step orthogonal",
    "MultiOptimizer": "gives each variable to an optimizer by its path",
    "ScheduleFreeAdamW": "begins a slot with the weights, which ranks make equal only later",
}


class ShardedOptimizer(DistributedOptimizer):
    """Wraps a Keras optimizer so that each rank keeps and updates only its own part of the state.

    Use it in place of `DistributedOptimizer`; the results are the same. The optimizer must update each weight
    independently: Adadelta, Adagrad, Adam, AdamW, Adamax, Ftrl, Lion, Nadam, RMSprop or SGD. Clipping by norms, weight
    decay with exclusions, moving averages, schedules and loss scaling work as in one process. With
    `gradient_accumulation_steps` the gradients of each micro-step are reduce-scattered, so the accumulators are
    sharded, too; weights are allgathered once per step.

    Gradients of embeddings become dense. Keras' optimizers then update all rows, not only those in the batch. With
    momentum, a moving average of squares or clipping, the results differ from `DistributedOptimizer`.

    `CheckpointCallback` stores the whole state and resumes on any number of ranks, sharded or not. `model.save` on one
    rank cannot read the other ranks' parts: call `gather` on all ranks before it, or the file has no optimizer state.
    On one rank this is the wrapped optimizer, unchanged.

    Args:
        optimizer: an instance of one of these classes, or of a subclass with the same `update_step`; or a
            `LossScaleOptimizer` around one. If it is already built, this wraps a copy and takes over the state.
        process_set: the Horovod process set whose ranks take part; by default all.
        name: prefix of the names of the collectives.

    Raises:
        TypeError: `optimizer` is not a Keras 3 optimizer, or is already wrapped.
        UsageError: its update does not treat each weight independently.

    Example: `model.compile(hvd.ShardedOptimizer(keras.optimizers.Adam(hvd.scaled(1e-3))), loss=loss)`
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, process_set: Any = None, name: str | None = None) -> None:
        super().__init__(optimizer, name=name or f"Sharded{type(optimizer).__name__}", process_set=process_set)
        _refuse_what_looks_at_more(parts_of(self.__wrapped__))
        self._self_given: list[np.ndarray] = []
        self._begin_anew()
        self._self_leaf = parts_of(self.__wrapped__)[-1]
        self._self_model: list[Any] = []  # the model's variables, in the order in which they were built
        self._self_flats: list[Flat] = []
        self._self_parts: list[_Part] = []  # this rank's part of each flat's weights
        self._self_slots: dict[int, tuple[int, str]] = {}  # id of a slot: index of its flat, name of the slot
        self._self_absent: set[int] = set()  # the variables without a gradient in the step that is being traced
        self._self_whole: tuple[int, list[np.ndarray]] | None = None
        if not self._self_gradients.is_alone():
            self._take_over()

    # ---- Building -------------------------------------------------------------------------------------------------
    def build(self, variables: Sequence[Any]) -> None:
        """Shards the variables over the ranks, and builds the optimizer for this rank's part.

        Raises:
            UsageError: a `LossScaleOptimizer` is around this optimizer; or a variable is not trained by its gradient,
                or is already sharded over ranks (see `hvdkit.parallel`).
        """
        if self._self_gradients.is_alone():
            super().build(variables)
            return
        if self._self_flats:
            return
        if call_stack.loss_scale_in_build() is not None:
            raise UsageError(
                "A ShardedOptimizer is inside a LossScaleOptimizer, which would be asked for state that no rank has. "
                "Put it outside: hvdkit.ShardedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))."
            )
        if any(getattr(v, "overwrite_with_gradient", False) for v in variables):
            raise UsageError("ShardedOptimizer does not train in float8: use DistributedOptimizer.")
        if mesh_of(variables):
            raise UsageError(
                "ShardedOptimizer divides the state of a model that all ranks hold whole, and this model is divided "
                "over ranks itself: use DistributedOptimizer."
            )
        self._self_model = list(variables)
        with tf.init_scope():
            self._lay_out()
            super().build(self._self_parts)
            self._find_slots()
            if self._self_given:
                self._assign_whole(self._self_given)
                self._self_given = []

    def _begin_anew(self) -> None:
        """Replaces an optimizer built for whole variables with an unbuilt copy, and keeps its state."""
        built = next((part for part in parts_of(self.__wrapped__) if part.built), None)
        if built is not None and not self._self_gradients.is_alone():
            self._self_given = [v.numpy() for v in built.variables]
            self.__wrapped__ = _unbuilt(self.__wrapped__)
            fuse_updates(self.__wrapped__)

    def _take_over(self) -> None:
        """Replaces the parts of the inner optimizer that need whole variables."""
        leaf = self._self_leaf
        for part in parts_of(self.__wrapped__)[:-1]:
            loss_scale.judge_overflow_together(part, self._self_gradients)
        clips = leaf.clipnorm or leaf.global_clipnorm
        # Also without clipping: an earlier wrapper may have left its hooks.
        before_update.hook(leaf, clip=(lambda grads, keras_clip: self._clip(grads)) if clips else None)
        replace_update(leaf, functools.partial(self._update, leaf.update_step))
        if leaf is not self.__wrapped__:  # Keras also saves the inner optimizer separately
            leaf.save_own_variables = lambda store: self._save(store, inner=True)

    def _hook_into_updates(self) -> None:
        """Does nothing: `_take_over` installs the hooks, once the wrapped optimizer is known."""

    def _exchanges_where_accumulated(self) -> bool:
        """Returns False: the accumulators are sharded, so gradients are reduced before accumulation."""
        return False

    def _lay_out(self) -> None:
        """Groups the variables by dtype, and by whether weight decay applies, which is decided per variable."""
        leaf, process_set = self._self_leaf, self._self_gradients.process_set
        groups: dict[tuple[bool, str], list[int]] = {}
        for place, variable in enumerate(self._self_model):
            has_decay = not leaf.weight_decay or decays(leaf, native_variable(variable))
            groups.setdefault((has_decay, tf.as_dtype(variable.dtype).name), []).append(place)
        ranks = heartbeat.members(process_set)
        kept = []
        for (has_decay, dtype), places in groups.items():
            flat = Flat([self._self_model[p] for p in places], places, len(ranks), ranks.index(world.rank()))
            name = f"sharded_part_{len(self._self_flats)}"
            part = _Part(flat.part, dtype, name)
            self._self_flats.append(flat)
            self._self_parts.append(part)
            kept += [] if has_decay else [part]
        if leaf.weight_decay:
            leaf.exclude_from_weight_decay(var_list=kept)  # no longer by the names of the model's variables

    def _find_slots(self) -> None:
        for number, part in enumerate(self._self_parts):
            for variable in self._self_leaf.variables:
                role = role_of_slot(variable, part)
                if role is not None:
                    self._self_slots[id(variable)] = number, role

    # ---- A step ---------------------------------------------------------------------------------------------------
    def apply(self, grads: Sequence[Gradient], trainable_variables: Sequence[Any] | None = None) -> None:
        """Reduce-scatters `grads`, updates this rank's part of the weights, and allgathers all ranks' parts.

        Args:
            grads: this rank's gradients, one per variable: `tf.Tensor`, `tf.IndexedSlices` or None.
            trainable_variables: their variables, a subset of those that the optimizer was built with; by default all.
        """
        exchange = self._self_gradients
        if exchange.is_alone():
            self.__wrapped__.apply(list(grads), trainable_variables)
            return
        call_stack.refuse_xla()
        weighing.warn_of_unweighed()
        clipping.warn_of_clipped(grads)
        exchange.used = True
        if not self._self_flats:
            self.build(list(trainable_variables or []))
        given = list(self._self_model if trainable_variables is None else trainable_variables)
        dense = self._in_order(exchange.complete(grads, given), given)
        self._self_absent = {place for place, grad in enumerate(dense) if grad is None}
        averages = self._reduce(dense)
        weights = [native_variable(v) for v in self._self_model]
        for flat, part in zip(self._self_flats, self._self_parts, strict=True):
            part.assign(tf.concat(flat.take(weights, flat.mine), axis=0))
        self.__wrapped__.apply(averages, self._self_parts)
        leaf = self._self_leaf
        overwrites = leaf.use_ema and leaf.ema_overwrite_frequency  # all weights, also those without a gradient
        with_gradient = [place for place, grad in enumerate(dense) if grad is not None]
        moved = range(len(dense)) if overwrites else with_gradient
        steps = leaf.gradient_accumulation_steps
        if steps and not overwrites:
            calls = calls_of_apply(leaf).value
            due = calls % tf.cast(steps, calls.dtype) == 0
            tf.cond(due, lambda: self._update_weights(moved), lambda: None)
        else:
            self._update_weights(moved)
        for part in self._self_parts:
            part.release()
        for place in with_gradient:
            constrain(self._self_model[place])

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Sets variables to their moving averages if the optimizer keeps these; a collective call."""
        leaf = self._self_leaf
        if self._self_gradients.is_alone() or not self._self_flats:
            self.__wrapped__.finalize_variable_values(var_list)
        elif leaf.use_ema:
            averages = self._gather(moving_averages(leaf), "averages")
            for variable, average in zip(self._self_model, averages, strict=True):
                variable.assign(average)

    def _in_order(self, grads: list[Gradient], given: list[Any]) -> list[Any]:
        """Returns the gradients as dense tensors, one per variable of the optimizer, None where there is none."""
        grads, given = without_empty_gradients(self._self_leaf, grads, given)
        place_of = {id(native_variable(v)): place for place, v in enumerate(self._self_model)}
        dense: list[Any] = [None] * len(self._self_model)
        for grad, variable in zip(grads, given, strict=True):
            place = place_of.get(id(native_variable(variable)))
            if place is None:
                raise ValueError(
                    f"The optimizer was not built with {variable.path}: make another one for other variables."
                )
            dense[place] = tf.cast(tf.convert_to_tensor(grad), variable.dtype)
        return dense

    def _reduce(self, dense: list[Any]) -> list[tf.Tensor]:
        """Returns the average over ranks of this rank's part of each flat. Also sends the heartbeat."""
        exchange = self._self_gradients
        present = [place for place, grad in enumerate(dense) if grad is not None]
        exchange.announce(dense, self._self_model, exchange.name, range(len(dense)))
        for place, grad in zip(present, marks.note("ready", [dense[place] for place in present]), strict=True):
            dense[place] = grad
        beat = heartbeat.current()
        payload: tf.Tensor | None = beat.payload()
        parts: dict[int, tf.Tensor] = {}
        for dtype in sorted({flat.dtype for flat in self._self_flats}, key=str):
            numbers = [n for n, flat in enumerate(self._self_flats) if flat.dtype == dtype]
            rider = payload if dtype == tf.float32 else None
            transport = transports.choose("allreduce", dtype, exchange.process_set)
            reduce = self._sum_and_cut if transport.scatters_by_allreduce else self._scatter
            found, average = reduce([self._self_flats[n] for n in numbers], dense, rider, dtype.name)
            parts |= dict(zip(numbers, found, strict=True))
            if rider is not None:
                beat.receive(average * exchange.process_set.size(), heartbeat.members(exchange.process_set))
                payload = None
        if payload is not None:
            op = world.horovod().Sum
            name = f"{exchange.name}.heartbeat"
            (total,) = collectives.reduce_dense([payload], name, op=op, process_set=exchange.process_set)
            beat.receive(total, heartbeat.members(exchange.process_set))
        return marks.note("reduced", [parts[n] for n in range(len(self._self_flats))])

    def _scatter(self, flats: list[Flat], dense: list[Any], rider: Any, dtype: str) -> tuple[list[tf.Tensor], Any]:
        """Reduce-scatters through an alltoall: each rank sums all ranks' values for its parts and for `rider`.

        The alltoall sends no more than Horovod's own reduce-scatter. Over Gloo it takes a third of the time or less
        (two and three ranks on one host, 23 MB).
        """
        exchange, ranks = self._self_gradients, flats[0].ranks
        behind = [] if rider is None else [rider]
        rows = [[*(t for flat in flats for t in flat.take(dense, flat.spans(r))), *behind] for r in range(ranks)]
        sent = tf.reshape(tf.concat([tensor for row in rows for tensor in row], axis=0), [ranks, -1])
        wires = [collectives.to_wire(sent), tf.constant([], tf.int32)]  # one row per rank
        received, _ = wire.run("alltoall", wires, f"{exchange.name}.scatter.{dtype}", exchange.process_set)
        received = tf.ensure_shape(collectives.from_wire(received, sent.dtype), sent.shape)
        wide = tf.cast(received, tf.float32) if sent.dtype.size < 4 else received
        average = tf.cast(tf.reduce_mean(wide, axis=0), sent.dtype)
        sizes = [flat.part for flat in flats]
        *found, rest = tf.split(average, [*sizes, average.shape[0] - sum(sizes)])
        return found, rest

    def _sum_and_cut(self, flats: list[Flat], dense: list[Any], rider: Any, dtype: str) -> tuple[list[tf.Tensor], Any]:
        """Allreduces the gradients as they are: in shared memory this is faster, without a copy."""
        places = [place for flat in flats for place in flat.places if dense[place] is not None]
        sent = [*(dense[place] for place in places), *([] if rider is None else [rider])]
        averages = collectives.reduce_dense(
            sent,
            f"{self._self_gradients.name}.sum",
            op=world.horovod().Average,
            process_set=self._self_gradients.process_set,
        )
        by_place: list[Any] = [None] * len(dense)
        for place, average in zip(places, averages, strict=False):
            by_place[place] = average
        return [tf.concat(flat.take(by_place, flat.mine), axis=0) for flat in flats], averages[-1]

    def _clip(self, grads: list[tf.Tensor]) -> list[tf.Tensor]:
        """Clips by norm as Keras does, with the norms of whole variables, summed over ranks in one allreduce."""
        leaf = self._self_leaf
        pieces = [tf.split(g, [s.size for s in f.mine]) for f, g in zip(self._self_flats, grads, strict=True)]
        dtype = norm_dtype(grads)
        squares: list[Any] = [wire.zeros([], dtype)] * len(self._self_model)
        for flat, vectors in zip(self._self_flats, pieces, strict=True):
            for span, vector in zip(flat.mine, vectors, strict=True):
                if span.place is not None:
                    squares[span.place] = tf.reduce_sum(tf.square(tf.cast(vector, dtype)))
        (total,) = collectives.reduce_dense(
            [tf.stack(squares)],
            f"{self._self_gradients.name}.norms",
            op=world.horovod().Sum,
            process_set=self._self_gradients.process_set,
        )
        if leaf.global_clipnorm:
            norm = tf.sqrt(tf.reduce_sum(total))
            scale = leaf.global_clipnorm * tf.minimum(1 / norm, 1 / leaf.global_clipnorm) + (norm - norm)
            return [g * tf.cast(scale, g.dtype) for g in grads]
        scales = leaf.clipnorm / tf.maximum(tf.sqrt(total), leaf.clipnorm)
        return [
            tf.concat(
                [
                    vector if span.place is None else vector * tf.cast(scales[span.place], vector.dtype)
                    for span, vector in zip(flat.mine, vectors, strict=True)
                ],
                axis=0,
            )
            for flat, vectors in zip(self._self_flats, pieces, strict=True)
        ]

    def _update(self, update: Callable, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates a part. Weights and slots of variables without a gradient stay as they are, as in one process.

        Args:
            update: the optimizer's own `update_step`, which takes the other arguments.
            gradient: the average gradient of the part, with zeros for variables that have none.
            variable: the part.
            learning_rate: the rate of this step.
        """
        native = native_variable(variable)
        number = next(n for n, part in enumerate(self._self_parts) if native_variable(part) is native)
        flat = self._self_flats[number]
        stays = np.repeat([s.place in self._self_absent for s in flat.mine], [s.size for s in flat.mine])
        if not stays.any():
            update(gradient, variable, learning_rate)
            return
        slots = [v for v in self._self_leaf.variables if self._self_slots.get(id(v), (None,))[0] == number]
        changed = [native, *map(native_variable, slots)]
        weights = flat.take([native_variable(v) for v in self._self_model], flat.mine)  # the part may have decayed
        before = [tf.concat(weights, axis=0), *(tf.identity(slot) for slot in changed[1:])]
        update(gradient, variable, learning_rate)
        for one, old in zip(changed, before, strict=True):
            one.assign(tf.where(stays, old, one))

    def _update_weights(self, moved: Sequence[int]) -> None:
        """Allgathers the weights, and assigns those that may have changed."""
        weights = self._gather(self._self_parts, "weights")
        for place in moved:
            self._self_model[place].assign(weights[place])

    def _gather(self, parts: Sequence[Any], what: str) -> list[tf.Tensor]:
        """Allgathers the ranks' parts, one per flat, into tensors of the variables' shapes."""
        found: list[Any] = [None] * len(self._self_model)
        for number, (flat, part) in enumerate(zip(self._self_flats, parts, strict=True)):
            name = f"{self._self_gradients.name}.{what}.{number}"
            vector = collectives.gather_rows(
                tf.convert_to_tensor(native_variable(part)), name, self._self_gradients.process_set
            )
            for place, tensor in zip(flat.places, flat.divide(vector), strict=True):
                found[place] = tensor
        return found

    # ---- The state ------------------------------------------------------------------------------------------------
    def keeps_local(self, variable: Any) -> bool:
        """Returns whether a variable differs between ranks: all slots do."""
        return id(variable) in self._self_slots or super().keeps_local(variable)

    def wire_bytes(self, variables: Sequence[Any]) -> tuple[float, float]:
        """Returns the bytes that a rank sends per step in a ring, and what an allreduce of the gradients would send.

        Counts what is sent: the vectors of the reduce-scatter and the allgather, including the zero padding between
        variables. Ranks that share memory send nothing.
        """
        _, whole = super().wire_bytes(variables)
        flats = self._self_flats
        if not flats:
            return whole, whole
        ranks = flats[0].ranks
        vectors = sum(flat.dtype.size * flat.ranks * flat.part for flat in flats)
        scattered = vectors + 4 * heartbeat.LENGTH * ranks
        return ring_bytes(scattered + vectors, ranks) / 2, whole

    def state_bytes(self) -> tuple[int, int]:
        """Returns the bytes of the optimizer's variables on this rank, and those that a single rank would hold."""
        mine = sum(tf.as_dtype(v.dtype).size * elements([v.shape]) for v in self.__wrapped__.variables)
        whole = sum(tf.as_dtype(v.dtype).size * elements([v.shape]) for v in self.whole_variables())
        return mine, whole

    def whole_variables(self) -> list[Any]:
        """Returns the variables that the optimizer has in one process, in its order; sharded ones as `WholeSlot`s."""
        if not self._self_flats:
            return self.variables
        slots = {key: v for v in self.__wrapped__.variables if (key := self._self_slots.get(id(v)))}
        common = iter([v for v in self.__wrapped__.variables if id(v) not in self._self_slots])
        flat_of = {place: number for number, flat in enumerate(self._self_flats) for place in flat.places}
        found: list[Any] = []
        for place, role in _roles(self.__wrapped__, len(self._self_model)):
            if place is None:
                found.append(next(common))
                continue
            number, variable = flat_of[place], self._self_model[place]
            path = f"{self._self_leaf.name}/{variable.path.replace('/', '_')}_{role}"
            held = slots[number, role]
            found.append(WholeSlot(path, tuple(variable.shape), str(held.dtype), held, self._self_flats[number], place))
        return found

    def gather(self) -> list[np.ndarray]:
        """Gathers the whole state on rank 0, where `model.save` then writes it, until the next step; a collective call.

        Returns:
            On rank 0 the values of the variables that the optimizer has in one process, in its order; on other ranks an
            empty list. On rank 0 it takes the memory that sharding saves.
        """
        variables = self.whole_variables()
        arrays = iter(gather([v for v in variables if isinstance(v, WholeSlot)]))
        if world.rank():
            return []
        values = [next(arrays) if isinstance(v, WholeSlot) else v.numpy() for v in variables]
        self._self_whole = int(calls_of_apply(self._self_leaf).numpy()), values
        return values

    def save_own_variables(self, store: Any) -> None:
        """Writes the whole state, as the optimizer would in one process, if `gather` was called on this rank."""
        if self._self_flats:
            self._save(store)
        else:
            self.__wrapped__.save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Loads this rank's part of a saved whole state."""
        if self._self_flats:
            self._assign_whole([store[str(place)] for place in range(len(store.keys()))])
        else:
            self.__wrapped__.load_own_variables(store)

    def _save(self, store: Any, inner: bool = False) -> None:
        whole = self._self_whole
        if whole is None or whole[0] != int(calls_of_apply(self._self_leaf).numpy()):
            if not inner:
                warnings.warn(
                    "The file has the weights, but none of the optimizer's state: each rank has a part of it. To save "
                    "it, too, call optimizer.gather() on all ranks before; to go on with training, use "
                    "hvdkit.callbacks.CheckpointCallback.",
                    stacklevel=2,
                )
            return
        around = len(own_variables(self.__wrapped__)) if inner else 0  # a LossScaleOptimizer's own variables
        for place, value in enumerate(whole[1][around:]):
            store[str(place)] = value

    def _assign_whole(self, values: Sequence[Any]) -> None:
        """Assigns this rank's part of the whole state; the first values may be missing (a new loss scale)."""
        variables = self.whole_variables()[-len(values) :]
        for variable, value in zip(variables, values, strict=True):
            if not isinstance(variable, WholeSlot):
                variable.assign(value)
        slots = [(v, np.asarray(a)) for v, a in zip(variables, values, strict=True) if isinstance(v, WholeSlot)]
        for held, flat, vector in joined(slots):
            held.assign(vector[flat.rank * flat.part : (flat.rank + 1) * flat.part])


class _Part(VectorVariable):
    """This rank's part of some weights, only during an update: between steps it takes no memory."""

    def release(self) -> None:
        """Frees the memory; the next step starts with an assignment."""
        native = native_variable(self)
        native.assign(tf.zeros([0], native.dtype))


def _refuse_what_looks_at_more(parts: Sequence[keras.optimizers.Optimizer]) -> None:
    """Raises a `UsageError` unless the optimizer's update treats each weight independently."""
    if any(hasattr(part, "optimizers") for part in parts):
        leaf = next(part for part in parts if hasattr(part, "optimizers"))
    else:
        leaf = parts[-1]
    known = [getattr(keras.optimizers, name) for name in _ELEMENTWISE]
    if any(update_of(type(leaf)) is update_of(cls) for cls in known):
        return
    name = next((c.__name__ for c in type(leaf).__mro__ if c.__name__ in _WHY_NOT), "")
    why = _WHY_NOT.get(name, "has an update of its own, which may look at more than one weight at a time")
    raise UsageError(
        f"ShardedOptimizer gives each rank a part of the weights that goes through the middle of variables, but "
        f"{type(leaf).__name__} {why}. Use one of {', '.join(_ELEMENTWISE)}, or DistributedOptimizer."
    )


def _unbuilt(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Returns an unbuilt copy of the optimizer."""
    fresh = type(optimizer).from_config(optimizer.get_config())
    for one, other in zip(parts_of(optimizer), parts_of(fresh), strict=True):
        copy_decay_exclusions(one, other)
    return fresh


def _roles(optimizer: keras.optimizers.Optimizer, number: int) -> list[tuple[int | None, str]]:
    """Returns the roles of the variables that such an optimizer has for so many variables, in its order.

    Returns:
        For a slot, the index of its variable and the name of the slot; for variables that all share, None and the name.
    """
    like = type(optimizer).from_config(optimizer.get_config())
    with tf.init_scope():
        like.build([keras.Variable(0.0, name=f"probe{place}") for place in range(number)])
    found: list[tuple[int | None, str]] = []
    for variable in like.variables:
        match = re.search(r"probe(\d+)_(\w+)$", variable.name)
        found.append((int(match[1]), match[2]) if match else (None, variable.name))
    return found
