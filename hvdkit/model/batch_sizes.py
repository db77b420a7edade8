"""`CompareBatchSizes`: the callback that knows in which steps of a `fit` the ranks' batches may differ in size."""

import logging
from typing import Any

import keras

from hvdkit import collectives
from hvdkit.compat import fit_loop
from hvdkit.model import same_data
from hvdkit.optimizers import batch_sizes, heartbeat, weighing
from hvdkit.optimizers.gradients import GradientExchange

_log = logging.getLogger(__name__)


class CompareBatchSizes(keras.callbacks.Callback):
    """Makes the ranks compare the sizes of their batches in steps in which they may differ, and in no others.

    If the data say how many examples each step has, the ranks compare once, when training begins. Otherwise the first
    execution of `fit` and the last of each epoch compare: batches are of one size, but for a short last one. If another
    batch differs, the heartbeat tells, and from then on all steps compare. All do, too, if batches may have any size:
    where Python makes them (a `PyDataset`, a generator), which takes far longer than to compare, and where a data set
    does not know its length (a filter, buckets by length) or does not make them by `batch` alone (`data_batches`).

    What the ranks know of the data's contents travels in the same message as the sizes (see `same_data`).

    Args:
        exchange: the reduction of the model's gradients.
    """

    checkpointed = False
    sees_executions = True

    def __init__(self, exchange: GradientExchange) -> None:
        super().__init__()
        self._exchange = exchange

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Compares what the ranks know of their data."""
        sizes = batch_sizes.current()
        self._before = sizes.compares
        iterator, _ = fit_loop.of(self.model)
        mine = same_data.contents_of(self.model)
        length = None if fit_loop.may_vary(iterator) else iterator.num_batches
        known = fit_loop.sizes_of_batches(iterator), length, mine
        everyone, lengths, contents = zip(*self._gather(known), strict=True)
        same_data.warn_if_undivided(mine, contents)
        self._contents = mine
        self._first_batch = same_data.FirstBatch(iterator) if all(c.later for c in contents) else None
        self._known = None not in everyone
        differ = any(one != everyone[0] for one in everyone)
        self._always = differ if self._known else None in lengths
        self._steps = min(filter(None, lengths), default=0)  # of an epoch, the same on all ranks
        self._first = True
        sizes.compare(self._always)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Sets whether the next execution compares."""
        if self._known or self._always:
            return
        steps = getattr(self.model.train_function, "steps", 0) or self.model.steps_per_execution
        batch_sizes.current().compare(self._first or batch + steps >= self._steps)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Makes all further steps compare, once batches have differed."""
        if not self._known and not self._always:
            self._look(batch)
        if self._known and self._always and self._first:
            self._warn_if_nothing_weighs()
        if self._first and self._first_batch:
            mine = same_data.Contents(self._contents.copy, self._first_batch.fingerprint)
            same_data.warn_if_undivided(mine, self._gather(mine))
        self._first = False

    def _look(self, batch: int) -> None:
        """Makes all further steps compare, once batches have differed where they should not."""
        sizes = batch_sizes.current()
        if self._first:
            found = set(self._gather(sizes.compared())) - {0.0}  # 0: a rank that computes no loss
            self._always = len(found) > 1
        elif heartbeat.current().had_unequal_batches():
            self._always = True
            _log.warning(
                "The ranks' batches differ in size from step %d on, in the middle of an epoch. Up to this step the "
                "ranks counted alike; from the next one on each counts by its examples, as in one process. Batches of "
                "one size (drop_remainder=True, or hvd.data.shard before batch) need no such messages.",
                batch + 1,
            )
        if self._always:
            sizes.compare(True)

    def _warn_if_nothing_weighs(self) -> None:
        """Warns if the ranks' batches differ, and nothing in the first step has weighed a loss."""
        if not self._exchange.weighs and not weighing.has_sharded_losses():
            _log.warning(
                "The ranks' batches have different numbers of examples, but count alike: a train_step without "
                "compute_loss, LocalSGD and Adasum do not weigh the loss of model %r. Give all ranks batches of one "
                "size, or wrap the loss of a train_step in hvd.shard_loss.",
                self.model.name,
            )

    def on_train_end(self, logs: dict | None = None) -> None:
        """Restores the flag, for a `fit` around this one."""
        batch_sizes.current().compare(self._before)

    def _gather(self, mine: Any) -> list[Any]:
        return collectives.allgather_object(mine, name="batch_sizes", process_set=self._exchange.process_set)
