"""`ReplicaGuardCallback`: replicas that silently became several models are found while they train."""

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives.mesh import Mesh, mesh_of, shard_of, share
from hvdkit.errors import ReplicasDiverged, UsageError
from hvdkit.optimizers.state import COMMON, SEED, kept_of
from hvdkit.optimizers.whole_slots import WholeSlot

_log = logging.getLogger(__name__)

_WIDTH = 1024
_ROWS = 2048  # that are summed up at once: 16 MiB, and as much for their products
_INTEGERS = {1: tf.int8, 2: tf.int16, 4: tf.int32, 8: tf.int32}  # by the bytes of what is read as integers


class ReplicaGuardCallback(keras.callbacks.Callback):
    """Compares weights, optimizer slots and random seeds over all ranks every so many steps.

    A bit that flips in a memory, a rank that loads other weights, a layer or callback that one rank alone runs: each
    makes several models of one, and nothing else notices. Each rank reduces every variable to a number of 64 bits in
    which no single flipped bit can hide; the ranks exchange these.

    Compared are the bits (so that NaNs are compared, too) of all variables of the model and of its optimizer, except
    those that differ by design: BatchNormalization's moving statistics and other float non-trainable weights of layers
    that train (`AverageStateCallback` averages these), sums of gradients not yet applied, `local_variables`, and those
    that a `DistributedOptimizer` leaves to each rank. Of random seeds, which differ
    from rank to rank, it is compared how far they have moved since training began. Of a divided model's shards, it is
    compared whether the ranks that hold the same ones hold them alike.

    A check takes about as long as a step or less (`tests/parallel/guard_cost.py` on two CPU cores, models of 0.1 to 19
    million weights: 0.01 to 0.19 % of the training with the default `every`). Put it behind the broadcast.

    Args:
        every: steps from one check to the next; training's end is checked, too. With several steps an execution, the
            check comes at the end of an execution.
        action: `"stop"` raises `ReplicasDiverged` on all ranks together; `"broadcast"` gives all ranks the state of
            `root_rank`, with a warning, and goes on. Where most ranks agree and `root_rank` is the one that differs, it
            raises, too.
        root_rank: the rank whose state is taken.
        local_variables: variables that each rank keeps for itself.

    Raises:
        ReplicasDiverged: the message names the step, the ranks and the first variable.
        UsageError: an argument is wrong.

    Example: `model.fit(dataset, callbacks=[*hvd.callbacks.standard(), hvd.callbacks.ReplicaGuardCallback()])`
    """

    def __init__(
        self, every: int = 500, action: str = "stop", root_rank: int = 0, local_variables: Sequence[Any] = ()
    ) -> None:
        super().__init__()
        if every < 1:
            raise UsageError(f"every must be a number of steps, 1 or more, but is {every}.")
        if action not in ("stop", "broadcast"):
            raise UsageError(f"action must be 'stop' or 'broadcast', but is {action!r}.")
        self.every = every
        self.action = action
        self.root_rank = root_rank
        self._local = {id(v) for v in local_variables}
        self._guarded: _Guarded | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Starts to count steps."""
        self._step = self._in_epoch = self._checked = 0
        self._guarded = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Starts to count the epoch's steps."""
        self._in_epoch = 0

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Notes the seeds, before the first step moves them."""
        if self._guarded is None and world.size() > 1:
            self._guarded = _Guarded(self.model, self._local)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Checks, if enough steps were taken since the last check."""
        self._step += batch + 1 - self._in_epoch
        self._in_epoch = batch + 1
        if self._step // self.every > self._checked // self.every:
            self._check()

    def on_train_end(self, logs: dict | None = None) -> None:
        """Checks what came after the last check."""
        if self._step > self._checked:
            self._check()

    def _check(self) -> None:
        before, self._checked = self._checked, self._step
        if self._guarded is None:
            return
        found = self._guarded.compare()
        if found is None:
            return
        strangers, name, majority = found
        report = (
            f"The replicas differ at step {self._step}: {name} on rank(s) {', '.join(map(str, strangers))} is not that "
            f"of {'the others' if majority else 'rank 0'} (of {world.size()} ranks)."
        )
        if self.action == "stop" or (majority and self.root_rank in strangers):
            raise ReplicasDiverged(
                f"{report} {f'They were equal at step {before}' if before else 'This was the first check'}. Code that "
                f"one rank alone runs does this, and so does faulty memory: look at what changes {name}, and go on "
                f"from an earlier checkpoint."
            )
        _log.warning("%s All ranks take the state of rank %d and go on.", report, self.root_rank)
        self._guarded.restore(self.root_rank)


class _Guarded:
    """The variables that must be equal on all ranks, and the seeds, whose movement must be."""

    def __init__(self, model: keras.Model, local: set[int]) -> None:
        kept = [k for k in kept_of(model) if id(k.variable) not in local and not isinstance(k.variable, WholeSlot)]
        self._seeds = [k.variable for k in kept if k.kind == SEED]
        self._equal = [k.variable for k in kept if k.kind == COMMON]
        self._shards = [v for v in model.weights if shard_of(v) is not None]
        self._mesh = mesh_of(self._shards)
        self._names = [*(v.path for v in [*self._equal, *self._seeds]), "its part of the model"]
        self._start = [_integers(v) for v in self._seeds]
        self._prints = tf.function(self._all_prints).get_concrete_function()

    def compare(self) -> tuple[list[int], str, bool] | None:
        """The ranks that differ, the first variable in which they do, and whether a majority tells who is right."""
        moved = [_integers(v) - start for v, start in zip(self._seeds, self._start, strict=True)]
        prints = self._prints().numpy()
        common, shards = prints[: len(self._equal)], prints[len(self._equal) :]
        mine = np.asarray([*common, *(fingerprint(tf.constant(m)) for m in moved), shards.sum()], np.int64)
        row = np.zeros([world.size(), len(mine)], np.int64)
        row[world.rank()] = mine
        everyone = collectives.allreduce_sum(row, name="guard")
        everyone[:, -1] -= _of_first_copy(everyone[:, -1], self._mesh)
        differing = np.flatnonzero((everyone != everyone[0]).any(axis=0))
        if not len(differing):
            return None
        column = everyone[:, differing[0]].tolist()
        value, votes = Counter(column).most_common(1)[0]
        majority = 2 * votes > len(column)
        reference = value if majority else column[0]
        return [r for r, other in enumerate(column) if other != reference], self._names[differing[0]], majority

    def _all_prints(self) -> tf.Tensor:
        variables = [*self._equal, *self._shards]
        return tf.stack(
            [_compiled(v.value.shape, v.value.dtype)(v.value) for v in variables] or [tf.constant(0, tf.int64)]
        )

    def restore(self, root_rank: int) -> None:
        """Gives all ranks the root's state; the seeds stay apart."""
        collectives.broadcast_variables(self._equal, root_rank)
        share(self._shards)
        moved = [_integers(v) - start for v, start in zip(self._seeds, self._start, strict=True)]
        moved = collectives.broadcast_object(moved, root_rank, name="guard.seeds")
        for variable, start, movement in zip(self._seeds, self._start, moved, strict=True):
            variable.assign(start + movement)


def _integers(seed: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(seed), np.int64)


def fingerprint(values: tf.Tensor) -> tf.Tensor:
    """An int64 of a tensor's bits: modulo 2^64, a sum of its elements' bits, each times an odd weight of its place.

    One element that differs always shows: multiplication by an odd number loses nothing modulo 2^64.
    Elements that change places show, too, since their weights differ.
    """
    if values.dtype == tf.bool:
        values = tf.cast(values, tf.int8)
    bits = tf.reshape(tf.bitcast(values, _INTEGERS[values.dtype.size]), [-1])
    if bits.shape[0] == 0:
        return tf.zeros([], tf.int64)
    generator = np.random.default_rng(0)  # the same on all ranks
    while True:  # a level at a time: no tensor of weights as large as the values is needed
        width = min(_WIDTH, bits.shape[0])
        weights = generator.integers(1, 2**62, width) | 1
        bits = _row_sums(bits, weights)
        if bits.shape[0] == 1:
            return bits[0]


def _row_sums(bits: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
    """Weighted sums of so many elements each, the last filled up with zeros; a block at a time, to save memory."""
    width, block = len(weights), len(weights) * _ROWS
    sums = []
    for start in range(0, bits.shape[0], block):
        some = tf.cast(bits[start : start + block], tf.int64)
        rows = tf.reshape(tf.pad(some, [[0, -some.shape[0] % width]]), [-1, width])
        sums.append(tf.reduce_sum(rows * weights, axis=1))
    return tf.concat(sums, axis=0)


@functools.cache
def _compiled(shape: tf.TensorShape, dtype: tf.DType) -> Any:
    """A graph for all variables of one shape, traced once: large models have hundreds of variables."""
    return tf.function(fingerprint).get_concrete_function(tf.TensorSpec(shape, dtype))


def _of_first_copy(prints: np.ndarray, mesh: Mesh | None) -> np.ndarray:
    """What each rank's shards should be: those of the first rank that holds the same ones."""
    return prints if mesh is None else np.tile(prints[: mesh.model], mesh.data)
