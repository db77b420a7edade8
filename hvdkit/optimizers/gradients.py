"""The gradient reduction over ranks, with all of Horovod's options, shared by optimizers and tapes."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit import collectives, watchdog, world
from hvdkit.collectives import transports
from hvdkit.collectives.adasum import adasum
from hvdkit.collectives.mesh import mesh_of, shard_of
from hvdkit.collectives.traffic import elements
from hvdkit.collectives.transports.base import scaled
from hvdkit.compat.keras3 import native_variable
from hvdkit.compression import Compression, ErrorFeedback
from hvdkit.errors import UsageError
from hvdkit.optimizers import groups as grouping
from hvdkit.optimizers import heartbeat, missing
from hvdkit.profiling import marks

Gradient = Any  # tf.Tensor, tf.IndexedSlices or None


class GradientExchange:
    """Reduces a list of gradients over ranks.

    Dense gradients are allreduced in groups. Sparse ones are allgathered, values and indices, and remain
    `tf.IndexedSlices`. None remains None. Gradients of a model's shards are reduced over the ranks that hold the same
    shard (see `hvdkit.collectives.mesh`).

    Args:
        name: prefix of the names of the collectives, the same on all ranks.
        compression: see `hvdkit.Compression`.
        sparse_as_dense: convert sparse gradients to dense ones first.
        op: `hvdkit.Average` (also for None), `hvdkit.Sum` or `hvdkit.Adasum`.
        process_set: the Horovod process set whose ranks take part; None for all.
        gradient_predivide_factor: divide by this factor before the sum, and by size / factor after it.
        groups: a number of groups, starting with the last layers; or lists of variables, one group per list. None for
            what is fastest: a single group, or buckets that are sent during the backward pass.
        scale_local_gradients: divide the gradients of local variables by the number of ranks.

    Raises:
        ValueError: an argument is invalid, or conflicts with another.
    """

    def __init__(
        self,
        name: str,
        *,
        compression: Any = Compression.none,
        sparse_as_dense: bool = False,
        op: Any = None,
        process_set: Any = None,
        gradient_predivide_factor: float = 1.0,
        groups: grouping.Groups = None,
        scale_local_gradients: bool = True,
    ) -> None:
        hvd = world.horovod()
        self.op = hvd.Average if op is None else op
        _check(self.op, gradient_predivide_factor, groups, process_set)
        if isinstance(compression, type) and issubclass(compression, ErrorFeedback):
            compression = compression()
        self.feedback: ErrorFeedback | None = compression if isinstance(compression, ErrorFeedback) else None
        if self.feedback and (self.op == hvd.Adasum or groups is not None or gradient_predivide_factor != 1):
            raise ValueError(
                f"{type(compression).__name__} sends all gradients in an exchange of its own, and averages or sums "
                f"them: leave out groups, gradient_predivide_factor and op=hvdkit.Adasum."
            )
        self.process_set = process_set or hvd.global_process_set
        self.name = name
        self._compression = Compression.none if self.feedback else compression
        self._sparse_as_dense = sparse_as_dense or self.op == hvd.Adasum
        self._predivide = gradient_predivide_factor
        self._groups = groups
        self._scale_local = scale_local_gradients
        self._local: dict[int, Any] = {}
        self._has_shards = False
        self.used = False  # whether this object ever received gradients, even only while a step was traced
        self.weighs = False  # whether losses were ever weighed for its gradients (see `hvdkit.optimizers.weighing`)

    def is_adasum(self) -> bool:
        """Returns whether updates are combined by Adasum."""
        return self.op == world.horovod().Adasum

    def averages(self) -> bool:
        """Returns whether gradients are averaged over the ranks."""
        return self.op == world.horovod().Average

    def register_local(self, variable: Any) -> None:
        """Keeps the gradient of `variable` (a Keras or TensorFlow variable) on this rank."""
        self._local[id(native_variable(variable))] = variable

    def is_local(self, variable: Any) -> bool:
        """Returns whether `variable` differs between ranks: it is registered as local, or it is a shard."""
        return id(native_variable(variable)) in self._local or shard_of(variable) is not None

    def has_local(self) -> bool:
        """Returns whether any variable differs between ranks."""
        return bool(self._local) or self._has_shards

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the compressor's state for the gradients of these variables.

        The gradient of an Embedding is sparse and is sent uncompressed. Other variables with sparse gradients are not
        known here.

        Raises:
            UsageError: some variables are shards of a model, and an option supports whole variables only.
        """
        self._has_shards = mesh_of(variables) is not None
        unfit = self.feedback or self.op != world.horovod().Average or self.process_set.process_set_id
        if self._has_shards and unfit:
            raise UsageError(
                "The model is divided over ranks (hvdkit.parallel), and its gradients with it: leave out process_set, "
                "op, and compression with error feedback; fp16 and bf16 work."
            )
        if self.feedback and not self.is_alone():
            dense = [v for v in variables if not self.is_local(v)]
            if not self._sparse_as_dense:
                dense = [v for v in dense if not getattr(v, "path", "").endswith("/embeddings")]
            self.feedback.build([tuple(v.shape) for v in dense], self.process_set.size())

    def wire_bytes(self, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        """Returns the bytes a rank sends for dense float32 gradients of these shapes, compressed and uncompressed."""
        ranks = 1 if self.is_alone() else self.process_set.size()
        transport = transports.choose("allreduce", tf.float32, self.process_set)
        whole = transport.allreduce_bytes(4 * elements(shapes), ranks)
        if self.feedback:
            return self.feedback.wire_bytes(shapes, ranks), whole
        cast = getattr(self._compression, "wire_dtype", None)
        return whole * (cast.size / 4 if cast else 1), whole

    def state(self) -> list[Any]:
        """Returns the compressor's variables."""
        return [*self.feedback.common, *self.feedback.own] if self.feedback else []

    def is_alone(self) -> bool:
        """Returns whether there is no other rank to reduce with."""
        if world.size() == 1:
            return True
        if self.process_set.process_set_id is None:
            raise ValueError(
                f"Horovod does not know {self.process_set}: pass it to hvdkit.init(process_sets=[...]) on every rank, "
                f"or to hvdkit.add_process_set."
            )
        return world.rank() not in heartbeat.members(self.process_set) or self.process_set.size() == 1

    def __call__(self, grads: Sequence[Gradient], variables: Sequence[Any] | None = None) -> list[Gradient]:
        """Returns the gradients reduced over the ranks, in the order given.

        Args:
            grads: this rank's gradients, the same kinds on all ranks (see `complete`): `tf.Tensor`,
                `tf.IndexedSlices` or None.
            variables: their variables; needed if some are local, or if groups are given by variable.
        """
        result = list(grads)
        self.used = True
        if self.is_alone():
            return result
        if self._sparse_as_dense:
            result = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in result]
        name = self.name
        shards = [i for i, v in enumerate(variables or []) if result[i] is not None and shard_of(v) is not None]
        local = {i for i, v in enumerate(variables or []) if self.is_local(v) and i not in shards}
        shared = [i for i, g in enumerate(result) if g is not None and i not in local and i not in shards]
        sparse = [i for i in shared if isinstance(result[i], tf.IndexedSlices)]
        dense = [i for i in shared if i not in sparse]
        mesh = mesh_of(variables or [])
        # Each rank has other shards; those that it has are no part of this reduction.
        self.announce(result, variables, name, shared if mesh else [i for i in range(len(result)) if i not in local])
        self._note("ready", result)
        self._reduce_dense(result, self._group(dense, result, variables), name)
        for place in sparse:
            # Ranks that hold one model together have the same rows: they count once.
            readers = mesh.data_set if mesh else self.process_set
            result[place] = self._gather_sparse(result[place], f"{name}.sparse{place}", readers)
        if mesh:
            self._reduce_shards(result, shards, mesh.data_set, f"{name}.shards")
        self._note("reduced", result)
        if self._scale_local:
            for place in local:
                result[place] = _divided(result[place], self.process_set.size())
        return result

    def complete(self, grads: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        """Returns the gradients with zeros for those that only other ranks have (see `hvdkit.optimizers.missing`)."""
        if self.is_alone():
            return list(grads)
        return missing.complete(grads, variables, self.name, self.process_set, self.is_local)

    def announce(
        self, grads: Sequence[Gradient], variables: Sequence[Any] | None, name: str, places: Sequence[int]
    ) -> None:
        """Tells the watchdog which gradients this rank reduces: it ends the job if ranks differ.

        Args:
            grads: this rank's gradients, after `complete`.
            variables: their variables, for messages.
            name: distinguishes reductions, the same on all ranks.
            places: the indices of the gradients that the ranks must have alike.
        """
        if self.process_set.process_set_id != 0:
            name = f"{name} of ranks {', '.join(map(str, heartbeat.members(self.process_set)))}"
        watchdog.traced(name, [_signature(grads[i], variables[i] if variables else i) for i in places])

    def start(self, tensors: Sequence[tf.Tensor], variables: Sequence[Any], name: str, slot: str) -> None:
        """Starts a reduction that continues while this rank computes, and that `done` ends.

        Args:
            tensors: dense, one per variable; compression by casting applies to them, other options do not.
            variables: their variables, for messages.
            name: distinguishes what is reduced, the same on all ranks.
            slot: where this process finds it again (see `collectives.reduce_dense_start`).
        """
        self.announce(tensors, variables, f"{self.name}.{name}", range(len(tensors)))
        wires = [*(self._compression.compress(t)[0] for t in tensors), heartbeat.current().payload()]
        options = {"op": self.op, "process_set": self.process_set, "slot": slot}
        collectives.reduce_dense_start(wires, f"{self.name}.{name}.start", **options)

    def done(self, tensors: Sequence[tf.Tensor], name: str, slot: str, is_started: tf.Tensor) -> list[tf.Tensor]:
        """Returns what `start` reduces.

        Args:
            tensors: those given to `start`.
            name: as for `start`.
            slot: as for `start`.
            is_started: whether `start` ran in this process; if not, `tensors` are reduced now.
        """
        beat = heartbeat.current()
        compressed = [self._compression.compress(t) for t in tensors]
        options = {"op": self.op, "process_set": self.process_set, "slot": slot, "is_started": is_started}
        wires = [*(wire for wire, _ in compressed), beat.payload()]
        *reduced, total = collectives.reduce_dense_done(wires, f"{self.name}.{name}.done", **options)
        average = self.op == world.horovod().Average
        beat.receive(total * self.process_set.size() if average else total, heartbeat.members(self.process_set))
        return [self._compression.decompress(t, context) for t, (_, context) in zip(reduced, compressed, strict=True)]

    def _note(self, name: str, result: list[Gradient]) -> None:
        """Records the time at which all gradients are ready."""
        there = [place for place, grad in enumerate(result) if grad is not None]
        for place, grad in zip(there, marks.note(name, [result[place] for place in there]), strict=True):
            result[place] = grad

    def _group(self, dense: list[int], grads: list[Gradient], variables: Sequence[Any] | None) -> list[list[int]]:
        """Divides indices into the groups that are sent together, the same on all ranks."""
        if self.feedback or self.is_adasum():  # they look at all gradients together
            return [dense]
        if self._groups is None:
            smallest = transports.choose("allreduce", tf.float32, self.process_set).bucket_bytes
            return grouping.buckets(dense, grads, smallest) if smallest else [dense]
        if isinstance(self._groups, int):
            return grouping.divide(dense, self._groups)
        return [dense] if variables is None else grouping.by_variable(dense, variables, self._groups)

    def _reduce_dense(self, result: list[Gradient], groups: list[list[int]], name: str) -> None:
        """Replaces dense gradients with the reduced ones. The heartbeat is sent with the last group.

        All groups but the last overlap the rest of the backward pass. They begin after the previous step has received
        its heartbeat, which is after all its groups: so messages of two steps are not confused.
        """
        if self.feedback:
            self._reduce_with_feedback(self.feedback, result, groups[0], name)
            return
        beat = heartbeat.current()
        *overlapping, last = groups or [[]]
        with tf.control_dependencies([beat.received()] if overlapping else []):
            for number, places in enumerate(overlapping):
                self._reduce_group(result, places, f"{name}.group{number}", overlaps=True)
            total = self._reduce_group(result, last, f"{name}.group{len(overlapping)}", beat.payload())
        average = self.op == world.horovod().Average
        with tf.control_dependencies([result[i] for places in overlapping for i in places]):
            beat.receive(total * self.process_set.size() if average else total, heartbeat.members(self.process_set))

    def _reduce_group(
        self,
        result: list[Gradient],
        places: list[int],
        name: str,
        payload: tf.Tensor | None = None,
        overlaps: bool = False,
    ) -> tf.Tensor:
        """Replaces the gradients of a group with the reduced ones. Returns the reduced payload, if there is one."""
        compressed = [self._compression.compress(tf.convert_to_tensor(result[i])) for i in places]
        wires = [wire for wire, _ in compressed] + ([] if payload is None else [payload])
        reduced = self._reduce(wires, name, overlaps)
        for place, tensor, (_, context) in zip(places, reduced[: len(places)], compressed, strict=True):
            result[place] = self._compression.decompress(tensor, context)
        return reduced[-1]

    def _reduce_shards(self, result: list[Gradient], places: list[int], copies: Any, name: str) -> None:
        """Replaces the gradients of shards with those reduced over the ranks that hold the same shards."""
        if copies.size() == 1:
            return
        dense = [place for place in places if not isinstance(result[place], tf.IndexedSlices)]
        compressed = [self._compression.compress(tf.convert_to_tensor(result[i])) for i in dense]
        wires = [wire for wire, _ in compressed]
        reduced = collectives.reduce_dense(
            wires, name, op=self.op, process_set=copies, prescale=1 / self._predivide, postscale=self._predivide
        )
        for place, tensor, (_, context) in zip(dense, reduced, compressed, strict=True):
            result[place] = self._compression.decompress(tensor, context)
        for place in (place for place in places if place not in dense):
            result[place] = self._gather_sparse(result[place], f"{name}.sparse{place}", copies)

    def _reduce_with_feedback(
        self, feedback: ErrorFeedback, result: list[Gradient], places: list[int], name: str
    ) -> None:
        beat = heartbeat.current()
        grads = [tf.convert_to_tensor(result[i]) for i in places]
        averages, total = feedback.reduce(grads, beat.payload(), name, self.process_set)
        beat.receive(total, heartbeat.members(self.process_set))
        factor = 1 if self.op == world.horovod().Average else self.process_set.size()
        for place, average in zip(places, averages, strict=True):
            result[place] = average * tf.cast(factor, average.dtype)

    def _reduce(self, wires: list[tf.Tensor], name: str, overlaps: bool) -> list[tf.Tensor]:
        hvd = world.horovod()
        if not self.is_adasum():
            return collectives.reduce_dense(
                wires,
                name,
                op=self.op,
                process_set=self.process_set,
                prescale=1 / self._predivide,
                postscale=self._predivide,
                overlaps=overlaps,
            )
        *wires, payload = wires  # Adasum has one group, so the heartbeat is always in it
        beat = collectives.reduce_dense([payload], f"{name}.heartbeat", op=hvd.Sum, process_set=self.process_set)
        return [*(adasum(wires, f"{name}.adasum", self.process_set) if wires else []), *beat]

    def _gather_sparse(self, grad: tf.IndexedSlices, name: str, process_set: Any) -> tf.IndexedSlices:
        if process_set.size() == 1:
            return grad
        wire, context = self._compression.compress(scaled(grad.values, 1 / self._predivide))
        values = collectives.gather_rows(wire, f"{name}.values", process_set)
        values = self._compression.decompress(values, context)
        divisor = process_set.size() if self.op == world.horovod().Average else 1
        values = scaled(values, self._predivide / divisor)
        indices = collectives.gather_rows(grad.indices, f"{name}.indices", process_set)
        return tf.IndexedSlices(values, indices, grad.dense_shape)


def weights_of(local_layers: Any) -> list[Any]:
    """Returns the weights of one or several layers, including BatchNormalization's statistics.

    Raises:
        TypeError: `local_layers` contains something other than layers.
        ValueError: a layer is not built yet.
    """
    layers = local_layers if isinstance(local_layers, (list, tuple, set)) else [local_layers]
    layers = [layer for layer in layers if layer is not None]
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer):
            raise TypeError(f"local_layers must be Keras layers, but one is {layer!r} of type {type(layer).__name__}.")
        if not layer.built:
            raise ValueError(
                f"The local layer {layer.name!r} has no weights yet. Build the model first (model.build(input_shape), "
                f"or keras.Input at its start), then make the optimizer."
            )
    return [v for layer in layers for v in layer.weights]


def any_rank(flag: tf.Tensor, name: str, process_set: Any) -> tf.Tensor:
    """Returns whether a boolean scalar is true on any rank of the process set; also sends the heartbeat."""
    beat = heartbeat.current()
    message = tf.concat([beat.payload(), [tf.cast(flag, tf.float32)]], axis=0)
    op = world.horovod().Sum
    (total,) = collectives.reduce_dense([message], name, op=op, process_set=process_set)
    beat.receive(total[: heartbeat.LENGTH], heartbeat.members(process_set))
    return total[-1] > 0.5


def _check(op: Any, predivide: float, groups: grouping.Groups, process_set: Any) -> None:
    hvd = world.horovod()
    if op not in (hvd.Average, hvd.Sum, hvd.Adasum):
        raise ValueError(f"op must be hvdkit.Average, hvdkit.Sum or hvdkit.Adasum, but is {op!r}.")
    if not predivide > 0:
        raise ValueError(f"gradient_predivide_factor must be above 0, but is {predivide!r}.")
    if predivide != 1 and op != hvd.Average:
        raise ValueError(
            f"gradient_predivide_factor={predivide} divides an average in two steps, so it needs op=hvdkit.Average."
        )
    if op == hvd.Adasum and groups is not None:
        raise ValueError("op=hvdkit.Adasum reduces each tensor by itself and all in one exchange: leave groups out.")
    grouping.check(groups)


def _signature(grad: Gradient, variable: Any) -> tuple[Any, str | None, str]:
    """Returns shape, dtype and path of a gradient: Horovod adds up tensors of different shapes without an error."""
    path = getattr(variable, "path", None) or getattr(variable, "name", None) or f"gradient {variable}"
    if grad is None:
        return None, None, path
    sparse = isinstance(grad, tf.IndexedSlices)
    shape = grad.values.shape if sparse else grad.shape
    if shape.rank is not None:
        shape = (None, *shape[1:]) if sparse else tuple(shape)
    return shape, f"slices of {grad.dtype.name}" if sparse else grad.dtype.name, path


def _divided(grad: Gradient, divisor: int) -> Gradient:
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(grad.values / tf.cast(divisor, grad.values.dtype), grad.indices, grad.dense_shape)
    return None if grad is None else grad / tf.cast(divisor, grad.dtype)
