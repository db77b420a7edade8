"""`pipeline`: divides the layers of a model into stages, one per rank, and sends micro-batches through them.

While one rank computes the second half of the model on a micro-batch, another computes the first half on the next one.
A rank holds the weights and the optimizer state of its own stage only. There are two schedules:

- "gpipe": all micro-batches forward, then all backward (Y. Huang et al., "GPipe", 2018,
  https://arxiv.org/abs/1811.06965). Each stage keeps the activations of all micro-batches.
- "1f1b": alternates one forward and one backward pass as soon as possible (D. Narayanan et al., "Efficient large-scale
  language model training on GPU clusters using Megatron-LM", 2021, https://arxiv.org/abs/2104.04473). Stage s of S
  keeps the activations of S - s micro-batches.

Both leave a stage idle for the fraction (S - 1) / (M + S - 1) of the time with M micro-batches, if all stages take
equally long.

Horovod has no point-to-point send: see `hvdkit.parallel.transfer` for the replacement.

A stage's layers are copies: when you delete the original model, the memory of the other stages' weights is freed.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives import wire
from hvdkit.collectives.mesh import Mesh, Shard, mark
from hvdkit.compat.keras3 import clear_losses, consumers_of, loss_tracker
from hvdkit.errors import UsageError
from hvdkit.optimizers import weighing
from hvdkit.optimizers.exchanging import exchanging_optimizers_of
from hvdkit.parallel import graph, whole_model
from hvdkit.parallel.transfer import Outbox, receive, send

SCHEDULES = ("1f1b", "gpipe")


def pipeline(
    model: keras.Model,
    mesh: Mesh,
    cuts: Sequence[str] | None = None,
    micro_batches: int = 4,
    schedule: str = "1f1b",
) -> "PipelinedModel":
    """Divides the layers of a model into stages and returns this rank's stage.

    Args:
        model: a built functional or sequential model with one input and one output, the same on all ranks.
        mesh: the ranks; the number of stages is the number of columns.
        cuts: names of the last layers of all stages but the last one. By default, the layers that divide the weights
            most evenly. A cut must be at a layer whose output is the only tensor that later layers use.
        micro_batches: number of parts of a batch, which must be divisible by it.
        schedule: "1f1b" or "gpipe".

    Raises:
        UsageError: the model cannot be cut in this way, two stages share a weight, or an argument is invalid.
    """
    functional = graph.functional(model)
    if schedule not in SCHEDULES:
        raise UsageError(f"There is no schedule {schedule!r}. Choose one of {', '.join(SCHEDULES)}.")
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise UsageError(f"micro_batches must be 1 or more, but is {micro_batches!r}.")
    if len(functional.inputs) != 1 or len(functional.outputs) != 1:
        raise UsageError(f"The model {model.name!r} must have one input and one output to be cut into stages.")
    cuts = even_cuts(functional, mesh.model) if cuts is None else list(cuts)
    if len(cuts) != mesh.model - 1:
        raise UsageError(f"{len(cuts)} cuts make {len(cuts) + 1} stages, but the mesh has {mesh.model} model ranks.")
    borders = [functional.inputs[0], *(_output_of(functional, name) for name in cuts), functional.outputs[0]]
    here = mesh.model_index
    stages = [graph.between([borders[n]], [borders[n + 1]], f"stage{n}") for n in range(mesh.model)]
    graph.refuse_shared(stages)
    for part in stages:
        graph.refuse_idle(part.name, [part])
    graph.refuse_unknown_sizes(model, borders)
    graph.refuse_masks(model, borders[1:-1])
    divided = PipelinedModel(graph.Copies().of(stages[here]), borders, mesh, micro_batches, schedule, model)
    divided.stages_add_losses = any(stage.losses for stage in stages)
    return divided


class PipelinedModel(keras.Model):
    """A stage of a model, connected to the stages before and after it. `pipeline` makes it.

    A call returns the whole model's output on every rank. Metrics and loss are those of the whole model on every rank.
    """

    stages_add_losses = True  # whether stages have losses of their own (regularization), to be summed over all stages

    def __init__(
        self,
        stage: keras.Model,
        borders: Sequence[Any],
        mesh: Mesh,
        micro_batches: int,
        schedule: str,
        model: keras.Model,
    ) -> None:
        super().__init__(name=model.name)
        self.stage = stage
        self.micro_batches, self.schedule = micro_batches, schedule
        self._mesh, self._outbox = mesh, Outbox()
        self._borders = [(tuple(t.shape[1:]), t.dtype) for t in borders]
        self._is_first, self._is_last = mesh.model_index == 0, mesh.model_index == mesh.model - 1
        for variable in stage.variables:  # including random seeds: their number differs between stages
            mark(variable, Shard(mesh, None))
        self.built = True
        whole_model.remember(self, model)

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Runs the whole model, stage after stage, and returns its output [batch, ...] on all ranks."""
        here = self._mesh.model_index
        if not self._is_first:
            x = self._receive(here, x, "forwards.whole")
        output = self.stage(x, training=training)
        if not self._is_last:
            self._outbox.close([send(self._mesh, here, output, "forwards.whole")])
            output = wire.zeros([0, *self._borders[-1][0]], self._borders[-1][1])
        if self._mesh.model == 1:
            return output
        if self.stages_add_losses:
            own = tf.add_n(self.stage.losses) if self.stage.losses else wire.zeros([], "float32")
            self.add_loss(self._sum([own], "hvdkit.pipeline.losses")[0] - own)
        output = collectives.gather_rows(output, "hvdkit.pipeline.output", self._mesh.model_set)
        return tf.ensure_shape(output, [x.shape[0], *self._borders[-1][0]])

    def train_step(self, data: Any) -> dict[str, Any]:
        """Runs a training step: all micro-batches forward and backward through all stages, then the optimizer."""
        if tf.executing_eagerly():
            raise UsageError(
                "A pipeline cannot train eagerly, because its stages would wait for each other: leave out run_eagerly."
            )
        clear_losses(self)  # of an evaluation's graph: Keras does this only in a call of the whole model
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        batches = list(zip(*(self._divided(part) for part in (x, y, weights)), strict=True))
        step = _Step(self, batches)
        for action, number in order(self.schedule, self._mesh.model_index, self._mesh.model, self.micro_batches):
            step.forwards(number) if action == "F" else step.backwards(number)
        if step.sending:
            self._outbox.close(step.sending)
        with tf.control_dependencies(step.done):
            self.optimizer.apply(step.gradients, self.trainable_weights)
        self._share_metrics(x, y, weights, step.penalty)
        return self.get_metrics_result()

    def _divided(self, part: Any) -> list[Any]:
        """Divides a structure of tensors [batch, ...] into micro-batches."""
        if part is None:
            return [None] * self.micro_batches
        leaves = keras.tree.flatten(part)
        sizes = {leaf.shape[0] for leaf in leaves}
        if any(size is not None and size % self.micro_batches for size in sizes):
            raise UsageError(
                f"A local batch of {sizes.pop()} cannot be divided into {self.micro_batches} micro-batches evenly. "
                f"Choose a multiple of {self.micro_batches}."
            )
        pieces = [tf.split(leaf, self.micro_batches) for leaf in leaves]
        return [keras.tree.pack_sequence_as(part, list(piece)) for piece in zip(*pieces, strict=True)]

    def _receive(self, border: int, x: tf.Tensor, name: str) -> tf.Tensor:
        """Receives the next tensor that crosses the border before stage `border`, with as many examples as `x`."""
        shape, dtype = self._borders[border]
        received = receive(self._mesh, border - 1, tf.concat([tf.shape(x)[:1], shape], axis=0), dtype, name)
        return tf.ensure_shape(received, [x.shape[0], *shape])

    def _share_metrics(self, x: Any, y: Any, weights: Any, penalty: tf.Tensor | None) -> None:
        """Sends the last stage's metrics to all stages: only it has seen predictions. Sums the loss over all stages."""
        if self._mesh.model == 1:
            return
        if not self._is_last:  # compute metrics of zero examples, to create their states
            shape, dtype = self._borders[-1]
            none = keras.tree.map_structure(lambda t: t if t is None else t[:0], (x, y, weights))
            self.compute_metrics(none[0], none[1], tf.zeros([0, *shape], dtype), none[2])
        states = [v for metric in self.metrics for v in metric.variables]
        mine = [v.value if self._is_last else wire.zeros(tf.shape(v.value), v.dtype) for v in states]
        if penalty is not None:
            place = next(i for i, v in enumerate(states) if v is loss_tracker(self).total)
            mine[place] = tf.cast(penalty, mine[place].dtype)
        for variable, value in zip(states, self._sum(mine, "hvdkit.pipeline.metrics"), strict=True):
            variable.assign(value)

    def _sum(self, values: list[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Sums over the stages."""
        op = world.horovod().Sum
        return collectives.reduce_dense(values, name, op=op, process_set=self._mesh.model_set)


class _Step:
    """The work of a stage in one training step. The schedule determines the order of the calls."""

    def __init__(self, model: PipelinedModel, batches: Sequence[Any]) -> None:
        self._model, self._batches = model, batches
        self._mesh, self._here = model._mesh, model._mesh.model_index
        self._kept: dict[int, tuple[Any, Any, Any]] = {}
        self.done: list[tf.Tensor] = []
        self.sending: list[tf.Tensor] = []
        self.penalty: tf.Tensor | None = None  # this stage's losses times examples, if compute_loss does not add them
        self.gradients: list[Any] = [None] * len(model.trainable_weights)
        self._weighing = self._count() if model._is_last else weighing.Scope()
        # Post all receives now: a neighbour can then send as soon as it has a tensor.
        self._inputs = [self._receive_input(number) for number in range(len(batches))]
        self._returned = [self._receive_gradient(number) for number in range(len(batches))]

    def forwards(self, number: int) -> None:
        """Runs the stage on one micro-batch; sends the output to the next stage, or computes the loss in the last."""
        model = self._model
        _, y, weights = self._batches[number]
        with tf.control_dependencies(self.done), tf.GradientTape() as tape:
            x = tf.identity(self._inputs[number])
            if not model._is_first:
                tape.watch(x)
            output = model.stage(x, training=True)
            penalty = tf.add_n(model.stage.losses) if model.stage.losses else None
            if model._is_last:
                with self._weighing:
                    loss = model.compute_loss(x, y, output, weights, training=True)  # with the stage's own losses
                loss_tracker(model).update_state(loss, sample_weight=tf.shape(output)[0])
                target = model.optimizer.scale_loss(loss / len(self._batches))
            else:
                target = output
                if penalty is not None:
                    target = output, model.optimizer.scale_loss(penalty / len(self._batches))
                    self.penalty = _added(self.penalty, penalty * tf.cast(tf.shape(x)[0], penalty.dtype))
        self._kept[number] = (tape, x, target)
        with tf.control_dependencies(self.done):
            if model._is_last:
                model.compute_metrics(x, y, output, weights)
                self.done = [target]
            else:
                self.done = [output]
                self.sending.append(send(self._mesh, self._here, output, f"forwards.{number}"))

    def backwards(self, number: int) -> None:
        """Computes the gradients of one micro-batch; sends the gradient of the input to the previous stage."""
        model = self._model
        tape, x, target = self._kept.pop(number)
        sources = [v.value for v in model.trainable_weights]
        with tf.control_dependencies(self.done):
            seed = self._returned[number]
            if isinstance(target, tuple):
                seed = (seed, tf.ones_like(target[1]))
            if not model._is_first:
                sources.append(x)
            gradients = tape.gradient(target, sources, output_gradients=seed)
            own = gradients[: len(self.gradients)]
            self.gradients = [_added(a, b) for a, b in zip(self.gradients, own, strict=True)]
            self.done = [t for g in gradients if g is not None for t in ([g.values] if hasattr(g, "values") else [g])]
            if not model._is_first:
                self.sending.append(send(self._mesh, self._here - 1, gradients[-1], f"backwards.{number}"))

    def _count(self) -> weighing.Scope:
        """Counts what the loss will divide by in each micro-batch, so that all weigh as in one batch.

        The first micro-batch goes backward before the last one has predictions, but what a loss counts is known from
        labels and weights. So this computes losses of zeros, of which the graph keeps the counts only.
        """
        model, counting = self._model, weighing.Counting()
        shape, dtype = model._borders[-1]
        with counting:
            for x, y, weights in self._batches:
                output = tf.zeros(tf.concat([tf.shape(x)[:1], shape], axis=0), dtype)
                model.compute_loss(x, y, tf.ensure_shape(output, [x.shape[0], *shape]), weights, training=True)
        if len(counting.counts) != len(self._batches):  # a loss of the model's own, that is no Keras loss
            return weighing.Scope()
        for optimizer in exchanging_optimizers_of(model):
            optimizer._self_gradients.weighs = True
        return weighing.MicroBatchWeighing("hvdkit.pipeline", self._mesh.data_set, counting)

    def _receive_input(self, number: int) -> tf.Tensor:
        x = self._batches[number][0]
        if self._model._is_first:
            return x
        return self._model._receive(self._here, x, f"forwards.{number}")

    def _receive_gradient(self, number: int) -> tf.Tensor | None:
        if self._model._is_last:
            return None
        return self._model._receive(self._here + 1, self._batches[number][0], f"backwards.{number}")


def order(schedule: str, stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """Returns the order of a stage's work: ("F", micro-batch) for forward, ("B", micro-batch) for backward."""
    ahead = micro_batches if schedule == "gpipe" else min(stages - stage - 1, micro_batches)
    actions = [("F", number) for number in range(ahead)]
    for number in range(micro_batches - ahead):
        actions += [("F", ahead + number), ("B", number)]
    return actions + [("B", number) for number in range(micro_batches - ahead, micro_batches)]


def _added(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tf.IndexedSlices) and isinstance(b, tf.IndexedSlices):
        values, indices = tf.concat([a.values, b.values], axis=0), tf.concat([a.indices, b.indices], axis=0)
        return tf.IndexedSlices(values, indices, a.dense_shape)
    return tf.convert_to_tensor(a) + tf.convert_to_tensor(b)


def _output_of(model: keras.Model, name: str) -> Any:
    names = [layer.name for layer in model.layers]
    if name not in names:
        raise UsageError(f"The model {model.name!r} has no layer {name!r} to cut after: it has {', '.join(names)}.")
    return model.get_layer(name).output


def even_cuts(model: keras.Model, stages: int) -> list[str]:
    """Returns the names of the layers that divide the weights into stages most evenly."""
    weights, before = 0, {}
    for layer in model.layers:
        weights += sum(math.prod(w.shape) for w in layer.trainable_weights)
        before[layer.name] = weights
    narrow = [name for name in _narrow(model) if 0 < before[name] < weights]
    # Of several cuts with no weights between them, keep the first, which usually has the smallest output.
    narrow = [name for place, name in enumerate(narrow) if not place or before[name] != before[narrow[place - 1]]]
    if len(narrow) < stages - 1:
        raise UsageError(
            f"The model {model.name!r} has {len(narrow)} possible cuts (a single tensor between layers, with weights "
            f"before and after it), too few for {stages} stages. Use fewer stages."
        )
    cuts: list[str] = []
    for stage in range(1, stages):
        left = [n for n in narrow if n not in cuts and (not cuts or narrow.index(n) > narrow.index(cuts[-1]))]
        left = left[: len(left) - (stages - 1 - stage)] or left
        cuts.append(min(left, key=lambda name: abs(before[name] - weights * stage / stages)))
    return cuts


def _narrow(model: keras.Model) -> list[str]:
    """Returns the layers whose single output is the only tensor that later layers use."""
    operations = model.operations  # layers, and operations between them, such as x + y
    place = {operation.name: number for number, operation in enumerate(operations)}
    last_use = [
        max((place[taker.name] for taker in consumers_of(operation) if taker.name in place), default=-1)
        for operation in operations
    ]
    narrow = []
    for here, operation in enumerate(operations[:-1]):
        crossing = [use for use in last_use[:here] if use > here]
        single = isinstance(operation, keras.layers.Layer) and not isinstance(operation.output, (list, dict))
        if not crossing and single and not isinstance(operation, keras.layers.InputLayer):
            narrow.append(operation.name)
    return narrow
