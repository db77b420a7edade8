"""`ReplicaGuardCallback`: detects during training that replicas have diverged."""

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
_ROWS = 2048  # rows to sum up at once: 16 MiB, and another 16 MiB for their products
_INTEGERS = {1: tf.int8, 2: tf.int16, 4: tf.int32, 8: tf.int32}  # from an element's size in bytes to the integer type


class ReplicaGuardCallback(keras.callbacks.Callback):
    """Compares weights, optimizer slots and random seeds over all ranks every `every` steps.

    Replicas diverge without any other symptom if a bit flips in memory, a rank loads different weights, or only one
    rank runs a layer or callback. Each rank reduces every variable to a 64-bit fingerprint, which any single flipped
    bit changes. The ranks then compare fingerprints.

    The check compares the bits (NaNs included) of all variables of the model and of its optimizer, except those that
    differ by design:

    - BatchNormalization's moving statistics and other float non-trainable weights of trainable layers, which
      `AverageStateCallback` averages;
    - sums of gradients that are not applied yet;
    - `local_variables`, and variables that a `DistributedOptimizer` keeps local;
    - random seeds, which differ between ranks: the check compares how far they have moved since training began;
    - shards of a divided model: the check compares the ranks that hold the same shards.

    A check takes at most about as long as a step (`tests/parallel/guard_cost.py` on two CPU cores, models of 0.1 to 19
    million weights: 0.01 to 0.19 % of the training time with the default `every`). Put this callback after the
    broadcast.

    Args:
        every: steps from one check to the next; the last step is checked, too. With several steps per execution, the
            check runs at the end of an execution.
        action: `"stop"` raises `ReplicasDiverged` on all ranks. `"broadcast"` gives all ranks the state of `root_rank`,
            logs a warning, and continues; it raises, too, if a majority agrees and `root_rank` differs from it.
        root_rank: the rank whose state all ranks take.
        local_variables: variables to exclude from the check.

    Raises:
        ReplicasDiverged: the message names the step, the ranks and the first variable.
        UsageError: an argument is invalid.

    Example: `model.fit(dataset, callbacks=[*hvd.callbacks.standard(), hvd.callbacks.ReplicaGuardCallback()])`
    """

    sees_executions = True

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
        """Resets the number of steps."""
        self._step = self._in_epoch = self._checked = 0
        self._guarded = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Resets the number of steps in the epoch."""
        self._in_epoch = 0

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Records the seeds before the first step changes them."""
        if self._guarded is None and world.size() > 1:
            self._guarded = _Guarded(self.model, self._local)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Checks if `every` steps have passed since the last check."""
        self._step += batch + 1 - self._in_epoch
        self._in_epoch = batch + 1
        if self._step // self.every > self._checked // self.every:
            self._check()

    def on_train_end(self, logs: dict | None = None) -> None:
        """Checks once more if steps followed the last check."""
        if self._step > self._checked:
            self._check()

    def _check(self) -> None:
        before, self._checked = self._checked, self._step
        if self._guarded is None:
            return
        found = self._guarded.compare()
        if found is None:
            return
        differing, name, majority = found
        report = (
            f"The replicas differ at step {self._step}: {name} on rank(s) {', '.join(map(str, differing))} is not that "
            f"of {'the others' if majority else 'rank 0'} (of {world.size()} ranks)."
        )
        if self.action == "stop" or (majority and self.root_rank in differing):
            raise ReplicasDiverged(
                f"{report} {f'They were equal at step {before}' if before else 'This was the first check'}. The cause "
                f"is code that only some ranks run, or faulty memory. Find what changes {name}, and resume from an "
                f"earlier checkpoint."
            )
        _log.warning("%s All ranks take the state of rank %d and continue.", report, self.root_rank)
        self._guarded.restore(self.root_rank)


class _Guarded:
    """The variables that must be equal on all ranks, and the seeds, which must move equally far."""

    def __init__(self, model: keras.Model, local: set[int]) -> None:
        kept = [
            k
            for k in kept_of(model)
            if id(k.variable) not in local
            and not isinstance(k.variable, WholeSlot)
            and not k.local  # also seeds: stages of a pipeline may have their own
        ]
        self._seeds = [k.variable for k in kept if k.kind == SEED]
        self._equal = [k.variable for k in kept if k.kind == COMMON]
        self._shards = [v for v in model.weights if shard_of(v) is not None]
        self._mesh = mesh_of(self._shards)
        self._names = [*(v.path for v in [*self._equal, *self._seeds]), "its part of the model"]
        self._start = [_integers(v) for v in self._seeds]
        self._prints = tf.function(self._all_prints, autograph=False).get_concrete_function()

    def compare(self) -> tuple[list[int], str, bool] | None:
        """Compares all ranks.

        Returns:
            None if they are equal; otherwise the ranks that differ, the first variable that does, and whether they
            differ from a majority (true) or from rank 0 (false).
        """
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
        """Gives all ranks the root's state; the seeds remain different."""
        collectives.broadcast_variables(self._equal, root_rank)
        share(self._shards)
        moved = [_integers(v) - start for v, start in zip(self._seeds, self._start, strict=True)]
        moved = collectives.broadcast_object(moved, root_rank, name="guard.seeds")
        for variable, start, movement in zip(self._seeds, self._start, moved, strict=True):
            variable.assign(start + movement)


def _integers(seed: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(seed), np.int64)


def fingerprint(values: tf.Tensor) -> tf.Tensor:
    """Returns an int64 fingerprint: the sum modulo 2^64 of the elements' bits, each times an odd weight by its index.

    A single different element always changes the sum: multiplication by an odd number is invertible modulo 2^64.
    Swapped elements change it, too, because their weights differ.
    """
    if values.dtype == tf.bool:
        values = tf.cast(values, tf.int8)
    bits = tf.reshape(tf.bitcast(values, _INTEGERS[values.dtype.size]), [-1])
    if bits.shape[0] == 0:
        return tf.zeros([], tf.int64)
    generator = np.random.default_rng(0)  # the same on all ranks
    while True:  # reduce in levels, to avoid a tensor of weights as large as the values
        width = min(_WIDTH, bits.shape[0])
        weights = generator.integers(1, 2**62, width) | 1
        bits = _row_sums(bits, weights)
        if bits.shape[0] == 1:
            return bits[0]


def _row_sums(bits: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
    """Returns weighted sums of `len(weights)` elements each, padded with zeros; sums in blocks to save memory."""
    width, block = len(weights), len(weights) * _ROWS
    sums = []
    for start in range(0, bits.shape[0], block):
        some = tf.cast(bits[start : start + block], tf.int64)
        rows = tf.reshape(tf.pad(some, [[0, -some.shape[0] % width]]), [-1, width])
        sums.append(tf.reduce_sum(rows * weights, axis=1))
    return tf.concat(sums, axis=0)


@functools.cache
def _compiled(shape: tf.TensorShape, dtype: tf.DType) -> Any:
    """Returns a graph for all variables of one shape. Large models have hundreds of variables: trace it only once."""
    return tf.function(fingerprint, autograph=False).get_concrete_function(tf.TensorSpec(shape, dtype))


def _of_first_copy(prints: np.ndarray, mesh: Mesh | None) -> np.ndarray:
    """Returns for each rank the fingerprint of the first rank that holds the same shards."""
    return prints if mesh is None else np.tile(prints[: mesh.model], mesh.data)
